"""Schedules the micro-batches of one step on a rank's compute and blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from tpirt.collectives.context import StepContext
from tpirt.sharding.blocks import Block
from tpirt.weights.layout import Weights


class WeightSource(Protocol):
    """A source of blocks, such as :class:`tpirt.weights.streamer.WeightStreamer`."""

    blocks: Sequence[Block]

    def take(self, index: int) -> Weights | None:
        """Return a block's tensors if it is resident and loaded, else None."""

    async def acquire(self, index: int) -> Weights:
        """Wait for a block's tensors. If cancelled, the block is not held."""

    def release(self, index: int) -> None:
        """Give a block back."""


class Pipeline:
    """Turns and blocks of one step's micro-batches, one or two.

    Two micro-batches take turns, the second one stage behind the first: while one waits for a sum,
    the other computes. If both were at the same stage, an attention's sum would have only the
    other attention to hide behind, the shortest stage; this way it has part of an MLP. The order
    of stages is fixed, so all ranks start their sums in the same order, for any number of MLP
    stages from two on.

    A block is acquired once and released when the last micro-batch is done with it. At most two
    are held.
    """

    def __init__(self, weights: WeightSource, step: StepContext, parts: int):
        self._weights = weights
        self._step = step
        self._running = set(range(parts))
        self._ahead = 0  # stages computed by the first only
        self._turns = [asyncio.Event() for _ in range(parts)]
        self._turns[0].set()
        self._held: dict[int, Weights] = {}
        self._users: dict[int, set[int]] = {}  # micro-batches that still need a block

    async def enter(self, part: int, block: int) -> Weights:
        """Begin ``part``'s next stage: wait for its turn and its block.

        If cancelled, the micro-batch must :meth:`finish`, which frees its blocks.

        Raises:
            Exception: why the step was aborted.
            StoreError: the block could not be read.
        """
        if not self._turns[part].is_set():
            await self._turns[part].wait()
        self._step.check()
        if block not in self._held:
            weights = self._weights.take(block)
            if weights is None:  # a disk may hang: an aborted step does not wait for it
                await self._step.run(self._acquire(block))
            else:
                self._hold(block, weights)
        return self._held[block]

    def leave(self, part: int, block: int, *, keep: bool) -> None:
        """End a stage; ``keep`` the block if ``part``'s next stage uses it too."""
        if not keep:
            self._release(part, block)
        if len(self._running) == 1:
            return
        self._ahead += 1 if part == 0 else -1
        if part == 1 or self._ahead == 2:
            self._turns[part].clear()
            self._turns[1 - part].set()

    def finish(self, part: int) -> None:
        """Release ``part``'s blocks; the other micro-batch no longer waits for turns."""
        self._running.discard(part)
        for block in list(self._held):
            self._release(part, block)
        for turn in self._turns:
            turn.set()

    async def _acquire(self, block: int) -> None:
        """Hold a block as soon as it comes; ``enter`` may be cancelled before it hears of it."""
        self._hold(block, await self._weights.acquire(block))

    def _hold(self, block: int, weights: Weights) -> None:
        self._held[block] = weights
        self._users[block] = set(self._running)

    def _release(self, part: int, block: int) -> None:
        users = self._users[block]
        users.discard(part)
        if not users:
            del self._held[block], self._users[block]
            self._weights.release(block)
