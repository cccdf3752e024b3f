"""A channel with faults: lost, silent, slow, or sending invalid frames."""

from __future__ import annotations

import asyncio
from enum import Enum

from tpirt.batch import Batch
from tpirt.errors import PeerLostError
from tpirt.protocol.messages import decode
from tpirt.transport.base import Carrier, Channel, Receiver
from tpirt.transport.frame import Frame, Header, Kind


class Fault(Enum):
    """A fault of one sent frame; all but the first two happen once."""

    DROP = "the connection closes instead of sending the frame"
    SILENCE = "the frame and all later ones are dropped; the connection stays open"
    DELAY = "the frame comes late"
    TRUNCATE = "the payload is half as long as the tensor"
    DUPLICATE = "the frame comes twice"
    REORDER = "the frame comes after the next one"
    WRONG_DTYPE = "a tensor's header has another dtype"
    WRONG_SHAPE = "a tensor's header has another shape of the same size"
    WRONG_SIZE = "header and payload agree on one row too many"
    WRONG_STEP = "a tensor or step has the number of a later step"
    OLD_STEP = "a tensor or step has the number of the previous step"
    WRONG_SEQ = "a tensor's header has the number of another collective"
    GARBAGE = "the frame's header is random bytes"


def frame_kind(frame: Frame) -> str:
    """Kind of a frame: ``partial``, ``reduced``, ``step``, ``heartbeat``, or a message's name."""
    kind = Kind(frame.header.kind)
    if kind in (Kind.MESSAGE, Kind.REQUEST, Kind.REPLY):
        body = decode(frame.message, "test")
        return "step" if isinstance(body, Batch) else type(body).__name__
    return kind.name.lower()


class FaultyChannel:
    """Wraps a :class:`~tpirt.transport.base.Channel` with a fault in a frame that it *sends*.

    For a fault in received frames, wrap the other end.

    Attributes:
        fired: set once the fault has happened.
    """

    def __init__(
        self,
        inner: Channel,
        fault: Fault,
        *,
        after: int = 0,
        kind: str | None = None,
        delay_s: float = 0.0,
    ):
        """Choose the fault.

        Args:
            inner: the channel.
            fault: the fault.
            after: number of frames before the faulty one, without heartbeats.
            kind: only consider frames of this kind (see :func:`frame_kind`).
            delay_s: delay for ``DELAY``.
        """
        self.fired = asyncio.Event()
        self._inner = inner
        self._fault = fault
        self._left = after
        self._kind = kind
        self._delay_s = delay_s
        self._held: Frame | None = None

    @property
    def peer_id(self) -> str:
        """See :class:`tpirt.transport.base.Channel`."""
        return self._inner.peer_id

    @property
    def carrier(self) -> Carrier:
        """See :class:`tpirt.transport.base.Channel`."""
        return self._inner.carrier

    @property
    def bytes_sent(self) -> int:
        """See :class:`tpirt.transport.base.Channel`."""
        return self._inner.bytes_sent

    @property
    def bytes_received(self) -> int:
        """See :class:`tpirt.transport.base.Channel`."""
        return self._inner.bytes_received

    @property
    def frame_limit(self) -> int:
        """See :class:`tpirt.transport.base.Channel`."""
        return self._inner.frame_limit

    @frame_limit.setter
    def frame_limit(self, value: int) -> None:
        self._inner.frame_limit = value

    def start(self, receiver: Receiver) -> None:
        """See :class:`tpirt.transport.base.Channel`."""
        self._inner.start(receiver)

    def poll(self) -> None:
        """See :class:`tpirt.transport.base.Channel`."""
        self._inner.poll()

    def send_nowait(self, frame: Frame) -> bool:
        """See :class:`tpirt.transport.base.Channel`: heartbeats, dropped by a silent channel."""
        if self.fired.is_set() and self._fault is Fault.SILENCE:
            return True
        return self._inner.send_nowait(frame)

    async def send(self, frame: Frame) -> None:
        """See :class:`tpirt.transport.base.Channel`; this is where the fault happens."""
        if self.fired.is_set():
            await self._send_after(frame)
        elif self._kind not in (None, frame_kind(frame)):
            await self._inner.send(frame)
        elif self._left > 0:
            self._left -= 1
            await self._inner.send(frame)
        else:
            self.fired.set()
            await self._misbehave(frame)

    async def aclose(self) -> None:
        """See :class:`tpirt.transport.base.Channel`."""
        await self._inner.aclose()

    async def _send_after(self, frame: Frame) -> None:
        if self._fault is Fault.SILENCE:
            return
        await self._inner.send(frame)
        if self._held is not None:
            held, self._held = self._held, None
            await self._inner.send(held)

    async def _misbehave(self, frame: Frame) -> None:
        match self._fault:
            case Fault.DROP:
                await self._inner.aclose()
                raise PeerLostError(f"{self.peer_id}: connection dropped by a test")
            case Fault.SILENCE:
                return
            case Fault.REORDER:
                # A tensor's bytes may be overwritten as soon as the call returns.
                self._held = Frame(frame.head, frame.message, bytes(frame.payload))
                return
            case Fault.DELAY:
                await asyncio.sleep(self._delay_s)
            case Fault.DUPLICATE:
                await self._inner.send(frame)
            case _:
                frame = spoil(frame, self._fault)
        await self._inner.send(frame)


def spoil(frame: Frame, fault: Fault) -> Frame:
    """Return a copy of ``frame`` with ``fault``.

    Raises:
        ValueError: the fault is not one of a frame's content.
    """
    header, payload = frame.header, bytes(frame.payload)
    row = len(payload) // max(1, header.rows)
    match fault:
        case Fault.GARBAGE:
            return Frame(b"\xff" * len(frame.head), frame.message, payload)
        case Fault.TRUNCATE:
            payload = payload[: len(payload) // 2]
        case Fault.WRONG_STEP:
            header = header._replace(step=header.step + 1)
        case Fault.OLD_STEP:
            header = header._replace(step=header.step - 1)
        case Fault.WRONG_SIZE:
            header, payload = header._replace(rows=header.rows + 1), payload + payload[:row]
        case Fault.WRONG_DTYPE:
            header = header._replace(dtype=3 - header.dtype)  # float32 and bfloat16 swapped
        case Fault.WRONG_SHAPE:
            header = header._replace(rows=header.columns, columns=header.rows)
        case Fault.WRONG_SEQ:
            header = header._replace(seq=header.seq + 1)
        case _:
            raise ValueError(f"{fault.name} is not a fault of a frame's content")
    header = Header(*header[:-1], len(payload))
    return Frame(header.pack(), frame.message, payload)
