"""The collectives over links: star, one-shot, two-shot; broadcast and reduce.

Partials are added in rank order, independent of the order of arrival. All algorithms give the same
bits: partials are rounded to the comm dtype, and so is their sum (except a step's last sum, which
only rank 0 gets). So the choice of an algorithm by measurements does not change results. A row is
rounded by itself: nor do the other rows of a step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tpirt.batch import SCALE_BLOCK, Algorithm, CommDtype
from tpirt.collectives.context import StepContext
from tpirt.collectives.links import LinkSet
from tpirt.ops.buffers import tensor_bytes
from tpirt.protocol.tensors import encode, rounded, tensor_head, values
from tpirt.sharding.partition import Span
from tpirt.transport.frame import Frame, Kind

PARTIAL, REDUCED = Kind.PARTIAL, Kind.REDUCED


@dataclass(slots=True)
class _Sum:
    """A running collective: its number, its comm dtype, and this rank's partial."""

    step: StepContext
    seq: int
    dtype: CommDtype
    partial: torch.Tensor

    def frame(self, kind: Kind, tensor: torch.Tensor, payload: memoryview) -> Frame:
        """The frame of one of its tensors."""
        head = tensor_head(kind, self.step.number, self.seq, self.dtype, tensor.shape)
        return Frame(head, b"", payload)

    def as_is(self, kind: Kind, tensor: torch.Tensor) -> Frame:
        """The frame of a tensor in its own dtype."""
        return self.frame(kind, tensor, tensor_bytes(tensor))


class GroupCommunicator:
    """The communicator of two or more ranks; see :class:`Communicator`.

    All algorithms but star need links between workers.
    """

    def __init__(self, world_size: int, links: LinkSet):
        self.rank = links.rank
        self.world_size = world_size
        self._links = links
        self._algorithms: dict[Algorithm, Callable[[_Sum], Coroutine[Any, Any, torch.Tensor]]] = {
            Algorithm.STAR: self._star_master if links.rank == 0 else self._star_worker,
            Algorithm.ONE_SHOT: self._one_shot,
            Algorithm.TWO_SHOT: self._two_shot,
        }

    async def broadcast(self, step: StepContext, part: int, rows: torch.Tensor) -> None:
        """See :class:`Communicator`.

        Workers with links between them get a share each and pass it on, so that the master's link
        carries the rows once, not once per worker.
        """
        job = _Sum(step, step.next_seq(part), CommDtype.keeping(rows.dtype), rows)
        if step.batch.collective.algorithm is not Algorithm.STAR and self.world_size > 2:
            await self._scatter_gather(job)
        elif self.rank == 0:
            frame = job.as_is(REDUCED, rows)
            await self._links.send(step, dict.fromkeys(self._links.others, frame))
        else:
            rows.copy_(await self._receive(job, 0, REDUCED, rows))

    async def all_reduce(self, step: StepContext, part: int, partial: torch.Tensor) -> torch.Tensor:
        """See :class:`Communicator`."""
        collective = step.batch.collective
        job = _Sum(step, step.next_seq(part), collective.comm_dtype, partial)
        return await self._algorithms[collective.algorithm](job)

    async def reduce(self, step: StepContext, partial: torch.Tensor) -> torch.Tensor | None:
        """See :class:`Communicator`."""
        job = _Sum(step, step.next_seq(0), step.batch.collective.comm_dtype, partial)
        if self.rank == 0:
            return await self._sum(job, partial)
        payload, own = encode(partial, job.dtype)
        await self._links.send(step, {0: job.frame(PARTIAL, own, payload)})
        return None

    # -- star ------------------------------------------------------------------------------

    async def _star_master(self, job: _Sum) -> torch.Tensor:
        total = await self._sum(job, rounded(job.partial, job.dtype))
        payload, total = encode(total, job.dtype)
        frame = job.frame(REDUCED, total, payload)
        await self._links.send(job.step, dict.fromkeys(self._links.others, frame))
        return total

    async def _star_worker(self, job: _Sum) -> torch.Tensor:
        payload, own = encode(job.partial, job.dtype)
        await self._links.send(job.step, {0: job.frame(PARTIAL, own, payload)})
        return await self._receive(job, 0, REDUCED, own)

    # -- one-shot --------------------------------------------------------------------------

    async def _one_shot(self, job: _Sum) -> torch.Tensor:
        payload, own = encode(job.partial, job.dtype)
        frames = dict.fromkeys(self._links.others, job.frame(PARTIAL, own, payload))
        total = await self._links.exchange(job.step, frames, self._sum(job, own))
        return rounded(total, job.dtype)  # as two-shot and star send it

    # -- two-shot --------------------------------------------------------------------------

    async def _two_shot(self, job: _Sum) -> torch.Tensor:
        parts = _shares(job.partial, self.world_size)
        encoded = [encode(part, job.dtype) for part in parts]
        frames = {
            rank: job.frame(PARTIAL, parts[rank], encoded[rank][0]) for rank in self._links.others
        }
        gathered = self._all_gather(job, parts, encoded[self.rank][1])
        whole = await self._links.exchange(job.step, frames, gathered)
        return torch.cat(whole).view(job.partial.shape)

    async def _all_gather(
        self, job: _Sum, parts: Sequence[torch.Tensor], own: torch.Tensor
    ) -> list[torch.Tensor]:
        """Sum this rank's share, and exchange shares."""
        payload, mine = encode(await self._sum(job, own), job.dtype)
        frames = dict.fromkeys(self._links.others, job.frame(REDUCED, mine, payload))
        return await self._links.exchange(job.step, frames, self._sums_of(job, parts, mine))

    async def _sums_of(
        self, job: _Sum, parts: Sequence[torch.Tensor], mine: torch.Tensor
    ) -> list[torch.Tensor]:
        return [
            mine if rank == self.rank else await self._receive(job, rank, REDUCED, part)
            for rank, part in enumerate(parts)
        ]

    # -- broadcast -------------------------------------------------------------------------

    async def _scatter_gather(self, job: _Sum) -> None:
        """Scatter over the workers, which then gather from each other."""
        shares = dict(enumerate(_shares(job.partial, self.world_size - 1), start=1))
        if self.rank == 0:
            frames = {rank: job.as_is(PARTIAL, share) for rank, share in shares.items()}
            await self._links.send(job.step, frames)
            return
        mine = shares.pop(self.rank)
        mine.copy_(await self._receive(job, 0, PARTIAL, mine))
        frames = dict.fromkeys(shares, job.as_is(REDUCED, mine))
        await self._links.exchange(job.step, frames, self._fill(job, shares))

    async def _fill(self, job: _Sum, shares: Mapping[int, torch.Tensor]) -> None:
        for rank, share in shares.items():
            share.copy_(await self._receive(job, rank, REDUCED, share))

    # -- common ----------------------------------------------------------------------------

    async def _sum(self, job: _Sum, own: torch.Tensor) -> torch.Tensor:
        """Add ``own`` and the partials of all other ranks, in rank order, in float32.

        Everything that can be is done before the wait; then numpy adds: on cold caches an operation
        of torch takes some 50 us, one of numpy a fifth of that.
        """
        memory = np.empty(own.shape, np.float32)
        total, mine = torch.from_numpy(memory), own.float().numpy()
        so_far: np.ndarray | None = None
        for rank in range(self.world_size):
            value = mine if rank == self.rank else await self._values(job, rank, own)
            so_far = value if so_far is None else _add(so_far, value, memory)
        return total

    async def _values(self, job: _Sum, rank: int, own: torch.Tensor) -> np.ndarray:
        payload = await self._links.payload(job.step, rank, PARTIAL, job.seq, job.dtype, own.shape)
        return values(payload, job.dtype, own.shape)

    async def _receive(self, job: _Sum, rank: int, kind: Kind, like: torch.Tensor) -> torch.Tensor:
        return await self._links.receive(job.step, rank, kind, job.seq, job.dtype, like.shape)


def _add(first: np.ndarray, second: np.ndarray, into: np.ndarray) -> np.ndarray:
    """Add as torch does: a model may overflow, of which numpy would warn the user."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.add(first, second, out=into)
    return into


def _shares(tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Cut (T, H) into one share per rank, at blocks that share a scale.

    Flattened, if every row begins with a block there; else whole rows.
    """
    rows, columns = tensor.shape
    if rows > 1 and columns % SCALE_BLOCK:
        return [tensor[span.start : span.stop] for span in _spans(rows, count, 1)]
    flat = tensor.view(-1)
    return [flat[span.start : span.stop] for span in _spans(len(flat), count, SCALE_BLOCK)]


def _spans(length: int, count: int, unit: int) -> list[Span]:
    units = math.ceil(length / unit)
    cuts = [min(length, units * r // count * unit) for r in range(count + 1)]
    return [Span(low, high) for low, high in itertools.pairwise(cuts)]
