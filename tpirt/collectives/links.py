"""The links of one rank, for its collectives."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import torch

from tpirt.batch import CommDtype
from tpirt.collectives.context import StepContext
from tpirt.errors import TpirtError
from tpirt.protocol.link import Link
from tpirt.protocol.tensors import decode, tensor_head
from tpirt.transport.frame import Frame, Kind

# Smaller than socket buffers and HTTP/2 windows: sends do not wait for the reader.
EAGER_BYTES = 33 << 10

_T = TypeVar("_T")


class LinkSet:
    """The links of one rank, by the rank at the other end.

    Attributes:
        rank: this rank.
        others: the ranks at the other ends, from the next rank on. Staggered sends: if every rank
            began with rank 0, its link would be the bottleneck.
    """

    def __init__(self, rank: int):
        self.rank = rank
        self.others: list[int] = []
        self._links: dict[int, Link] = {}

    def __getitem__(self, rank: int) -> Link:
        return self._links[rank]

    def add(self, link: Link) -> None:
        """Add a link; between steps only."""
        self._links[link.rank] = link
        self.others = sorted(self._links, key=lambda other: (other < self.rank, other))

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received over all links so far."""
        channels = [link.channel for link in self._links.values()]
        return sum(c.bytes_sent for c in channels), sum(c.bytes_received for c in channels)

    def begin(self, step: StepContext) -> None:
        """Expect the tensors of a step; its abort wakes everyone who waits for one."""
        parts = len(step.batch.micro_batches())
        for link in self._links.values():
            link.begin(step.number, parts)
        step.on_abort(self._wake)

    def skip(self, number: int) -> None:
        """Record a step that was aborted before it arrived."""
        for link in self._links.values():
            link.skip(number)

    def end(self, *, completed: bool) -> None:
        """End the current step; its tensors are dropped from now on if it was aborted."""
        for link in self._links.values():
            link.end(completed=completed)

    async def send(self, step: StepContext, frames: Mapping[int, Frame]) -> None:
        """Send every rank its frame: large ones concurrently, small ones in turn.

        If cancelled or aborted, every started frame is still sent whole.

        Raises:
            PeerLostError: a rank is gone.
            StepAborted: the step was aborted.
        """
        if _small(frames):
            lost: TpirtError | None = None
            for rank, frame in frames.items():
                try:
                    await self._links[rank].send(frame)
                except TpirtError as exc:  # still send to the others
                    lost = lost or exc
            if lost is not None:
                raise lost
            return
        await step.run(_all(self._links[rank].send(frame) for rank, frame in frames.items()))

    async def exchange(
        self, step: StepContext, frames: Mapping[int, Frame], receive: Coroutine[Any, Any, _T]
    ) -> _T:
        """Send frames, then receive; concurrently if large. Returns the result of ``receive``.

        If cancelled, frames that were begun are still sent whole, and ``receive`` has ended.
        """
        if _small(frames):
            try:
                await self.send(step, frames)
            except BaseException:
                receive.close()
                raise
            return await receive
        sending = asyncio.ensure_future(self.send(step, frames))
        try:
            result = await receive
            await sending
        except BaseException:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            raise
        return result

    async def receive(
        self,
        step: StepContext,
        rank: int,
        kind: Kind,
        seq: int,
        dtype: CommDtype,
        shape: torch.Size | tuple[int, ...],
    ) -> torch.Tensor:
        """Wait for one tensor of ``rank``. Cancelled or failed, as :meth:`payload`."""
        return decode(await self.payload(step, rank, kind, seq, dtype, shape), dtype, shape)

    async def payload(
        self,
        step: StepContext,
        rank: int,
        kind: Kind,
        seq: int,
        dtype: CommDtype,
        shape: torch.Size | tuple[int, ...],
    ) -> memoryview | bytes:
        """Wait for the payload of one tensor of ``rank``. If cancelled, the next call gets it.

        Raises:
            PeerLostError: the rank is gone or silent.
            TransportError: another frame came.
            StepAborted: the step was aborted.
        """
        step.check()
        head = tensor_head(kind, step.number, seq, dtype, shape)
        return await self._links[rank].expect(seq % 2, head)

    def lost(self) -> tuple[int, TpirtError] | None:
        """A rank whose link is lost, and the reason; None if there is none."""
        for rank, link in self._links.items():
            if link.lost is not None:
                return rank, link.lost
        return None

    async def aclose(self) -> None:
        """Close all links."""
        await asyncio.gather(*(link.aclose() for link in self._links.values()))

    def _wake(self, reason: Exception) -> None:
        for link in self._links.values():
            link.wake(reason)


def _small(frames: Mapping[int, Frame]) -> bool:
    return all(frame.nbytes <= EAGER_BYTES for frame in frames.values())


async def _all(sends: Any) -> None:
    """Await all; raise the first failure after all have ended."""
    results = await asyncio.gather(*sends, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
