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
from tpirt.errors import PeerError, PeerLostError, TpirtError, TransportError
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
        self._complete = 0  # the last step that came to its end

    def begin(self, step: int) -> None:
        """See :class:`tpirt.collectives.base.Communicator`."""
        self._step, self._seq = step, 0

    async def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """See :class:`tpirt.collectives.base.Communicator`."""
        with self.clock.running():
            total = await self._gather(partial)
            header = pb.FrameHeader(reduced=tensor_header(self._step, self._seq, total))
            await send_all(self._channels, Frame(header, tensor_bytes(total)), self._timeout_s)
            self._seq += 1
            return total

    async def reduce(self, partial: torch.Tensor) -> torch.Tensor | None:
        """See :class:`tpirt.collectives.base.Communicator`."""
        with self.clock.running():
            total = await self._gather(partial)
            self._complete = self._step
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
                if self._is_leftover(frame.header.partial.step):
                    continue
                return frame
            if frame.kind == "error":
                if self._is_leftover(frame.header.error.step):
                    continue
                raise remote_error(frame.header.error, channel.peer_id)
            raise TransportError(
                f"peer {channel.peer_id}: expected a partial of step {self._step}, "
                f"got {frame.kind}; refused"
            )

    def _is_leftover(self, step: int) -> bool:
        """Tell what a worker sent before it heard that its step was given up."""
        return self._complete < step < self._step


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
        await _send(self._channel, frame, self._timeout_s)
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
                f"peer {self._channel.peer_id}: expected the sum of step {self._step}, "
                f"got {frame.kind}; refused"
            )


async def send_all(channels: Sequence[Channel], frame: Frame, timeout_s: float) -> None:
    """Send one frame to every channel, side by side.

    All sends have ended when it returns or raises.

    Raises:
        PeerLostError: a peer is gone, or took nothing for ``timeout_s``; the first by rank.
    """
    if len(channels) == 1:
        await _send(channels[0], frame, timeout_s)
        return
    sends = (_send(channel, frame, timeout_s) for channel in channels)
    for result in await asyncio.gather(*sends, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def remote_error(error: pb.Error, peer_id: str) -> TpirtError:
    """Rebuild a peer's failure as an exception of the same class, naming the peer."""
    kind = getattr(errors, error.kind, PeerError)
    if not (isinstance(kind, type) and issubclass(kind, TpirtError)):
        kind = PeerError
    return kind(f"peer {peer_id}: {error.message}")


async def _send(channel: Channel, frame: Frame, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await channel.send(frame)
    except TimeoutError as exc:
        raise PeerLostError(
            f"peer {channel.peer_id}: took no data for {timeout_s:g} s; it hangs, or its link does"
        ) from exc


def _checked(got: pb.Tensor, frame: Frame, expected: pb.Tensor, peer_id: str) -> torch.Tensor:
    if got != expected:
        raise TransportError(
            f"peer {peer_id}: expected step {expected.step} collective {expected.seq} "
            f"{list(expected.shape)} dtype {expected.dtype}, got step {got.step} collective "
            f"{got.seq} {list(got.shape)} dtype {got.dtype}; refused"
        )
    try:
        return read_tensor(frame.payload, got.dtype, tuple(got.shape))
    except TransportError as exc:
        raise TransportError(
            f"peer {peer_id}: step {got.step} collective {got.seq}: {exc}; refused"
        ) from exc
