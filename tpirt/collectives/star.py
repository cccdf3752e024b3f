"""Star allreduce: workers send partials to the master, which sums and sends the sum back.

Two hops and 2 (R - 1) T H 4 bytes per allreduce in total, the least of all algorithms; the
master's link carries all of it (TPI-LLM, arXiv 2410.00531, section 3.2).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch

from tpirt import errors
from tpirt.collectives.base import StepAborted
from tpirt.errors import PeerError, TpirtError, TransportError
from tpirt.ops.buffers import tensor_bytes
from tpirt.stopwatch import Stopwatch
from tpirt.transport.base import Channel
from tpirt.transport.codec import Frame, read_tensor, tensor_header
from tpirt.transport.pb import tpirt_pb2 as pb


class StarMaster:
    """Rank 0 of the star; ``channels[i]`` leads to rank ``i + 1``."""

    rank = 0

    def __init__(self, channels: Sequence[Channel], timeout_s: float):
        self.world_size = len(channels) + 1
        self.clock = Stopwatch()
        self._channels = channels
        self._timeout_s = timeout_s
        self._step = 0
        self._seq = 0

    def begin(self, step: int) -> None:
        """See :class:`tpirt.collectives.base.Communicator`."""
        self._step, self._seq = step, 0

    async def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """See :class:`tpirt.collectives.base.Communicator`."""
        with self.clock.running():
            total = await self._gather(partial)
            header = pb.FrameHeader(reduced=tensor_header(self._step, self._seq, total))
            await send_all(self._channels, Frame(header, tensor_bytes(total)))
            self._seq += 1
            return total

    async def reduce(self, partial: torch.Tensor) -> torch.Tensor | None:
        """See :class:`tpirt.collectives.base.Communicator`."""
        with self.clock.running():
            total = await self._gather(partial)
            self._seq += 1
            return total

    async def _gather(self, total: torch.Tensor) -> torch.Tensor:
        # Rank order, not arrival order: gRPC keeps what comes early until its turn.
        expected = tensor_header(self._step, self._seq, total)
        for channel in self._channels:
            frame = await self._partial_from(channel)
            total += _checked(frame.header.partial, frame, expected, channel.peer_id)
        return total

    async def _partial_from(self, channel: Channel) -> Frame:
        while True:
            frame = await channel.recv(self._timeout_s)
            if frame.kind == "partial":
                # What a worker had sent before it heard that its step was given up.
                if frame.header.partial.step < self._step:
                    continue
                return frame
            if frame.kind == "error":
                if frame.header.error.step < self._step:
                    continue
                raise remote_error(frame.header.error, channel.peer_id)
            raise TransportError(
                f"{channel.peer_id}: expected a partial of step {self._step}, got {frame.kind}"
            )


class StarWorker:
    """Any other rank of the star; ``channel`` leads to the master."""

    def __init__(self, rank: int, world_size: int, channel: Channel, timeout_s: float):
        self.rank = rank
        self.world_size = world_size
        self.clock = Stopwatch()
        self._channel = channel
        self._timeout_s = timeout_s
        self._step = 0
        self._seq = 0

    def begin(self, step: int) -> None:
        """See :class:`tpirt.collectives.base.Communicator`."""
        self._step, self._seq = step, 0

    async def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """See :class:`tpirt.collectives.base.Communicator`."""
        with self.clock.running():
            header = await self._send(partial)
            frame = await self._reduced()
            return _checked(frame.header.reduced, frame, header, self._channel.peer_id)

    async def reduce(self, partial: torch.Tensor) -> torch.Tensor | None:
        """See :class:`tpirt.collectives.base.Communicator`."""
        with self.clock.running():
            await self._send(partial)
            return None

    async def _send(self, partial: torch.Tensor) -> pb.Tensor:
        header = tensor_header(self._step, self._seq, partial)
        frame = Frame(pb.FrameHeader(partial=header), tensor_bytes(partial))
        await self._channel.send(frame)
        self._seq += 1
        return header

    async def _reduced(self) -> Frame:
        while True:
            frame = await self._channel.recv(self._timeout_s)
            if frame.kind == "reduced":
                return frame
            if frame.kind == "abort":
                if frame.header.abort.step < self._step:
                    continue
                raise StepAborted
            raise TransportError(
                f"{self._channel.peer_id}: expected the sum of step {self._step}, got {frame.kind}"
            )


async def send_all(channels: Sequence[Channel], frame: Frame) -> None:
    """Send one frame to every channel, side by side.

    All sends have ended when it returns or raises.
    """
    if len(channels) == 1:
        await channels[0].send(frame)
        return
    results = await asyncio.gather(*(c.send(frame) for c in channels), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


def remote_error(error: pb.Error, peer_id: str) -> TpirtError:
    """Rebuild a peer's failure as an exception of the same class, naming the peer."""
    kind = getattr(errors, error.kind, PeerError)
    if not (isinstance(kind, type) and issubclass(kind, TpirtError)):
        kind = PeerError
    return kind(f"peer {peer_id}: {error.message}")


def _checked(got: pb.Tensor, frame: Frame, expected: pb.Tensor, peer_id: str) -> torch.Tensor:
    if got != expected:
        raise TransportError(
            f"{peer_id}: expected step {expected.step} collective {expected.seq} "
            f"{list(expected.shape)} dtype {expected.dtype}, got step {got.step} collective "
            f"{got.seq} {list(got.shape)} dtype {got.dtype}; refused"
        )
    try:
        return read_tensor(frame.payload, got.dtype, tuple(got.shape))
    except TransportError as exc:
        raise TransportError(f"{peer_id}: step {got.step} collective {got.seq}: {exc}") from exc
