"""Accumulate time by cause, and optionally record it as spans."""

from __future__ import annotations

import struct
import time
from types import TracebackType

# Lanes of one rank in a trace, top to bottom.
STEPS, COMPUTE, NETWORK, DISK = "steps", "compute", "network", "disk"
LANES = (STEPS, COMPUTE, NETWORK, DISK)

# Names of spans in the compute lane that are not blocks.
WAIT_DISK, SAMPLE = "wait disk", "sample"


class Lane:
    """Spans of one kind on one rank, in a buffer of fixed size. One thread writes at a time.

    Records are 32 bytes, little-endian: begin and end in nanoseconds of this machine's
    ``perf_counter`` (int64), an amount (uint64; bytes, or tokens of a step), the name's index in
    :attr:`names` and the number of the block, step or token (both uint32).

    Attributes:
        names: names of spans, in order of first use.
        dropped: number of spans not recorded because the buffer was full.
    """

    RECORD = struct.Struct("<qqQII")

    def __init__(self, spans: int):
        # Written once, so that the memory is resident and counted in the process's base.
        self._buffer = bytearray(b"\0") * (spans * self.RECORD.size)
        self._used = 0
        self._names: dict[str, int] = {}
        self.dropped = 0

    @property
    def names(self) -> list[str]:
        """See the class."""
        return list(self._names)

    @property
    def records(self) -> memoryview:
        """The recorded spans, ordered by their ends."""
        return memoryview(self._buffer)[: self._used]

    def record(
        self, name: str, begin_ns: int, end_ns: int, amount: int = 0, number: int = 0
    ) -> None:
        """Record one span; an instant is a span without length."""
        used = self._used
        if used == len(self._buffer):
            self.dropped += 1
            return
        index = self._names.setdefault(name, len(self._names))
        self.RECORD.pack_into(self._buffer, used, begin_ns, end_ns, amount, index, number)
        self._used = used + self.RECORD.size


class Recorder:
    """The lanes of one rank; they record nothing if ``spans`` is 0."""

    def __init__(self, spans: int = 0):
        """Allocate memory for ``spans`` spans in each lane."""
        self.lanes = {name: Lane(spans) for name in LANES} if spans else {}

    def stopwatch(self, lane: str) -> Stopwatch:
        """Make a stopwatch whose spans go to ``lane``."""
        return Stopwatch(self.lanes.get(lane))


class Stopwatch:
    """Accumulates the time spent inside ``with`` blocks, and records each as a span.

    Attributes:
        total_ns: nanoseconds spent so far.
        ended_ns: ``perf_counter`` when the last block ended; 0 before.
    """

    __slots__ = ("_lane", "ended_ns", "total_ns")

    def __init__(self, lane: Lane | None = None):
        self.total_ns = 0
        self.ended_ns = 0
        self._lane = lane

    def running(self, name: str, amount: int = 0, number: int = 0) -> _Running:
        """Count the time spent in this block; see :class:`Lane` for the arguments."""
        return _Running(self, name, amount, number)

    def count(self, name: str, begin_ns: int, amount: int, number: int) -> None:
        """Add the time from ``begin_ns`` until now."""
        self.ended_ns = time.perf_counter_ns()
        self.total_ns += self.ended_ns - begin_ns
        if self._lane is not None:
            self._lane.record(name, begin_ns, self.ended_ns, amount, number)


class _Running:
    """A timed block; a third of the cost of ``contextlib.contextmanager``."""

    __slots__ = ("_amount", "_begin_ns", "_name", "_number", "_watch")

    def __init__(self, watch: Stopwatch, name: str, amount: int, number: int):
        self._watch = watch
        self._name = name
        self._amount = amount
        self._number = number

    def __enter__(self) -> None:
        self._begin_ns = time.perf_counter_ns()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._watch.count(self._name, self._begin_ns, self._amount, self._number)
