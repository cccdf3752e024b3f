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
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from tpirt.errors import StoreError
from tpirt.ops.buffers import page_buffer, tensor_bytes
from tpirt.sharding.blocks import Block
from tpirt.stopwatch import DISK, WAIT_DISK, Recorder
from tpirt.types import Progress, ProgressCallback
from tpirt.weights.block_cache import BlockCache, BlockRead
from tpirt.weights.layout import Weights, view_weights
from tpirt.weights.reader import buffer_bytes, read_file
from tpirt.weights.store import StoredSlice
from tpirt.weights.stream_plan import StreamPlan, plan_streaming

READ_TIMEOUT_S = 60.0  # no read ends for so long: the disk hangs
_LEAVING_S = 5.0  # for reads under way when nobody wants them any more
_READERS = 2  # while one file is opened and closed, the disk is busy with the other

_T = TypeVar("_T")
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
        self.clock = recorder.stopwatch(WAIT_DISK)  # what the consumer waits, between its blocks
        self.reads = recorder.tally(DISK)  # what the readers read
        self._stored = stored
        self._read_timeout_s = read_timeout_s
        self._max_blocks = max_blocks
        self._files = stored.manifest.blocks
        self._sizes = [buffer_bytes(file.nbytes) for file in self._files]
        self._kinds = _kinds(blocks, [file.nbytes for file in self._files])
        self._checked: set[int] = set()  # files whose checksum was right when first read
        self._cache = BlockCache(self._sizes)
        self._cache.apply(plan_streaming(self._sizes, max_blocks, budget_bytes))
        self._condition = threading.Condition()  # guards all below, and the cache
        self._waiters: set[_Waiter] = set()  # for the end of a read
        self._paused = False  # no read begins
        self._closing = False
        self._held = stored.hold()
        self._threads = [
            threading.Thread(target=self._run, name="tpirt-window", daemon=True)
            for _ in range(_READERS)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def plan(self) -> StreamPlan:
        """What is resident, and through how many buffers the other blocks pass."""
        return self._cache.plan

    @property
    def weights_bytes(self) -> int:
        """Bytes of memory that all blocks take, wherever they are; as the plan counts them."""
        return sum(self._sizes)

    @property
    def held_bytes(self) -> int:
        """Most bytes of memory that the window takes under its plan."""
        return self.plan.held_bytes(self._sizes)

    def take(self, index: int) -> Weights | None:
        """Take a resident block into use; None for one that has to be waited for."""
        return self._cache.use(index)

    async def acquire(self, index: int) -> Weights:
        """Wait for a block and take it into use. Cancelled, it is not in use.

        Raises:
            StoreError: the file could not be read, or no read ends for ``read_timeout_s``; names
                file and block.
        """
        weights = self.take(index)
        if weights is not None:
            return weights
        with self.clock.running(WAIT_DISK, number=index):
            return await self._until(lambda: self._claim(index), index)

    def release(self, index: int) -> None:
        """Give a block up; its tensors must not be used any more unless it is resident."""
        if index in self._cache.loaded:
            return
        with self._condition:
            self._cache.release(index)
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
        with self._condition:
            self._paused = True
            reading = min(self._cache.reading, default=0)
        try:
            await self._until(lambda: self._change(plan), reading)
        finally:
            with self._condition:
                self._paused = False
                self._condition.notify_all()

    async def preload(self, progress: ProgressCallback, detail: str = "") -> None:
        """Wait until all resident blocks are in memory. If cancelled, reading goes on.

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

    async def aclose(self) -> None:
        """Stop reading and let go of all memory; everyone who waits for a block raises.

        A read that hangs is left to itself, with the memory that it reads into.
        """
        with self._condition:
            self._closing = True
            self._condition.notify_all()
            self._wake()
        try:
            for thread in self._threads:
                await asyncio.to_thread(thread.join, _LEAVING_S)
        finally:
            with self._condition:
                self._cache.clear()
            self._held.release()

    # -- the consumer's side ---------------------------------------------------------------

    async def _until(self, look: Callable[[], _T | None], index: int) -> _T:
        """Wait until ``look`` finds something; it looks, locked, now and when a read has ended.

        Raises:
            StoreError: no read ends for ``read_timeout_s``; names the file of block ``index``.
        """
        while True:
            waiter = asyncio.get_running_loop(), asyncio.Event()
            with self._condition:
                if self._closing:
                    raise StoreError(f"{self._stored.path}: no longer read: its session has ended")
                if (found := look()) is not None:
                    return found
                self._waiters.add(waiter)
            try:
                async with asyncio.timeout(self._read_timeout_s):
                    await waiter[1].wait()
            except TimeoutError:
                if not waiter[1].is_set():  # it may have been: the process was suspended
                    raise StoreError(
                        f"{self._stored.block_path(index)}: no read has ended for "
                        f"{self._read_timeout_s:g} s; check the disk"
                    ) from None
            finally:
                with self._condition:
                    self._waiters.discard(waiter)

    def _claim(self, index: int) -> Weights | None:
        weights = self._cache.claim(index)
        if weights is None:
            self._condition.notify()
        return weights

    def _change(self, plan: StreamPlan) -> StreamPlan | None:
        if self._cache.reading:
            return None
        self._cache.apply(plan)
        return plan

    def _wake(self) -> None:
        for loop, ended in self._waiters:
            loop.call_soon_threadsafe(ended.set)
        self._waiters.clear()

    # -- the reader threads ----------------------------------------------------------------

    def _run(self) -> None:
        while (read := self._next_read()) is not None:
            began_ns = time.perf_counter_ns()
            try:
                self._read(read)
            except Exception as exc:  # whatever it is, it is the waiting consumer's to know
                _forget_locals(exc)
                read.error = exc
            with self._condition:
                if not self._closing:
                    self._count(read.index, began_ns)
                    self._cache.end_read(read)
                read = None  # its buffer may be given up; errors keep this frame
                self._wake()
                self._condition.notify_all()

    def _next_read(self) -> BlockRead | None:
        """Wait for something to read; None when there is no more to come."""
        with self._condition:
            while not self._closing:
                if not self._paused and (read := self._cache.next_read()) is not None:
                    return read
                self._condition.wait()
        return None

    def _read(self, read: BlockRead) -> None:
        index, buffer = read.index, read.buffer
        path, file, kind = self._stored.block_path(index), self._files[index], self._kinds[index]
        if buffer.memory is None:
            buffer.memory = _take_memory(buffer.nbytes, path)
        content = tensor_bytes(buffer.memory)
        read_file(path, content[: self._sizes[index]], file.nbytes)
        if index not in self._checked:
            self._stored.check(index, content[: file.nbytes])
            self._checked.add(index)
        if kind not in buffer.views:  # the same layer after layer: made once per buffer
            block = self.blocks[index]
            buffer.views[kind] = view_weights(block, buffer.memory, file.nbytes - block.nbytes)
        read.weights = buffer.views[kind]

    def _count(self, index: int, began_ns: int) -> None:
        """Note a read's bytes, and its time as far as the other reader was not reading too."""
        nbytes = self._files[index].nbytes
        self.bytes_read += nbytes
        self.reads.count(self.blocks[index].name, max(began_ns, self.reads.ended_ns), nbytes, index)


def _kinds(blocks: Sequence[Block], file_sizes: Sequence[int]) -> list[int]:
    """Number blocks so that those of the same number hold the same tensors at the same places."""
    numbers: dict[object, int] = {}

    def look(block: Block, nbytes: int) -> object:
        return nbytes, tuple(replace(tensor, pieces=()) for tensor in block.tensors)

    looks = map(look, blocks, file_sizes)
    return [numbers.setdefault(each, len(numbers)) for each in looks]


def _take_memory(nbytes: int, path: Path) -> torch.Tensor:
    try:
        return page_buffer(nbytes)
    except OSError as exc:
        raise StoreError(f"{path}: no memory for {nbytes:,} bytes of it: {exc.strerror}") from exc


def _forget_locals(error: BaseException) -> None:
    """An error can be kept for long; what its frames refer to is a buffer's memory."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
