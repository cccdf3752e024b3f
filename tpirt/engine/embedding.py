"""The embedding: what a step begins with. Its rows are read from the model, not kept in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch

from tpirt.cancellation import begin_in_thread
from tpirt.errors import CheckpointError
from tpirt.weights.source import ModelSource

READ_TIMEOUT_S = 60.0  # no answer for so long: the disk hangs


async def embed(source: ModelSource, name: str, ids: Sequence[int]) -> torch.Tensor:
    """Look ids up in the matrix ``name``: (T, H); bfloat16 if stored so, else float32.

    The event loop waits for no disk: heartbeats go on while one hangs. A read that hangs is left
    to itself, also if the call is cancelled.

    Raises:
        CheckpointError: no such row; a read failed, or takes longer than ``READ_TIMEOUT_S``.
    """
    rows = source.gather_cached_rows(name, ids)
    if rows is None:
        reading = begin_in_thread(source.gather_rows, name, ids)
        await asyncio.wait({reading}, timeout=READ_TIMEOUT_S)
        if not reading.done():
            raise CheckpointError(
                f"{source.path}: {name}: no read has ended for {READ_TIMEOUT_S:g} s; check the disk"
            )
        rows = reading.result()
    return rows if rows.dtype is torch.bfloat16 else rows.float()
