"""The window: whatever the consumer does, right bytes, never more than the budget, no deadlock."""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpirt.errors import MemoryLimitError
from tpirt.sharding.blocks import Block
from tpirt.testing.slices import counting_slice
from tpirt.types import ignore_progress
from tpirt.weights import streamer as module
from tpirt.weights.reader import buffer_bytes
from tpirt.weights.store import StoredSlice
from tpirt.weights.stream_plan import plan_streaming
from tpirt.weights.streamer import WeightStreamer

SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=20)


# -- the plan ----------------------------------------------------------------------------------


@given(sizes=SIZES, share=st.floats(0, 1.2), max_blocks=st.none() | st.integers(1, 25))
@settings(max_examples=300)
def test_plan_stays_within_its_bounds(
    sizes: list[int], share: float, max_blocks: int | None
) -> None:
    budget = int(share * sum(sizes))
    fits_all = sum(sizes) <= budget and (max_blocks is None or max_blocks >= len(sizes))
    fits_two = 2 * max(sizes) <= budget and (max_blocks is None or max_blocks >= 2)
    if max_blocks is not None and max_blocks >= len(sizes):
        fits_two = 2 * max(sizes) <= budget
    if not fits_all and not fits_two:
        with pytest.raises(MemoryLimitError):
            plan_streaming(sizes, max_blocks, budget)
        return
    plan = plan_streaming(sizes, max_blocks, budget)
    resident = sum(sizes[i] for i in plan.resident)
    assert resident + plan.slots * plan.slot_bytes <= budget
    if len(plan.resident) < len(sizes):
        assert plan.slots >= 2
        assert plan.slot_bytes >= max(s for i, s in enumerate(sizes) if i not in plan.resident)
    if max_blocks is not None:
        assert len(plan.resident) + plan.slots <= max(max_blocks, 0) or fits_all


@given(sizes=SIZES, budgets=st.lists(st.integers(0, 25_000), min_size=2, max_size=12))
@settings(max_examples=300)
def test_smaller_budget_pins_a_subset(sizes: list[int], budgets: list[int]) -> None:
    plans = []
    for budget in sorted(budgets):
        try:
            plans.append(plan_streaming(sizes, None, budget))
        except MemoryLimitError:
            assert not plans  # what fitted less fits more
    for smaller, larger in pairwise(plans):
        assert smaller.resident <= larger.resident


@given(sizes=SIZES, max_blocks=st.integers(2, 25))
def test_block_bound_alone(sizes: list[int], max_blocks: int) -> None:
    plan = plan_streaming(sizes, max_blocks)
    assert len(plan.resident) + plan.slots <= max(max_blocks, len(plan.resident))
    assert plan.slots == (0 if max_blocks >= len(sizes) else max_blocks)


# -- the window --------------------------------------------------------------------------------


class Buffers:
    """Stands in for ``page_buffer`` and knows how many bytes of them live."""

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self._lock = threading.RLock()

    def make(self, nbytes: int) -> torch.Tensor:
        memory = mmap.mmap(-1, max(1, nbytes))
        weakref.finalize(memory, self._freed, nbytes)
        with self._lock:
            self.live += nbytes
            self.peak = max(self.peak, self.live)
        return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]

    def _freed(self, nbytes: int) -> None:
        with self._lock:
            self.live -= nbytes

    def forget_peak(self) -> None:
        with self._lock:  # a reader may be taking its next buffer
            self.peak = self.live


COUNTS = st.lists(st.integers(1, 3000), min_size=1, max_size=9)
SHARES = st.sampled_from([0, 1, 20, 50, 80, 99, 100, 130])  # percent of all beyond the least
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("next"), st.integers(1, 12)),
        st.tuples(st.just("skip"), st.integers(1, 5)),
        st.tuples(st.just("restart"), st.just(0)),
        st.tuples(st.just("again"), st.just(0)),
        st.tuples(st.just("give_up"), st.just(0)),
        st.tuples(st.just("jam"), st.integers(1, 4)),
        st.tuples(st.just("yield"), st.just(0)),
        st.tuples(st.just("budget"), SHARES),
        st.tuples(st.just("budget"), SHARES),
    ),
    min_size=2,
    max_size=14,
)


@given(counts=COUNTS, actions=ACTIONS, percent=SHARES, preload=st.booleans())
@settings(max_examples=200)
def test_random_use(
    tmp_path_factory: pytest.TempPathFactory,
    counts: list[int],
    actions: list[tuple[str, int]],
    percent: int,
    preload: bool,
) -> None:
    stored, blocks = counting_slice(tmp_path_factory.mktemp("slice"), counts)
    asyncio.run(asyncio.wait_for(use(stored, blocks, actions, percent, preload), 10))


async def use(
    stored: StoredSlice,
    blocks: list[Block],
    actions: list[tuple[str, int]],
    percent: int,
    preload: bool,
) -> None:
    sizes = [buffer_bytes(file.nbytes) for file in stored.manifest.blocks]
    least = min(sum(sizes), 2 * max(sizes))

    def budget_of(percent: int) -> int:
        return least + (sum(sizes) - least) * percent // 100

    buffers = Buffers()
    gate = threading.Event()
    gate.set()
    read = os.preadv

    def gated(*args: Any) -> int:
        gate.wait()
        return read(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", gated)
        patch.setattr(module, "page_buffer", buffers.make)
        budget = budget_of(percent)
        window = WeightStreamer(stored, blocks, budget_bytes=budget)
        try:
            if preload:
                await window.preload(ignore_progress)
            index = 0
            for action, value in actions:
                match action:
                    case "next":
                        for _ in range(value):
                            await visit(window, index)
                            index = (index + 1) % len(blocks)
                    case "skip":
                        index = (index + value) % len(blocks)
                    case "restart":
                        index = 0
                    case "again":
                        await visit(window, index)
                    case "give_up":
                        await give_up(window, index)
                    case "jam":  # the disk is slower than the consumer changes its mind
                        gate.clear()
                        for _ in range(value):
                            await give_up(window, index)
                            index = (index + 2) % len(blocks)
                        gate.set()
                    case "yield":
                        await asyncio.sleep(0)
                    case "budget":
                        before, budget = budget, budget_of(value)
                        await window.set_budget(budget)
                        assert buffers.peak <= max(before, budget)
                        buffers.forget_peak()
                assert window.held_bytes <= budget
                assert buffers.peak <= budget
        finally:
            gate.set()
            await window.aclose()


async def visit(window: WeightStreamer, index: int) -> None:
    tensors = await window.acquire(index)
    await asyncio.sleep(0)  # let reading go on while the block is in use
    values = tensors["t"]
    assert values.shape == window.blocks[index].tensors[0].shape
    assert bool((values == index).all())
    window.release(index)


async def give_up(window: WeightStreamer, index: int) -> None:
    """Begin to acquire and be cancelled, as an aborted step does."""
    task = asyncio.ensure_future(window.acquire(index))
    await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait({task})
    if not task.cancelled() and done:
        task.result()
        window.release(index)


@given(counts=COUNTS, rounds=st.integers(1, 3), preload=st.booleans())
@settings(max_examples=30)
def test_resident_reads_nothing_twice(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], rounds: int, preload: bool
) -> None:
    stored, blocks = counting_slice(tmp_path_factory.mktemp("slice"), counts)

    async def run() -> None:
        window = WeightStreamer(stored, blocks)
        try:
            if preload:
                await window.preload(ignore_progress)
            for _ in range(rounds):
                for index in range(len(blocks)):
                    await visit(window, index)
            assert window.bytes_read == sum(file.nbytes for file in stored.manifest.blocks)
        finally:
            await window.aclose()

    asyncio.run(asyncio.wait_for(run(), 30))


@given(counts=COUNTS, rounds=st.integers(1, 4), max_blocks=st.integers(2, 5))
@settings(max_examples=40)
def test_streaming_in_order_reads_each_block_once_a_step(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], rounds: int, max_blocks: int
) -> None:
    stored, blocks = counting_slice(tmp_path_factory.mktemp("slice"), counts)

    async def run() -> None:
        window = WeightStreamer(stored, blocks, max_blocks=max_blocks)
        try:
            for _ in range(rounds):
                for index in range(len(blocks)):
                    await visit(window, index)
        finally:
            await window.aclose()
        ahead = max_blocks * max(window._sizes) if window.plan.slots else 0
        assert window.bytes_read <= rounds * window.weights_bytes + ahead

    asyncio.run(asyncio.wait_for(run(), 30))


def test_all_buffers_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, blocks = counting_slice(tmp_path, [100] * 6)
    buffers = Buffers()
    monkeypatch.setattr(module, "page_buffer", buffers.make)

    async def run(budget: int) -> Callable[[], Any]:
        window = WeightStreamer(stored, blocks, budget_bytes=budget)
        for index in (*range(6), *range(4)):
            await visit(window, index)
        await window.aclose()
        return weakref.ref(window)

    for budget in (6 * 8192, 4 * 8192, 3 * 8192, 2 * 8192):
        kept = asyncio.run(run(budget))
        assert kept() is None
        assert buffers.live == 0, budget
