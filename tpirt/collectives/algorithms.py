"""The collectives, over gRPC or whatever carries frames: star, one-shot, two-shot.

All add in rank order, whatever the order of arrival: gRPC keeps what comes early. All give the
same bits: the sum, as it looks on the wire, of partials as they look on the wire. So a choice
that follows measurements does not change a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from tpirt.batch import DEFAULT_COLLECTIVE, SCALE_BLOCK, Algorithm, Collective, CommDtype
from tpirt.collectives.comm_dtype import encode, number_of, rounded
from tpirt.collectives.context import StepAborted
from tpirt.collectives.links import EAGER_BYTES, LinkSet
from tpirt.ops.buffers import tensor_bytes
from tpirt.sharding.partition import Span
from tpirt.transport.codec import Envelope, Frame

_T = TypeVar("_T")


@dataclass(slots=True)
class _Sum:
    """One collective under way: its number, the form on the wire, what this rank adds."""

    seq: int
    comm_dtype: CommDtype
    partial: torch.Tensor


class GroupCommunicator:
    """The communicator of a rank that has others; see :class:`Communicator`.

    Workers need channels among themselves for all but the star.
    """

    def __init__(self, world_size: int, links: LinkSet):
        self.rank = links.rank
        self.world_size = world_size
        self._links = links
        self._seq = 0
        self._how = DEFAULT_COLLECTIVE
        self._ready: dict[tuple[str, int], Envelope] = {}  # made while others were waited for
        self._turn = asyncio.Lock()  # of two collectives under way, the first receives first
        self._algorithms: dict[Algorithm, Callable[[_Sum], Coroutine[Any, Any, torch.Tensor]]] = {
            Algorithm.STAR: self._star_master if links.rank == 0 else self._star_worker,
            Algorithm.ONE_SHOT: self._one_shot,
            Algorithm.TWO_SHOT: self._two_shot,
        }

    def begin(self, step: int, collective: Collective = DEFAULT_COLLECTIVE) -> None:
        """See :class:`tpirt.collectives.base.Communicator`."""
        self._seq, self._how = 0, collective
        self._ready.clear()
        self._links.begin(step)

    async def broadcast(self, rows: torch.Tensor) -> None:
        """See :class:`tpirt.collectives.base.Communicator`.

        Workers with links among themselves get a share each and pass it on: the master's link
        bears the rows once, not once a worker.
        """
        job = self._next(rows, CommDtype.keeping(rows.dtype))
        if self._how.algorithm is not Algorithm.STAR and self.world_size > 2:
            await self._spread(job)
        elif self.rank == 0:
            await self._links.send(self._links.others, self._as_it_is(job, "reduced", rows))
        else:
            async with self._turn:
                rows.copy_(await self._links.receive(0, self._envelope(job, "reduced", rows)))

    async def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """See :class:`tpirt.collectives.base.Communicator`."""
        return await self._algorithms[self._how.algorithm](self._next(partial))

    async def reduce(self, partial: torch.Tensor) -> torch.Tensor | None:
        """See :class:`tpirt.collectives.base.Communicator`."""
        job = self._next(partial)
        total = None
        if self.rank == 0:
            due = self._envelope(job, "partial", partial)
            total = await self._gather(due, partial)
        else:
            payload, _ = encode(partial, job.comm_dtype)
            await self._links.send([0], self._envelope(job, "partial", partial).seal(payload))
        self._links.complete = self._links.step
        return total

    def _next(self, partial: torch.Tensor, comm_dtype: CommDtype | None = None) -> _Sum:
        self._seq += 1
        return _Sum(self._seq - 1, comm_dtype or self._how.comm_dtype, partial)

    # -- star ------------------------------------------------------------------------------

    async def _star_master(self, job: _Sum) -> torch.Tensor:
        due = self._envelope(job, "partial", job.partial)
        total = await self._gather(due, rounded(job.partial, job.comm_dtype))
        payload, total = encode(total, job.comm_dtype)
        frame = self._envelope(job, "reduced", total).seal(payload)
        await self._links.send(self._links.others, frame)
        return total

    async def _star_worker(self, job: _Sum) -> torch.Tensor:
        payload, _ = encode(job.partial, job.comm_dtype)
        sent = self._envelope(job, "partial", job.partial)
        await self._links.send([0], sent.seal(payload))
        due = self._envelope(job, "reduced", job.partial)
        self._prepare(sent, due)
        async with self._turn:
            return await self._links.receive(0, due)

    # -- one-shot ---------------------------------------------------------------------------

    async def _one_shot(self, job: _Sum) -> torch.Tensor:
        payload, own = encode(job.partial, job.comm_dtype)
        envelope = self._envelope(job, "partial", own)  # what is due is like what is sent
        frames = dict.fromkeys(self._links.others, envelope.seal(payload))
        total = await self._send_and(frames, self._gather(envelope, own))
        return rounded(total, job.comm_dtype)  # as it comes out of the others

    # -- two-shot --------------------------------------------------------------------------

    async def _two_shot(self, job: _Sum) -> torch.Tensor:
        flat = job.partial.view(-1)
        spans = _spans(len(flat), self.world_size)
        parts = [flat[span.start : span.stop] for span in spans]
        encoded = [encode(part, job.comm_dtype) for part in parts]
        frames = {
            rank: self._envelope(job, "partial", parts[rank]).seal(encoded[rank][0])
            for rank in self._links.others
        }
        own = encoded[self.rank][1]
        whole = await self._send_and(frames, self._all_gather(job, parts, own))
        return torch.cat(whole).view(job.partial.shape)

    async def _all_gather(
        self, job: _Sum, parts: Sequence[torch.Tensor], own: torch.Tensor
    ) -> list[torch.Tensor]:
        """Sum this rank's share, and exchange shares."""
        due = self._envelope(job, "partial", own)
        async with self._turn:
            payload, mine = encode(await self._summed(due, own), job.comm_dtype)
            frame = self._envelope(job, "reduced", mine).seal(payload)
            shares = self._shares(job, parts, mine)
            return await self._send_and(dict.fromkeys(self._links.others, frame), shares)

    async def _shares(
        self, job: _Sum, parts: Sequence[torch.Tensor], mine: torch.Tensor
    ) -> list[torch.Tensor]:
        return [
            mine
            if rank == self.rank
            else await self._links.receive(rank, self._envelope(job, "reduced", part))
            for rank, part in enumerate(parts)
        ]

    # -- broadcast -------------------------------------------------------------------------

    async def _spread(self, job: _Sum) -> None:
        """Scatter over the workers, and let them gather all from each other."""
        flat = job.partial.view(-1)
        spans = _spans(len(flat), self.world_size - 1)
        shares = {rank: flat[span.start : span.stop] for rank, span in enumerate(spans, start=1)}
        if self.rank == 0:
            frames = {rank: self._as_it_is(job, "partial", shares[rank]) for rank in shares}
            await self._links.send_each(frames)
            return
        async with self._turn:
            # When another worker has failed, the master hears of it behind everybody's part of the
            # first sum: so that one is still sent. What is missing here no longer matters.
            with contextlib.suppress(StepAborted):
                await self._pass_on(job, shares)

    async def _pass_on(self, job: _Sum, shares: dict[int, torch.Tensor]) -> None:
        """Take this worker's share, send it to the other workers, and take theirs."""
        mine = shares.pop(self.rank)
        mine.copy_(await self._links.receive(0, self._envelope(job, "partial", mine)))
        frame = self._as_it_is(job, "reduced", mine)
        await self._send_and(dict.fromkeys(shares, frame), self._fill(job, shares))

    def _as_it_is(self, job: _Sum, kind: str, rows: torch.Tensor) -> Frame:
        return self._envelope(job, kind, rows).seal(tensor_bytes(rows))

    async def _fill(self, job: _Sum, shares: Mapping[int, torch.Tensor]) -> None:
        for rank, share in shares.items():
            share.copy_(await self._links.receive(rank, self._envelope(job, "reduced", share)))

    # -- common ----------------------------------------------------------------------------

    async def _gather(self, due: Envelope, own: torch.Tensor) -> torch.Tensor:
        self._prepare(due)
        async with self._turn:
            return await self._summed(due, own)

    async def _summed(self, due: Envelope, own: torch.Tensor) -> torch.Tensor:
        """Add ``own`` and what every other rank sends, in rank order."""
        total: torch.Tensor | None = None
        for rank in range(self.world_size):
            value = own if rank == self.rank else await self._links.receive(rank, due)
            # What was received is this call's own to add to; the partial may be overwritten.
            total = value.float() if total is None else total.add_(value)
        assert total is not None
        return total

    def _prepare(self, *envelopes: Envelope) -> None:
        """Make the next collective's, now that there is nothing to do but wait."""
        for envelope in envelopes:
            self._ready[envelope.kind, envelope.seq + 1] = envelope.following()

    def _envelope(self, job: _Sum, kind: str, tensor: torch.Tensor) -> Envelope:
        ready = self._ready.pop((kind, job.seq), None)
        if ready is not None and ready.shape == tensor.shape:
            return ready
        nbytes = job.comm_dtype.nbytes(tensor.numel())
        return Envelope(
            kind, self._links.step, job.seq, number_of(job.comm_dtype), tensor.shape, nbytes
        )

    async def _send_and(self, frames: Mapping[int, Frame], receive: Coroutine[Any, Any, _T]) -> _T:
        """Send; and receive at the same time what is too large for buffers on the way.

        If all ranks sent before they received, none would take what the others send.
        """
        if max(len(frame.data) for frame in frames.values()) <= EAGER_BYTES:
            try:
                await self._links.send_each(frames)
            except BaseException:
                receive.close()
                raise
            return await receive
        sending = asyncio.create_task(self._links.send_each(frames))
        try:
            result = await receive
        finally:
            await asyncio.wait([sending])
        await sending
        return result


def _spans(elements: int, world_size: int) -> list[Span]:
    """Cut a flat tensor into one share per rank, in whole blocks of those that share a scale."""
    blocks = math.ceil(elements / SCALE_BLOCK)
    cuts = [min(elements, blocks * r // world_size * SCALE_BLOCK) for r in range(world_size + 1)]
    return [Span(low, high) for low, high in itertools.pairwise(cuts)]
