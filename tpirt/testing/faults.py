"""A channel that misbehaves, by choice: dead, silent, slow, lying."""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import Any, cast

from tpirt.errors import PeerLostError
from tpirt.transport.base import Channel
from tpirt.transport.codec import Frame
from tpirt.transport.pb import tpirt_pb2 as pb


class Fault(Enum):
    """What goes wrong with one frame that is sent; all but the first two happen once."""

    DROP = "the connection ends instead of the frame"
    SILENCE = "the frame and all after it are swallowed; the connection stays"
    DELAY = "the frame comes late"
    TRUNCATE = "the payload ends early"
    DUPLICATE = "the frame comes twice"
    REORDER = "the frame comes after the next one"
    WRONG_DTYPE = "a tensor's header names another dtype"
    WRONG_SHAPE = "a tensor's header has another shape of the same size"
    WRONG_SIZE = "header and payload agree on one row too many"
    WRONG_STEP = "a tensor or step frame claims to be of a later step"
    OLD_STEP = "a tensor or step frame claims to be of the step before"
    WRONG_SEQ = "a tensor's header claims another collective"
    GARBAGE = "the frame's header is random bytes"


class FaultyChannel:
    """Wraps a :class:`~tpirt.transport.base.Channel`; what it *sends* goes wrong.

    To have what an end receives go wrong, wrap the other end. ``fired`` is set once the fault has
    happened.
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
            fault: what goes wrong.
            after: how many frames go through before; the next one is hit.
            kind: count and hit frames of this kind only (``partial``, ``reduced``, ``step`` ...).
            delay_s: how late, for ``DELAY``.
        """
        self.fired = asyncio.Event()
        self.via = inner.via
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

    @peer_id.setter
    def peer_id(self, value: str) -> None:
        self._inner.peer_id = value

    @property
    def bytes_sent(self) -> int:
        """See :class:`tpirt.transport.base.Channel`."""
        return self._inner.bytes_sent

    @bytes_sent.setter
    def bytes_sent(self, value: int) -> None:
        self._inner.bytes_sent = value

    @property
    def bytes_received(self) -> int:
        """See :class:`tpirt.transport.base.Channel`."""
        return self._inner.bytes_received

    @bytes_received.setter
    def bytes_received(self, value: int) -> None:
        self._inner.bytes_received = value

    async def send(self, frame: Frame) -> None:
        """See :class:`tpirt.transport.base.Channel`; this is where the fault happens."""
        if self.fired.is_set():
            await self._send_after(frame)
        elif self._kind not in (None, frame.kind):
            await self._inner.send(frame)
        elif self._left > 0:
            self._left -= 1
            await self._inner.send(frame)
        else:
            self.fired.set()
            await self._misbehave(frame)

    async def recv(self, timeout_s: float | None = None) -> Frame:
        """See :class:`tpirt.transport.base.Channel`."""
        return await self._inner.recv(timeout_s)

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
                self._held = Frame(frame.header, bytes(frame.payload))
                return
            case Fault.DELAY:
                await asyncio.sleep(self._delay_s)
            case Fault.DUPLICATE:
                await self._inner.send(frame)
            case _:
                frame = spoil(frame, self._fault)
        await self._inner.send(frame)


def spoil(frame: Frame, fault: Fault) -> Frame:
    """Return a copy of ``frame`` that lies in the way of ``fault``.

    Raises:
        ValueError: the fault is none of a frame's content, or does not fit its kind.
    """
    header = pb.FrameHeader()
    header.CopyFrom(frame.header)
    payload = bytes(frame.payload)
    body: Any = getattr(header, frame.kind, None)
    match fault:
        case Fault.TRUNCATE:
            return Frame(header, payload[: len(payload) // 2])
        case Fault.GARBAGE:
            return Frame(cast(pb.FrameHeader, _Garbage()), payload)
        case Fault.WRONG_STEP | Fault.OLD_STEP if hasattr(body, "step"):
            body.step += 1 if fault is Fault.WRONG_STEP else -1
        case Fault.WRONG_SIZE if isinstance(body, pb.Tensor):
            row = len(payload) // body.shape[0]
            body.shape[0] += 1
            payload += payload[:row]
        case Fault.WRONG_SIZE if isinstance(body, pb.Step):
            row = len(payload) // body.tokens
            body.tokens += 1
            payload += payload[:row]
        case Fault.WRONG_DTYPE if isinstance(body, pb.Tensor):
            body.dtype = pb.BFLOAT16 if body.dtype == pb.FLOAT32 else pb.FLOAT32
        case Fault.WRONG_SHAPE if isinstance(body, pb.Tensor):
            body.shape[:] = [1, *body.shape]
        case Fault.WRONG_SEQ if isinstance(body, pb.Tensor):
            body.seq += 1
        case _:
            raise ValueError(f"{fault.name} of a {frame.kind} frame")
    return Frame(header, payload)


class _Garbage:
    """Stands in for a header and serialises to what no protobuf parser accepts."""

    def SerializeToString(self) -> bytes:  # noqa: N802
        return b"\xff" * 23

    def WhichOneof(self, _: str) -> None:  # noqa: N802
        return None
