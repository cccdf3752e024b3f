"""The seam between the model and how ranks combine what they computed."""

from __future__ import annotations

import statistics
from time import perf_counter_ns
from typing import Protocol

import torch

from tpirt.collectives.context import StepContext
from tpirt.stopwatch import NETWORK, Recorder


class Communicator(Protocol):
    """One rank's membership of the tensor-parallel group.

    Every rank makes the same calls in the same order within each micro-batch (``part``) of a step;
    calls of the two parts may overlap. Sums run in rank order with float32 accumulation whatever
    the algorithm, so all ranks hold identical bits and a rerun repeats them; all algorithms give
    the same bits.

    Over each link and in each direction, a collective sends at most one PARTIAL and then at most
    one REDUCED frame, after the frames of the part's earlier collectives. Others break the link.

    All calls raise:
        PeerLostError: a rank is gone or silent; names it.
        TransportError: a message of another step, collective, shape or dtype came; it was not
            summed.
        StepAborted, or the reason the step was aborted for.

    A cancelled or aborted call leaves the links usable: frames that were begun go out whole, and
    those that come for the step are dropped once it is over.
    """

    rank: int
    world_size: int

    async def broadcast(self, step: StepContext, part: int, rows: torch.Tensor) -> None:
        """Fill ``rows`` (T, H), float32 or bfloat16, with what rank 0 has there."""

    async def all_reduce(self, step: StepContext, part: int, partial: torch.Tensor) -> torch.Tensor:
        """Sum ``partial`` (T, H), float32 or bfloat16, over ranks; every rank gets the sum (T, H).

        The sum is bfloat16 where that is the dtype on the wire, else float32. ``partial`` may be
        overwritten.
        """

    async def reduce(self, step: StepContext, partial: torch.Tensor) -> torch.Tensor | None:
        """Sum ``partial`` for rank 0 only: (T, H) float32, not rounded.

        The others' partials are rounded to the comm dtype. They return None when theirs is sent.
        """


class SingleRankCommunicator:
    """The group of one rank: nothing to combine."""

    rank = 0
    world_size = 1

    async def broadcast(self, step: StepContext, part: int, rows: torch.Tensor) -> None:
        """See :class:`Communicator`."""

    async def all_reduce(self, step: StepContext, part: int, partial: torch.Tensor) -> torch.Tensor:
        """See :class:`Communicator`."""
        return partial

    async def reduce(self, step: StepContext, partial: torch.Tensor) -> torch.Tensor | None:
        """See :class:`Communicator`."""
        return partial


class TimedCommunicator:
    """Any communicator, with the time in its collectives counted and recorded.

    Attributes:
        clock: time spent in collectives: sending, waiting, summing. Those of two micro-batches
            overlap.
    """

    def __init__(self, inner: Communicator, recorder: Recorder):
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.clock = recorder.stopwatch(NETWORK)
        self._inner = inner
        self._took_ns: list[int] = []

    def begin(self) -> None:
        """Forget what the collectives of the last step took."""
        self._took_ns.clear()

    async def broadcast(self, step: StepContext, part: int, rows: torch.Tensor) -> None:
        """See :class:`Communicator`."""
        with self.clock.running("broadcast", rows.nbytes, step.number):
            await self._inner.broadcast(step, part, rows)

    async def all_reduce(self, step: StepContext, part: int, partial: torch.Tensor) -> torch.Tensor:
        """See :class:`Communicator`."""
        began_ns = perf_counter_ns()
        with self.clock.running("all_reduce", partial.nbytes, step.number):
            total = await self._inner.all_reduce(step, part, partial)
        self._took_ns.append(perf_counter_ns() - began_ns)
        return total

    async def reduce(self, step: StepContext, partial: torch.Tensor) -> torch.Tensor | None:
        """See :class:`Communicator`."""
        with self.clock.running("reduce", partial.nbytes, step.number):
            return await self._inner.reduce(step, partial)

    def median_s(self) -> float | None:
        """What an allreduce of this step took; None if there was none."""
        return statistics.median(self._took_ns) / 1e9 if self._took_ns else None
