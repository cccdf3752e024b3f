"""The seam between the model and how ranks combine what they computed."""

from __future__ import annotations

from typing import Protocol

import torch

from tpirt.stopwatch import Stopwatch


class StepAborted(Exception):  # noqa: N818 - it is no error
    """The step was given up on the master's wish; not an error, and not a user's to see."""


class Communicator(Protocol):
    """One rank's membership of the tensor-parallel group.

    Every rank makes the same calls in the same order within a step. Sums run in rank order with
    float32 accumulation, so all ranks hold identical bits and a rerun repeats them.
    """

    rank: int
    world_size: int
    clock: Stopwatch

    def begin(self, step: int) -> None:
        """Start numbering the collectives of ``step``."""

    async def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum ``partial`` (T, H) float32 over ranks; every rank gets the sum (T, H).

        ``partial`` may be overwritten. Cancelled, it leaves the group unusable.

        Raises:
            PeerLostError: a rank is gone or silent beyond the deadline.
            TransportError: a message of another step, shape or dtype came; it was not summed.
            PeerError: a rank reports a failure of its own.
            StepAborted: the master gave the step up.
        """

    async def reduce(self, partial: torch.Tensor) -> torch.Tensor | None:
        """As :meth:`all_reduce`, but only rank 0 gets the sum; the others return at once."""


class Solo:
    """The group of one rank: nothing to combine."""

    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self.clock = Stopwatch()

    def begin(self, step: int) -> None:
        """See :class:`Communicator`."""

    async def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """See :class:`Communicator`."""
        return partial

    async def reduce(self, partial: torch.Tensor) -> torch.Tensor | None:
        """See :class:`Communicator`."""
        return partial
