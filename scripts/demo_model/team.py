"""Data-parallel training with one single-threaded process per CPU core.

For products this small, processes that meet once per step use two cores better than two threads
that meet at every operator, all the more so when other programs need the cores as well.
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor


@dataclass(frozen=True)
class Team:
    """The processes of a run; rank 0 is the one that was started by hand."""

    rank: int = 0
    size: int = 1

    def sum(self, values: Tensor) -> None:
        """Add the values of all members up, in place on each of them."""
        if self.size > 1:
            dist.all_reduce(values)

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Give every member the mean of all members' gradients."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.sum(flat)
        parts = torch.split(flat.div_(self.size), [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


Job = Callable[..., Any]


@contextmanager
def assembled(size: int, job: Job, *arguments: Any) -> Iterator[Team]:
    """Start `size - 1` processes that run `job(team, *arguments)`, and be rank 0 with them.

    On leaving in good order the others are waited for; after an error they are ended.
    """
    if size == 1:
        yield Team()
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        context = mp.get_context("spawn")
        others = [
            context.Process(target=_member, args=(rank, size, meeting, job, arguments), daemon=True)
            for rank in range(1, size)
        ]
        for process in others:
            process.start()
        try:
            dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=size)
            yield Team(0, size)
            for process in others:
                process.join()
        finally:
            for process in others:
                process.terminate()
                process.join()
            if dist.is_initialized():
                dist.destroy_process_group()


def _member(rank: int, size: int, meeting: str, job: Job, arguments: tuple[Any, ...]) -> None:
    """Run the job as one of the other processes; only rank 0 ends it early."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    job(Team(rank, size), *arguments)
    dist.destroy_process_group()
