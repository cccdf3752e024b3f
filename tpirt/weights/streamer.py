"""The sliding-window memory scheduler: blocks come from disk just in time and go when used.

Background threads read ahead, in the order of use and around the end of a step into the next,
while the model computes, while it waits for the network and while nobody asks anything. What a
memory budget can hold beyond the ring of read-ahead buffers is resident: read once, kept. Every
file's checksum is compared when it is first read, before its weights are used. (TPI-LLM, arXiv
2410.00531, section 3.3, with the block retention that the paper describes.)
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tpirt.errors import MemoryLimitError, StoreError
from tpirt.ops.buffers import page_buffer, tensor_bytes
from tpirt.sharding.blocks import Block
from tpirt.stopwatch import COMPUTE, DISK, WAIT_DISK, Recorder
from tpirt.types import Progress, ProgressCallback
from tpirt.units import format_bytes
from tpirt.weights.layout import Weights, view_weights
from tpirt.weights.reader import buffer_bytes, read_file
from tpirt.weights.store import StoredSlice

MIN_SLOTS = 2  # one block in use, one being read
_BEST_SLOTS = 4  # and one more for each of two readers; further ones were not faster
READ_TIMEOUT_S = 60.0  # no read ends for so long: the disk hangs
_LEAVING_S = 5.0  # for reads under way when nobody wants them any more
_READERS = 2  # while one file is opened and closed, the disk is busy with the other


@dataclass(frozen=True)
class StreamPlan:
    """Which blocks stay in memory (``resident``), and how many buffers the others pass through."""

    resident: frozenset[int]
    slots: int
    slot_bytes: int

    def held_bytes(self, sizes: Sequence[int]) -> int:
        """Most bytes held at once, given the blocks' sizes."""
        return sum(sizes[i] for i in self.resident) + self.slots * self.slot_bytes


def plan_streaming(
    sizes: Sequence[int], max_blocks: int | None = None, budget_bytes: int | None = None
) -> StreamPlan:
    """Divide a budget between resident blocks and the ring.

    Args:
        sizes: bytes of each block in the order of use.
        max_blocks: most blocks held at once; None for no bound.
        budget_bytes: most bytes held at once; None for no bound.

    Raises:
        MemoryLimitError: fewer than two blocks fit; says how much is needed.
    """
    everything = StreamPlan(frozenset(range(len(sizes))), 0, 0)
    if max_blocks is not None and max_blocks >= len(sizes):
        max_blocks = None
    if max_blocks is None and (budget_bytes is None or sum(sizes) <= budget_bytes):
        return everything
    slot = max(sizes)
    slots = _BEST_SLOTS if max_blocks is None else max_blocks
    if slots < MIN_SLOTS:
        raise MemoryLimitError(
            f"window of {max_blocks} blocks: at least {MIN_SLOTS} are needed, "
            "one in use and one being read"
        )
    if budget_bytes is None:
        return StreamPlan(frozenset(), slots, slot)
    slots = min(slots, budget_bytes // slot)
    if slots < MIN_SLOTS:
        raise MemoryLimitError(
            f"{format_bytes(max(0, budget_bytes))} are left for weights, but two blocks of up to "
            f"{format_bytes(slot)} need {format_bytes(MIN_SLOTS * slot)}"
        )
    # Fewer than the best number of slots leave less than a slot over. Using that little for
    # resident blocks would make a smaller budget keep what a larger one does not.
    spare = budget_bytes - slots * slot if slots == _BEST_SLOTS and max_blocks is None else 0
    return StreamPlan(_choose_resident(sizes, spare), slots, slot)


def least_budget(sizes: Sequence[int], max_blocks: int | None = None) -> int:
    """The lowest ``budget_bytes`` that :func:`plan_streaming` takes."""
    two = MIN_SLOTS * max(sizes)
    held_whole = max_blocks is None or max_blocks >= len(sizes)
    return min(two, sum(sizes)) if held_whole else two


def _choose_resident(sizes: Sequence[int], spare_bytes: int) -> frozenset[int]:
    """Choose blocks to keep, spread over the step so that reading never pauses for long.

    The order is that of bit-reversed indices: any prefix of it is spread evenly, and a smaller
    budget keeps a subset of what a larger one keeps.
    """
    bits = max(1, (len(sizes) - 1).bit_length())
    order = sorted(range(len(sizes)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    resident: set[int] = set()
    for index in order:
        spare_bytes -= sizes[index]
        if spare_bytes < 0:
            break
        resident.add(index)
    return frozenset(resident)


@dataclass(eq=False)
class _Entry:
    """A block on its way through the ring, or a resident one being read."""

    index: int
    buffer: torch.Tensor
    done: bool = False
    wanted: bool = True
    error: Exception | None = None


_Waiter = tuple[asyncio.AbstractEventLoop, asyncio.Event]


class WeightStreamer:
    """Serves one rank's blocks, in memory or streamed; the same bits either way.

    The consumer acquires blocks in the order of use, each once per step, and releases each when
    done with it. Skipping ahead or starting over costs what was read in vain.
    """

    def __init__(
        self,
        stored: StoredSlice,
        blocks: Sequence[Block],
        *,
        max_blocks: int | None = None,
        budget_bytes: int | None = None,
        recorder: Recorder | None = None,
        read_timeout_s: float = READ_TIMEOUT_S,
    ):
        """Plan and start reading.

        Args:
            stored: the slice.
            blocks: what its files contain.
            max_blocks, budget_bytes: see :func:`plan_streaming`.
            recorder: of waits and reads.
            read_timeout_s: how long to wait while no read ends.

        Raises:
            MemoryLimitError: see :func:`plan_streaming`.
            StoreError: the slice is being removed.
        """
        self.blocks = blocks
        self.bytes_read = 0
        recorder = recorder or Recorder()
        self.clock = recorder.stopwatch(COMPUTE)  # what the consumer waits, between its blocks
        self.reads = recorder.stopwatch(DISK)  # what the readers read
        self._stored = stored
        self._read_timeout_s = read_timeout_s
        self._max_blocks = max_blocks
        self._files = stored.manifest.blocks
        self._sizes = [buffer_bytes(file.nbytes) for file in self._files]
        self._checked: set[int] = set()  # files whose checksum was right when first read
        self._condition = threading.Condition()
        self._loaded: dict[int, Weights] = {}
        self._missing: set[int] = set()  # resident by plan, and not read yet
        self._errors: dict[int, Exception] = {}
        self._ring: deque[_Entry] = deque()  # streamed blocks, in the order of reading
        self._in_use: dict[int, _Entry] = {}
        self._free: list[torch.Tensor] = []
        self._kinds = _kinds(blocks, [file.nbytes for file in self._files])
        self._views: dict[tuple[int, int], Weights] = {}  # by block's kind and ring buffer
        self._reading: set[_Entry] = set()  # the same block can be read twice, once in vain
        self._waiters: dict[int, _Waiter] = {}
        self._pause: _Waiter | None = None  # waits until nothing is being read
        self._cursor = 0
        self._position = 0
        self._closing = False
        self.plan = StreamPlan(frozenset(), 0, 0)
        self._apply(plan_streaming(self._sizes, max_blocks, budget_bytes))
        self._held = stored.hold()
        self._threads = [
            threading.Thread(target=self._run, name="tpirt-window", daemon=True)
            for _ in range(_READERS)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def weights_bytes(self) -> int:
        """Bytes of all blocks, wherever they are."""
        return sum(file.nbytes for file in self._files)

    @property
    def held_bytes(self) -> int:
        """Most bytes of memory that the window takes under its plan."""
        return self.plan.held_bytes(self._sizes)

    def take(self, index: int) -> Weights | None:
        """Take a resident block into use; None for one that has to be waited for."""
        tensors = self._loaded.get(index)
        if tensors is not None:
            self._position = index
        return tensors

    async def acquire(self, index: int) -> Weights:
        """Wait for a block and take it into use. Cancelled, it is not in use.

        Raises:
            StoreError: the file could not be read, or no read ends for ``read_timeout_s``; names
                file and block.
        """
        tensors = self.take(index)
        if tensors is not None:
            return tensors
        with self.clock.running(WAIT_DISK, number=index):
            while (entry := self._claim(index)) is None:
                await self._wait(index)
        return entry

    def release(self, index: int) -> None:
        """Give a block up; its tensors must not be used any more unless it is resident."""
        if index in self._loaded:
            return
        with self._condition:
            entry = self._in_use.pop(index)
            self._free.append(entry.buffer)
            self._condition.notify()

    async def set_budget(self, budget_bytes: int) -> None:
        """Hold no more than this from now on; call it between steps.

        Waits for the reads under way, and no other begins until then. Blocks that become resident
        are read when their turn comes. A cancelled call leaves the old plan in force.

        Raises:
            MemoryLimitError: see :func:`plan_streaming`; the old plan stays in force.
            StoreError: a read under way does not end.
        """
        plan = plan_streaming(self._sizes, self._max_blocks, budget_bytes)
        if plan == self.plan:
            return
        assert not self._in_use
        idle = asyncio.Event()
        with self._condition:
            self._pause = (asyncio.get_running_loop(), idle)
            reading = min((entry.index for entry in self._reading), default=0)
            if not self._reading:
                idle.set()
        try:
            await self._while_reads_end(idle, reading)
            with self._condition:
                self._apply(plan)
        finally:
            with self._condition:
                self._pause = None
                self._condition.notify_all()

    async def preload(self, progress: ProgressCallback, detail: str = "") -> None:
        """Wait until all resident blocks are in memory.

        Raises:
            StoreError: a block could not be read.
        """
        order = sorted(self.plan.resident)
        total = sum(self._files[i].nbytes for i in order)
        done = 0
        for index in order:
            await self.acquire(index)
            done += self._files[index].nbytes
            progress(Progress("loading weights", done, total, detail=detail))
        self._position = 0

    async def aclose(self) -> None:
        """Stop reading and let go of all memory; everyone who waits for a block raises.

        A read that hangs is left to itself, with the memory that it reads into.
        """
        with self._condition:
            self._closing = True
            self._condition.notify_all()
            while self._waiters:
                _wake(self._waiters.popitem()[1])
        for thread in self._threads:
            await asyncio.to_thread(thread.join, _LEAVING_S)
        self._loaded.clear()
        self._ring.clear()
        self._in_use.clear()
        self._views.clear()
        self._free.clear()
        self._held.release()

    # -- the consumer's side ---------------------------------------------------------------

    def _claim(self, index: int) -> Weights | None:
        """Take a block if it is there; otherwise see to it that it comes, and register."""
        with self._condition:
            if self._closing:
                raise StoreError(f"{self._stored.path}: no longer read: its session has ended")
            self._position = index
            if (error := self._errors.pop(index, None)) is not None:
                self._missing.add(index)
                raise error
            if index in self.plan.resident:
                found = self._loaded.get(index)
            else:
                found = self._claim_streamed(index)
            if found is None:
                self._waiters[index] = (asyncio.get_running_loop(), asyncio.Event())
                self._condition.notify()
            return found

    def _claim_streamed(self, index: int) -> Weights | None:
        while self._ring and self._ring[0].index != index:  # skipped by the consumer
            self._discard(self._ring.popleft())
        if not self._ring:
            self._cursor = index
            return None
        entry = self._ring[0]
        if not entry.done:
            return None
        self._ring.popleft()
        if entry.error is not None:
            self._free.append(entry.buffer)
            raise entry.error
        self._in_use[index] = entry
        key = self._kinds[index], entry.buffer.data_ptr()
        if key not in self._views:  # the same layer after layer: made once per buffer
            self._views[key] = self._view(entry)
        return self._views[key]

    async def _wait(self, index: int) -> None:
        waiter = self._waiters.get(index)
        if waiter is not None:
            await self._while_reads_end(waiter[1], index)

    async def _while_reads_end(self, event: asyncio.Event, index: int) -> None:
        """Wait for an event; a disk that reads anything meanwhile is slow, not hung."""
        while not event.is_set():
            before = self.bytes_read
            try:
                async with asyncio.timeout(self._read_timeout_s):
                    await event.wait()
            except TimeoutError:
                if self.bytes_read == before:
                    raise StoreError(
                        f"{self._stored.block_path(index)}: no read has ended for "
                        f"{self._read_timeout_s:g} s; check the disk"
                    ) from None

    def _discard(self, entry: _Entry) -> None:
        entry.wanted = False
        if entry.done:
            self._free.append(entry.buffer)

    # -- the reader thread -----------------------------------------------------------------

    def _apply(self, plan: StreamPlan) -> None:
        """Put a plan in force, giving memory up before any is taken."""
        geometry = (self.plan.slots, self.plan.slot_bytes)
        self.plan = plan
        for index in list(self._loaded):
            if index not in plan.resident:
                del self._loaded[index]
        self._errors.clear()
        self._missing = set(plan.resident - self._loaded.keys())
        if (plan.slots, plan.slot_bytes) != geometry:
            self._ring.clear()
            self._views.clear()
            self._free.clear()
            self._free = [page_buffer(plan.slot_bytes) for _ in range(plan.slots)]
        self._keep_what_is_next()

    def _keep_what_is_next(self) -> None:
        """Of what was read ahead, keep what a new step will ask for in this order."""
        read_ahead, self._ring = self._ring, deque()
        self._cursor = 0
        for entry in read_ahead:
            index = self._next_streamed()
            if entry.index == index:
                self._ring.append(entry)
                self._cursor = (index + 1) % len(self.blocks)
            else:
                self._free.append(entry.buffer)

    def _run(self) -> None:
        entry: _Entry | None = None
        while True:
            with self._condition:
                while not self._closing and (self._pause or (entry := self._next()) is None):
                    self._condition.wait()
                if self._closing:
                    return
                assert entry is not None
                self._reading.add(entry)
            began_ns = time.perf_counter_ns()
            try:
                self._read(entry)
            except Exception as exc:  # whatever it is, it is the waiting consumer's to know
                entry.error = exc
            with self._condition:
                self._count(entry.index, began_ns)
                self._finish(entry)
                entry = None  # its buffer may be given up from here on

    def _next(self) -> _Entry | None:
        """Choose what is needed first: a resident block not read yet, or the next streamed one."""
        count = len(self.blocks)
        resident = min(
            self._missing,
            key=lambda i: (i - self._position) % count,
            default=None,
        )
        streamed = self._next_streamed() if self._free else None
        if resident is not None and (
            streamed is None
            or (resident - self._position) % count < (streamed - self._position) % count
        ):
            self._missing.discard(resident)
            return _Entry(resident, torch.empty(0, dtype=torch.uint8))
        if streamed is None:
            return None
        self._cursor = (streamed + 1) % count
        entry = _Entry(streamed, self._free.pop())
        self._ring.append(entry)
        return entry

    def _next_streamed(self) -> int | None:
        count = len(self.blocks)
        for step in range(count):
            index = (self._cursor + step) % count
            if index not in self.plan.resident:
                return index
        return None

    def _read(self, entry: _Entry) -> None:
        index, path = entry.index, self._stored.block_path(entry.index)
        nbytes, wanted = self._files[index].nbytes, self._sizes[index]
        if not len(entry.buffer):
            entry.buffer = _buffer(wanted, path)
        content = tensor_bytes(entry.buffer)
        read_file(path, content[:wanted], nbytes)
        if index not in self._checked:
            self._stored.check(index, content[:nbytes])
            self._checked.add(index)

    def _view(self, entry: _Entry) -> Weights:
        block = self.blocks[entry.index]
        return view_weights(block, entry.buffer, self._files[entry.index].nbytes - block.nbytes)

    def _count(self, index: int, began_ns: int) -> None:
        """Note a read's bytes, and its time as far as the other reader was not reading too."""
        nbytes = self._files[index].nbytes
        self.bytes_read += nbytes
        self.reads.count(self.blocks[index].name, max(began_ns, self.reads.ended_ns), nbytes, index)

    def _finish(self, entry: _Entry) -> None:
        entry.done = True
        self._reading.discard(entry)
        if entry.index in self.plan.resident:
            if entry.error is not None:
                self._errors[entry.index] = entry.error
            else:
                self._loaded[entry.index] = self._view(entry)
        elif not entry.wanted:
            self._free.append(entry.buffer)
        _wake(self._waiters.pop(entry.index, None))
        if not self._reading:
            _wake(self._pause)
        self._condition.notify_all()


def _wake(waiter: _Waiter | None) -> None:
    if waiter is not None:
        loop, event = waiter
        loop.call_soon_threadsafe(event.set)


def _kinds(blocks: Sequence[Block], file_sizes: Sequence[int]) -> list[int]:
    """Number blocks so that those of the same number hold the same tensors at the same places."""
    numbers: dict[object, int] = {}

    def look(block: Block, nbytes: int) -> object:
        return nbytes, tuple(replace(tensor, pieces=()) for tensor in block.tensors)

    looks = map(look, blocks, file_sizes)
    return [numbers.setdefault(each, len(numbers)) for each in looks]


def _buffer(nbytes: int, path: Path) -> torch.Tensor:
    try:
        return page_buffer(nbytes)
    except OSError as exc:
        raise StoreError(f"{path}: no memory for {nbytes:,} bytes of it: {exc.strerror}") from exc
