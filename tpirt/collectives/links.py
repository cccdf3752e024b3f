"""One rank's channels to the others, and what may be said on them during a step.

Whoever lies is refused: a message must be of the step, the collective, the shape and the form
that is due. What was under way when a step was given up is recognised by its number and dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping

import torch

from tpirt import errors
from tpirt.collectives.comm_dtype import comm_dtype_of, decode
from tpirt.collectives.context import StepAborted
from tpirt.errors import PeerError, PeerLostError, TpirtError, TransportError
from tpirt.transport.base import Channel
from tpirt.transport.codec import Envelope, Frame
from tpirt.transport.deadline import Deadline
from tpirt.transport.pb import tpirt_pb2 as pb

EAGER_BYTES = 33 << 10  # below every socket's buffer and every window of HTTP/2

_MOST_GIVEN_UP = 4096  # messages of older ones have long been read

Key = tuple[str, int]  # what a message is, and of which collective


class LinkSet:
    """The channels of one rank, by the rank that each leads to.

    Attributes:
        others: the ranks at the other ends, those after this one first. What goes to all is sent in
            this order: if all ranks sent to the same one first, its link would be held up while
            others lie idle.
    """

    def __init__(self, rank: int, channels: dict[int, Channel], timeout_s: float):
        self.rank = rank
        self.step = 0
        self.complete = 0  # the last step that came to its end
        self._given_up: set[int] = set()  # steps that did not
        self._over = -1  # the step of which a peer has said that it will not come to its end
        self.timeout_s = timeout_s
        self.others: list[int] = []
        self._channels: dict[int, Channel] = {}
        self._sending: dict[int, asyncio.Lock] = {}
        self._deadlines: dict[int, Deadline] = {}  # of sending
        self._early: dict[int, dict[Key, Frame]] = {}
        for other, channel in channels.items():
            self.add(other, channel)

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received over all links since :meth:`reset_traffic`."""
        channels = self._channels.values()
        return sum(c.bytes_sent for c in channels), sum(c.bytes_received for c in channels)

    def reset_traffic(self) -> None:
        """Count anew."""
        for channel in self._channels.values():
            channel.bytes_sent = channel.bytes_received = 0

    def add(self, rank: int, channel: Channel) -> None:
        """Have a link to one more rank, before any step."""
        self._channels[rank] = channel
        self.others = sorted(self._channels, key=lambda other: (other < self.rank, other))
        self._sending[rank] = asyncio.Lock()
        self._deadlines[rank] = Deadline()
        self._early[rank] = {}

    def begin(self, step: int) -> None:
        """Let go of what the last step left, and note if it did not come to its end."""
        if step == self.step:
            return
        if self.step != self.complete:
            self._given_up.add(self.step)
            if len(self._given_up) > _MOST_GIVEN_UP:
                self._given_up.remove(min(self._given_up))
        self.step = step
        for early in self._early.values():
            early.clear()

    async def send(self, ranks: Iterable[int], frame: Frame) -> None:
        """Send one frame to every one of ``ranks``; see :meth:`send_each`."""
        await self.send_each(dict.fromkeys(ranks, frame))

    async def send_each(self, frames: Mapping[int, Frame]) -> None:
        """Send every rank its frame: large ones side by side, small ones need no waiting.

        All sends have ended when it returns or raises.

        Raises:
            PeerLostError: a peer is gone, or took nothing before the deadline.
        """
        if len(frames) == 1 or all(len(frame.data) <= EAGER_BYTES for frame in frames.values()):
            lost: PeerLostError | None = None
            for rank, frame in frames.items():
                try:
                    await self._send(rank, frame)
                except PeerLostError as exc:  # the others have it all the same
                    lost = lost or exc
            if lost is not None:
                raise lost
            return
        sends = [self._send(rank, frame) for rank, frame in frames.items()]
        for result in await asyncio.gather(*sends, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def give_up(self) -> None:
        """Tell the other workers that this rank's part of the step will not come."""
        frame = Frame(pb.FrameHeader(abort=pb.Abort(step=self.step)))
        with contextlib.suppress(PeerLostError):  # the others have it all the same
            await self.send((rank for rank in self.others if rank), frame)

    def is_leftover(self, frame: Frame) -> bool:
        """Tell whether a tensor that comes between steps is of one that was given up."""
        tensor: pb.Tensor = getattr(frame.header, frame.kind)
        return tensor.step == self.step != self.complete or self._is_past(tensor.step)

    async def receive(self, rank: int, due: Envelope) -> torch.Tensor:
        """Wait for one tensor of ``rank``.

        Raises:
            PeerLostError: it is gone or silent beyond the deadline.
            TransportError: something else came; names it.
            StepAborted: the step was given up.
            TpirtError: the peer reports a failure of its own.
        """
        if self._over == self.step:  # one of two collectives under way has heard it for both
            raise StepAborted
        frame = self._early[rank].pop((due.kind, due.seq), None)
        payload = None if frame is None else self._open(rank, frame, due)
        while payload is None:
            payload = await self._next(rank, due)
        return decode(payload, comm_dtype_of(due.dtype), due.shape)

    async def _next(self, rank: int, due: Envelope) -> memoryview | None:
        """Read one frame; None if it is not for now."""
        try:
            frame = await self._channels[rank].recv(self.timeout_s)
        except PeerLostError as exc:
            exc.rank = rank
            raise
        payload = due.open(frame)
        return self._other(rank, frame, due) if payload is None else payload

    def _other(self, rank: int, frame: Frame, due: Envelope) -> memoryview | None:
        """See what came instead of what is due: None if it may come."""
        kind = frame.kind
        peer = self._channels[rank].peer_id
        if kind in ("partial", "reduced"):
            tensor: pb.Tensor = getattr(frame.header, kind)
            if self._is_past(tensor.step):
                return None
            if kind == due.kind:
                return self._open(rank, frame, due)
            # Two collectives may be under way: of the second, the first phase can be early.
            following = (tensor.step, tensor.seq) == (self.step, due.seq + 1)
            if due.kind == "reduced" and following:
                self._early[rank][kind, tensor.seq] = frame
                return None
        elif kind == "error":
            if self._is_past(frame.header.error.step):
                return None
            self._over = self.step
            raise remote_error(frame.header.error, peer)
        elif kind == "abort":
            if frame.header.abort.step < self.step:
                return None
            self._over = self.step
            raise StepAborted
        raise TransportError(
            f"peer {peer}: expected a {due.kind} of step {self.step}, got {kind}; refused"
        )

    def _open(self, rank: int, frame: Frame, due: Envelope) -> memoryview:
        """Take the payload of a tensor that must be the one that is due."""
        payload = due.open(frame)
        if payload is not None:
            return payload
        peer, got = self._channels[rank].peer_id, getattr(frame.header, due.kind)
        if got == due.tensor:
            if len(frame.payload) == due.nbytes:  # another writer's order of fields
                return memoryview(frame.payload)
            raise TransportError(
                f"peer {peer}: step {got.step} collective {got.seq}: expected {due.nbytes} bytes, "
                f"got {len(frame.payload)}; refused"
            )
        raise TransportError(
            f"peer {peer}: expected step {due.step} collective {due.seq} "
            f"{list(due.shape)} dtype {due.dtype}, got step {got.step} collective "
            f"{got.seq} {list(got.shape)} dtype {got.dtype}; refused"
        )

    def _is_past(self, step: int) -> bool:
        """Tell what was sent before its sender heard that the step was given up.

        It may come steps later: links that the steps between had no use for are not read.
        """
        return step in self._given_up

    async def _send(self, rank: int, frame: Frame) -> None:
        channel = self._channels[rank]
        try:
            async with self._sending[rank]:
                await self._deadlines[rank].wait(channel.send(frame), self.timeout_s)
        except TimeoutError as exc:
            lost = PeerLostError(
                f"peer {channel.peer_id}: took no data for {self.timeout_s:g} s; it hangs, or its "
                "link does"
            )
            lost.rank = rank
            raise lost from exc
        except PeerLostError as exc:
            exc.rank = rank
            raise


def remote_error(error: pb.Error, peer_id: str) -> TpirtError:
    """Rebuild a peer's failure as an exception of the same class, naming the peer."""
    kind = getattr(errors, error.kind, PeerError)
    if not (isinstance(kind, type) and issubclass(kind, TpirtError)):
        kind = PeerError
    return kind(f"peer {peer_id}: {error.message}")
