"""Which blocks are in memory, which are being read, and which is to be read next; no threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tpirt.weights.layout import Weights
from tpirt.weights.stream_plan import StreamPlan


@dataclass(eq=False)
class Buffer:
    """Memory for one block at a time, taken by the first read into it.

    Attributes:
        nbytes: its size.
        memory: uint8 (nbytes,); None before the first read.
        views: blocks' tensors in it by kind of block, made once.
    """

    nbytes: int
    memory: torch.Tensor | None = None
    views: dict[int, Weights] = field(default_factory=dict)


@dataclass(eq=False)
class BlockRead:
    """A block that is being read, or was read and waits for the consumer.

    Attributes:
        index: the block.
        buffer: where it is read to; nobody else uses it.
        wanted: False once the consumer has skipped it.
        ended: whether its reader is done with it.
        weights: what was read.
        error: why nothing was read.
    """

    index: int
    buffer: Buffer
    wanted: bool = True
    ended: bool = False
    weights: Weights | None = None
    error: Exception | None = None


class BlockCache:
    """A rank's blocks under a plan; its caller holds a lock during each call.

    A buffer has one owner at any time: a read, a block in use, the free ones, or a resident block.

    Attributes:
        plan: in force.
        loaded: resident blocks that were read.
    """

    def __init__(self, sizes: Sequence[int]):
        """Make an empty one; ``sizes`` are the buffer bytes of the blocks in the order of use."""
        self.plan = StreamPlan(frozenset(), 0, 0)
        self.loaded: dict[int, Weights] = {}
        self._sizes = sizes
        self._reads: list[BlockRead] = []  # in the order in which they began
        self._in_use: dict[int, Buffer] = {}
        self._free: list[Buffer] = []  # the ring's
        self._position = 0  # the block used last
        self._cursor = 0  # streamed blocks are read from here on

    @property
    def reading(self) -> list[int]:
        """Blocks whose reads are under way; one can occur twice."""
        return [read.index for read in self._reads if not read.ended]

    def apply(self, plan: StreamPlan) -> None:
        """Put a plan in force, between steps and while nothing is being read.

        Read-ahead blocks that the next step asks for in this order are kept.
        """
        assert not self._in_use
        assert not self.reading
        old, self.plan = self.plan, plan
        ahead = [read for read in self._reads if read.index not in old.resident]
        self._reads.clear()
        self._cursor = 0
        for index in self.loaded.keys() - plan.resident:
            del self.loaded[index]
        if (plan.slots, plan.slot_bytes) != (old.slots, old.slot_bytes):
            self._free = [Buffer(plan.slot_bytes) for _ in range(plan.slots)]
            return
        for read in ahead:
            if read.index == self._next_streamed():
                self._reads.append(read)
                self._cursor = read.index + 1
            else:
                self._free.append(read.buffer)

    def next_read(self) -> BlockRead | None:
        """Begin the read that is needed first; None while there is nothing to read, or no room."""
        resident = min(self._missing(), key=self._distance, default=None)
        streamed = self._next_streamed() if self._free else None
        if resident is not None and (
            streamed is None or self._distance(resident) < self._distance(streamed)
        ):
            read = BlockRead(resident, Buffer(self._sizes[resident]))
        elif streamed is not None:
            read = BlockRead(streamed, self._free.pop())
            self._cursor = streamed + 1
        else:
            return None
        self._reads.append(read)
        return read

    def end_read(self, read: BlockRead) -> None:
        """Take over what a reader has read, or why it could not."""
        read.ended = True
        if not read.wanted:
            self._drop(read)
        elif read.index in self.plan.resident and read.weights is not None:
            self._reads.remove(read)
            self.loaded[read.index] = read.weights

    def use(self, index: int) -> Weights | None:
        """Take a resident block into use; None for one that has to be waited for."""
        weights = self.loaded.get(index)
        if weights is not None:
            self._position = index
        return weights

    def claim(self, index: int) -> Weights | None:
        """Take a block into use; None if it is not there yet: then it is read next.

        Raises:
            Exception: why it could not be read; it is read again when it is asked for again.
        """
        self._position = index
        if index in self.loaded:
            return self.loaded[index]
        if index not in self.plan.resident:
            self._skip_to(index)
        read = next((read for read in self._reads if read.wanted and read.index == index), None)
        if read is None or not read.ended:
            return None
        self._reads.remove(read)
        if read.error is None:
            self._in_use[index] = read.buffer
            return read.weights
        if index not in self.plan.resident:
            self._free.append(read.buffer)
        try:
            raise read.error
        finally:
            del read  # the error keeps this frame, and the frame would keep the buffer

    def release(self, index: int) -> None:
        """Give a block up: its buffer is free for others, unless it is resident."""
        if index not in self.loaded:
            self._free.append(self._in_use.pop(index))

    def clear(self) -> None:
        """Let go of all memory."""
        self.loaded.clear()
        self._reads.clear()
        self._in_use.clear()
        self._free.clear()

    def _skip_to(self, index: int) -> None:
        """Give up what was read ahead before a block; if that is not there, go on from it."""
        for read in list(self._reads):
            if read.wanted and read.index not in self.plan.resident:
                if read.index == index:
                    return
                read.wanted = False
                if read.ended:
                    self._drop(read)
        self._cursor = index

    def _drop(self, read: BlockRead) -> None:
        self._reads.remove(read)
        self._free.append(read.buffer)

    def _missing(self) -> frozenset[int]:
        """Resident blocks that were not read yet."""
        if len(self.loaded) == len(self.plan.resident):
            return frozenset()
        return self.plan.resident - self.loaded.keys() - {read.index for read in self._reads}

    def _next_streamed(self) -> int | None:
        count = len(self._sizes)
        for index in range(self._cursor, self._cursor + count):
            if index % count not in self.plan.resident:
                return index % count
        return None

    def _distance(self, index: int) -> int:
        """How many blocks are used before this one."""
        return (index - self._position) % len(self._sizes)
