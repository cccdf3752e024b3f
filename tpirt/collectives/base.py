"""The seam between the model and how ranks combine what they computed."""

from __future__ import annotations

import asyncio
import statistics
from typing import Protocol

import torch

from tpirt.batch import DEFAULT_COLLECTIVE, Algorithm, Collective
from tpirt.collectives.comm_dtype import comm_dtype_of
from tpirt.collectives.context import StepContext
from tpirt.errors import TransportError
from tpirt.stopwatch import NETWORK, Recorder
from tpirt.transport.pb import tpirt_pb2 as pb


def algorithm_number(algorithm: Algorithm) -> pb.Algorithm:
    """An algorithm's name in the protocol."""
    return _NUMBERS[algorithm]


_NUMBERS = {
    Algorithm.STAR: pb.STAR,
    Algorithm.ONE_SHOT: pb.ONE_SHOT,
    Algorithm.TWO_SHOT: pb.TWO_SHOT,
}


def collective_of(step: pb.Step) -> Collective:
    """What a step's header asks for.

    Raises:
        TransportError: something that this version does not know.
    """
    for algorithm, number in _NUMBERS.items():
        if number == step.algorithm:
            return Collective(algorithm, comm_dtype_of(step.comm_dtype), step.halves)
    raise TransportError(f"step {step.step}: unknown algorithm {step.algorithm}")


class Communicator(Protocol):
    """One rank's membership of the tensor-parallel group.

    Every rank makes the same calls in the same order within a step and a micro-batch; one call of
    each micro-batch may be under way at a time. Sums run in rank order with float32 accumulation
    whatever the algorithm, so all ranks hold identical bits and a rerun repeats them; all
    algorithms give the same bits. ``part`` is the index of the micro-batch.
    """

    rank: int
    world_size: int

    async def broadcast(self, step: StepContext, part: int, rows: torch.Tensor) -> None:
        """Fill ``rows`` (T, H), float32 or bfloat16, with what rank 0 has there.

        Cancelled, the call leaves the group unusable. Raises as :meth:`all_reduce`.
        """

    async def all_reduce(self, step: StepContext, part: int, partial: torch.Tensor) -> torch.Tensor:
        """Sum ``partial`` (T, H), float32 or bfloat16, over ranks; every rank gets the sum (T, H).

        It comes in bfloat16 where that is the form on the wire, else in float32. ``partial`` may be
        overwritten. Cancelled, the call leaves the group unusable.

        Raises:
            PeerLostError: a rank is gone or silent beyond the deadline.
            TransportError: a message of another step, shape or dtype came; it was not summed.
            PeerError: a rank reports a failure of its own.
            StepAborted: the master gave the step up.
        """

    async def reduce(self, step: StepContext, partial: torch.Tensor) -> torch.Tensor | None:
        """As :meth:`all_reduce`, but only rank 0 gets the sum; the others return at once."""


class OrderedCommunicator(Protocol):
    """As :class:`Communicator`, but collectives are numbered by the order of calls."""

    rank: int
    world_size: int

    def begin(self, step: int, collective: Collective = DEFAULT_COLLECTIVE) -> None:
        """Start numbering the collectives of ``step``."""

    async def broadcast(self, rows: torch.Tensor) -> None:
        """See :class:`Communicator`."""

    async def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """See :class:`Communicator`."""

    async def reduce(self, partial: torch.Tensor) -> torch.Tensor | None:
        """See :class:`Communicator`."""


class SingleRankCommunicator:
    """The group of one rank: nothing to combine."""

    rank = 0
    world_size = 1

    def begin(self, step: int, collective: Collective = DEFAULT_COLLECTIVE) -> None:
        """See :class:`OrderedCommunicator`."""

    async def broadcast(self, rows: torch.Tensor) -> None:
        """See :class:`Communicator`."""

    async def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """See :class:`Communicator`."""
        return partial

    async def reduce(self, partial: torch.Tensor) -> torch.Tensor | None:
        """See :class:`Communicator`."""
        return partial


class TimedCommunicator:
    """A communicator whose time in collectives is counted and recorded.

    Attributes:
        clock: time spent in collectives: sending, waiting, summing.
    """

    def __init__(self, inner: OrderedCommunicator, recorder: Recorder):
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.clock = recorder.stopwatch(NETWORK)
        self._inner = inner
        self._took_ns: list[int] = []

    def begin(self, step: StepContext) -> None:
        """Start numbering the collectives of ``step``."""
        self._took_ns.clear()
        self._inner.begin(step.number, step.batch.collective)

    async def broadcast(self, step: StepContext, part: int, rows: torch.Tensor) -> None:
        """See :class:`Communicator`."""
        with self.clock.running("broadcast", rows.nbytes, step.number):
            await self._inner.broadcast(rows)
            await asyncio.sleep(0)  # numbers go by call: the other half's broadcast is the next

    async def all_reduce(self, step: StepContext, part: int, partial: torch.Tensor) -> torch.Tensor:
        """See :class:`Communicator`."""
        began_ns = self.clock.total_ns
        with self.clock.running("all_reduce", partial.nbytes, step.number):
            total = await self._inner.all_reduce(partial)
        self._took_ns.append(self.clock.total_ns - began_ns)
        return total

    async def reduce(self, step: StepContext, partial: torch.Tensor) -> torch.Tensor | None:
        """See :class:`Communicator`."""
        with self.clock.running("reduce", partial.nbytes, step.number):
            return await self._inner.reduce(partial)

    def median_s(self) -> float | None:
        """What an allreduce of this step took; None if there was none."""
        return statistics.median(self._took_ns) / 1e9 if self._took_ns else None
