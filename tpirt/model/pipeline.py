"""How the micro-batches of one step share a rank's compute and its blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from tpirt.sharding.blocks import Block
from tpirt.weights.layout import Weights


class WeightSource(Protocol):
    """Where blocks come from; :class:`tpirt.weights.streamer.WeightStreamer` is one."""

    blocks: Sequence[Block]

    async def acquire(self, index: int) -> Weights:
        """Wait for a block's tensors."""

    def release(self, index: int) -> None:
        """Give them back."""


class Pipeline:
    """Turns and blocks of one step's micro-batches, one or two.

    Two take turns, and the second is one stage behind the first: while one waits for a sum, the
    other computes. At the same stage, the sum of an attention, the shortest stage, would have only
    the other attention to hide behind; so it has part of an MLP. The order of stages is fixed, so
    all ranks start their sums in the same order, in however many stages their MLPs are, if there
    are two at least.

    A block is acquired once and released when the last micro-batch is done with it. At most two
    are held.
    """

    def __init__(self, weights: WeightSource, parts: int):
        self._weights = weights
        self._running = set(range(parts))
        self._ahead = 0  # stages that the first has computed and the second has not
        self._turns = [asyncio.Event() for _ in range(parts)]
        self._turns[0].set()
        self._held: dict[int, Weights] = {}
        self._users: dict[int, set[int]] = {}  # micro-batches that still need a block

    async def turn(self, part: int) -> None:
        """Wait until ``part`` may compute its next stage."""
        await self._turns[part].wait()

    def pass_turn(self, part: int) -> None:
        """End a stage of ``part``."""
        if len(self._running) == 1:
            return
        self._ahead += 1 if part == 0 else -1
        if part == 1 or self._ahead == 2:
            self._turns[part].clear()
            self._turns[1 - part].set()

    async def acquire(self, block: int) -> Weights:
        """Wait for a block's tensors, unless another micro-batch has them already."""
        if block not in self._held:
            self._held[block] = await self._weights.acquire(block)
            self._users[block] = set(self._running)
        return self._held[block]

    def release(self, part: int, block: int) -> None:
        """Note that ``part`` is done with a block."""
        users = self._users[block]
        users.discard(part)
        if not users:
            del self._held[block], self._users[block]
            self._weights.release(block)

    def finish(self, part: int) -> None:
        """Release what ``part`` holds; another one goes on without waiting for its turn."""
        self._running.discard(part)
        for block in list(self._held):
            self.release(part, block)
        for turn in self._turns:
            turn.set()
