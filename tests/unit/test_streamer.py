"""The window's failures: who hears of them, what they say, and that it goes on afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tpirt.errors import MemoryLimitError, StoreError
from tpirt.sharding.blocks import Block
from tpirt.testing.slices import counting_slice
from tpirt.types import Progress, ignore_progress
from tpirt.weights import stream_plan
from tpirt.weights import streamer as module
from tpirt.weights.reader import buffer_bytes, read_file
from tpirt.weights.store import SliceStore, StoredSlice
from tpirt.weights.streamer import WeightStreamer

COUNT = 6
FLOATS = 500
STREAMED = {"max_blocks": 2}
RESIDENT: dict[str, int] = {}
BOTH = pytest.mark.parametrize("limits", [STREAMED, RESIDENT], ids=["streamed", "resident"])


@pytest.fixture
def stored(tmp_path: Path) -> tuple[StoredSlice, list[Block]]:
    return counting_slice(tmp_path / "slice", [FLOATS] * COUNT)


@asynccontextmanager
async def opened(
    stored: tuple[StoredSlice, Sequence[Block]], **limits: Any
) -> AsyncIterator[WeightStreamer]:
    window = WeightStreamer(*stored, **limits)
    try:
        async with asyncio.timeout(20):
            yield window
    finally:
        await window.aclose()


async def visit(window: WeightStreamer, index: int) -> None:
    tensors = await window.acquire(index)
    assert tensors["t"].eq(index).all()
    window.release(index)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 700)


def remove(path: Path) -> None:
    path.unlink()


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@BOTH
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, r"ends after 5396 of 6096 bytes"),
        (remove, "No such file"),
        (make_folder, "Is a directory"),
    ],
    ids=["truncated", "removed", "folder"],
)
async def test_failed_read_surfaces_where_it_was_needed_and_can_be_retried(
    stored: tuple[StoredSlice, list[Block]],
    limits: dict[str, int],
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    path = stored[0].block_path(3)
    content = path.read_bytes()
    damage(path)
    async with opened(stored, **limits) as window:
        for _ in range(2):
            for index in (0, 1, 2):
                await visit(window, index)
            with pytest.raises(StoreError, match=rf"block3\.safetensors: .*{reason}"):
                await window.acquire(3)
        await visit(window, 4)  # others are not concerned
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)
        for index in (0, 1, 2, 3, 4, 5, 0):
            try:
                await visit(window, index)
            except StoreError:  # what had been read ahead before the repair
                assert index == 3
                await visit(window, index)


async def test_preload_raises(stored: tuple[StoredSlice, list[Block]]) -> None:
    truncate(stored[0].block_path(5))
    async with opened(stored) as window:
        with pytest.raises(StoreError, match="block5"):
            await window.preload(ignore_progress)


async def test_preload_reports_all_bytes(stored: tuple[StoredSlice, list[Block]]) -> None:
    seen: list[Progress] = []
    async with opened(stored) as window:
        await window.preload(seen.append, detail="rank 0")
    size = stored[0].manifest.blocks[0].nbytes
    assert [report.done for report in seen] == [size * (i + 1) for i in range(COUNT)]
    assert {(r.total, r.unit, r.detail) for r in seen} == {(size * COUNT, "bytes", "rank 0")}


@BOTH
@pytest.mark.parametrize(
    "where", [(os, "preadv"), (module, "view_weights")], ids=["reading", "viewing"]
)
async def test_any_failure_of_the_reader_reaches_the_consumer(
    stored: tuple[StoredSlice, list[Block]],
    limits: dict[str, int],
    where: tuple[object, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class BugError(Exception):
        pass

    def fail(*_: object) -> int:
        raise BugError

    with monkeypatch.context() as patch:
        patch.setattr(*where, fail)
        async with opened(stored, **limits) as window:
            with pytest.raises(BugError):
                await window.acquire(0)


@BOTH
async def test_memory_that_runs_out_is_an_error_not_a_hang(
    stored: tuple[StoredSlice, list[Block]],
    limits: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(_: int) -> torch.Tensor:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(module, "page_buffer", full)
        window = WeightStreamer(*stored, **limits)
        try:
            with pytest.raises(StoreError, match=r"block0.*Cannot allocate memory"):
                await window.acquire(0)
        finally:
            await window.aclose()


@BOTH
async def test_an_error_that_is_kept_keeps_no_memory(
    stored: tuple[StoredSlice, list[Block]],
    limits: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[weakref.ref[mmap.mmap]] = []

    def page_buffer(nbytes: int) -> torch.Tensor:
        memory = mmap.mmap(-1, nbytes)
        made.append(weakref.ref(memory))
        return torch.frombuffer(memory, dtype=torch.uint8)

    monkeypatch.setattr(module, "page_buffer", page_buffer)
    for damage in (truncate, remove):
        damage(stored[0].block_path(3))
        async with opened(stored, **limits) as window:
            with pytest.raises(StoreError) as caught:
                await window.acquire(3)
        assert "block3" in str(caught.value)
        assert made
        assert not [memory for memory in made if memory() is not None]


async def test_short_reads_are_continued(
    stored: tuple[StoredSlice, list[Block]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.preadv

    def drop_by_drop(handle: int, buffers: list[memoryview], offset: int) -> int:
        return read(handle, [buffers[0][:333]], offset)

    monkeypatch.setattr(os, "preadv", drop_by_drop)
    async with opened(stored, max_blocks=2) as window:
        for index in range(COUNT):
            await visit(window, index)


@BOTH
async def test_aclose_leaves_no_thread_even_amid_reading(
    stored: tuple[StoredSlice, list[Block]], limits: dict[str, int]
) -> None:
    before = set(threading.enumerate())
    for used in range(4):
        async with opened(stored, **limits) as window:
            for index in range(used):
                await visit(window, index)
    async with opened(stored, **limits):
        assert len(set(threading.enumerate()) - before) >= 1
    left = set(threading.enumerate()) - before
    assert not [thread.name for thread in left if "window" in thread.name]


@BOTH
async def test_given_up_acquire_harms_no_later_one(
    stored: tuple[StoredSlice, list[Block]],
    limits: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = threading.Event()
    read = os.preadv

    def gated(*args: Any) -> int:
        assert gate.wait(20)
        return read(*args)

    monkeypatch.setattr(os, "preadv", gated)
    async with opened(stored, **limits) as window:
        for index in (0, 2, 1, 3, 0):
            waiting = asyncio.ensure_future(window.acquire(index))
            await asyncio.sleep(0)
            assert not waiting.done()
            waiting.cancel()
            await asyncio.wait({waiting})
        gate.set()
        for index in (1, 2, 0, 1):
            await visit(window, index)


async def test_budget_can_shrink_and_grow_between_steps(
    stored: tuple[StoredSlice, list[Block]],
) -> None:
    block = buffer_bytes(stored[0].manifest.blocks[0].nbytes)
    async with opened(stored, budget_bytes=COUNT * block) as window:
        await window.preload(ignore_progress)
        assert len(window.plan.resident) == COUNT
        for blocks in (5, 4, 3, 2, 3, 6):
            await window.set_budget(blocks * block)
            assert window.held_bytes <= blocks * block
            for index in (*range(COUNT), 0, 1):
                await visit(window, index)
        with pytest.raises(MemoryLimitError, match="two blocks"):
            await window.set_budget(2 * block - 1)
        await visit(window, 2)  # the old plan holds


@BOTH
async def test_a_flipped_bit_is_found_before_the_weights_are_used(
    stored: tuple[StoredSlice, list[Block]], limits: dict[str, int]
) -> None:
    path = stored[0].block_path(3)
    content = path.read_bytes()
    for bit in (0, 8 * 5000 + 3, 8 * len(content) - 1):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        async with opened(stored, **limits) as window:
            await visit(window, 2)
            with pytest.raises(StoreError, match=r"block3\.safetensors: expected checksum"):
                await window.acquire(3)
            path.write_bytes(content)
            for index in (4, 5, 0, 1, 2, 3):
                with contextlib.suppress(StoreError):  # what had been read ahead
                    await visit(window, index)
            await visit(window, 3)


async def test_reading_goes_on_while_nobody_asks(stored: tuple[StoredSlice, list[Block]]) -> None:
    async with opened(stored, max_blocks=3) as window:
        for index in range(COUNT):
            await visit(window, index)
        await has_read(window, COUNT + 3)
        await nothing_more_is_read(window, (0, 1, 2))


async def test_changing_the_budget_keeps_what_was_read_ahead(
    stored: tuple[StoredSlice, list[Block]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_plan, "_BEST_SLOTS", 3)
    block = buffer_bytes(stored[0].manifest.blocks[0].nbytes)
    async with opened(stored, budget_bytes=4 * block) as window:  # block 0 stays
        await window.preload(ignore_progress)
        await has_read(window, 4)  # 1, 2 and 3 ahead
        await window.set_budget(5 * block)  # block 4 is to stay too
        for index in range(COUNT):
            await visit(window, index)
        await has_read(window, 9)  # 4 and 5, and then 1, 2, 3 again: nothing twice
        await nothing_more_is_read(window, (1, 2, 3))


async def has_read(window: WeightStreamer, blocks: int) -> None:
    nbytes = blocks * window._files[0].nbytes
    await asyncio.to_thread(wait_until, lambda: window.bytes_read >= nbytes)
    assert window.bytes_read == nbytes


async def nothing_more_is_read(window: WeightStreamer, ahead: Sequence[int]) -> None:
    """Take the blocks of all buffers into use: none is left to read into."""
    read = window.bytes_read
    for index in ahead:
        assert (await window.acquire(index))["t"].eq(index).all()
    assert window.bytes_read == read


async def test_a_slow_disk_does_not_block_the_loop_while_the_budget_changes(
    stored: tuple[StoredSlice, list[Block]], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = buffer_bytes(stored[0].manifest.blocks[0].nbytes)
    begun, disk = threading.Event(), threading.Event()

    def slow(path: Path, target: memoryview, nbytes: int) -> None:
        begun.set()
        disk.wait(20)
        read_file(path, target, nbytes)

    monkeypatch.setattr(module, "read_file", slow)
    async with opened(stored, budget_bytes=4 * block) as window:
        await asyncio.to_thread(begun.wait, 20)
        before = window.plan
        cancelled = asyncio.ensure_future(window.set_budget(2 * block))
        await asyncio.sleep(0)
        assert not cancelled.done()
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert cancelled.cancelled()
        assert window.plan == before
        changing = asyncio.ensure_future(window.set_budget(3 * block))
        await asyncio.sleep(0)
        assert not changing.done()
        disk.set()
        await changing
        assert window.held_bytes <= 3 * block
        for index in range(COUNT):
            await visit(window, index)


async def test_the_budget_changes_only_when_both_reads_of_a_block_have_ended(
    stored: tuple[StoredSlice, list[Block]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is read in vain: it was asked for, given up, and asked for again."""
    block = buffer_bytes(stored[0].manifest.blocks[0].nbytes)
    reads: list[tuple[str, threading.Event]] = []

    def slow(path: Path, target: memoryview, nbytes: int) -> None:
        reads.append((path.stem, disk := threading.Event()))
        assert disk.wait(20)
        read_file(path, target, nbytes)

    async def begun(*names: str) -> None:
        await asyncio.to_thread(
            wait_until, lambda: sorted(name for name, _ in reads) == sorted(names)
        )

    def end(name: str) -> None:
        next(disk for each, disk in reads if each == name and not disk.is_set()).set()

    monkeypatch.setattr(module, "read_file", slow)
    async with opened(stored, budget_bytes=4 * block) as window:
        await begun("block0", "block1")
        for index in (3, 1):
            await give_up(window, index)
        end("block0")
        await begun("block0", "block1", "block1")
        changing = asyncio.ensure_future(window.set_budget(2 * block))
        await asyncio.sleep(0)
        read = window.bytes_read
        end("block1")
        await asyncio.to_thread(wait_until, lambda: window.bytes_read > read)
        await asyncio.wait({changing}, timeout=0.1)
        assert not changing.done()
        monkeypatch.setattr(module, "read_file", read_file)
        end("block1")
        await changing
        for index in range(COUNT):
            await visit(window, index)


async def test_closing_ends_what_waits_and_no_memory_is_taken_afterwards(
    stored: tuple[StoredSlice, list[Block]], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = buffer_bytes(stored[0].manifest.blocks[0].nbytes)
    begun, disk = threading.Event(), threading.Event()

    def slow(path: Path, target: memoryview, nbytes: int) -> None:
        begun.set()
        assert disk.wait(20)
        read_file(path, target, nbytes)

    monkeypatch.setattr(module, "read_file", slow)
    async with opened(stored, budget_bytes=4 * block) as window:
        await asyncio.to_thread(begun.wait, 20)
        acquiring = asyncio.ensure_future(window.acquire(0))
        changing = asyncio.ensure_future(window.set_budget(3 * block))
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(window.aclose())
        for waiting in (acquiring, changing):
            with pytest.raises(StoreError, match="its session has ended"):
                await waiting
        disk.set()
        await closing
        with pytest.raises(StoreError, match="its session has ended"):
            await window.acquire(0)


async def give_up(window: WeightStreamer, index: int) -> None:
    """Begin to acquire and be cancelled, as an aborted step does."""
    task = asyncio.ensure_future(window.acquire(index))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


async def test_a_held_slice_is_not_removed(tmp_path: Path) -> None:
    slice_, blocks = counting_slice(tmp_path / ("a" * 24), [FLOATS] * COUNT)
    (slice_.path / "manifest.json").write_text(slice_.manifest.to_json())
    store = SliceStore(tmp_path)
    async with opened((slice_, blocks), **STREAMED):
        with pytest.raises(StoreError, match="a running session uses it"):
            store.remove(slice_)
        assert slice_.block_path(0).exists()
    store.remove(slice_)
    assert not slice_.path.exists()
