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

    def average(self, parameters: Sequence[Tensor], figures: Sequence[float]) -> list[float]:
        """Give every member the mean of all members' gradients, and return that of the figures.

        All of it goes in one message: the members meet once per step.
        """
        if self.size == 1:
            return list(figures)
        gradients = [p.grad for p in parameters if p.grad is not None]
        parts = [gradient.flatten() for gradient in gradients] + [torch.tensor(figures)]
        flat = torch.cat(parts)
        dist.all_reduce(flat)
        means = torch.split(flat.div_(self.size), [part.numel() for part in parts])
        for gradient, mean in zip(gradients, means[:-1], strict=True):
            gradient.copy_(mean.view_as(gradient))
        return [float(mean) for mean in means[-1]]


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
