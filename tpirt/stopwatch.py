"""Accumulate time by cause, and optionally record it as spans."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager
from time import perf_counter_ns
from types import TracebackType

# Lanes of one rank in a trace, top to bottom.
STEPS, COMPUTE, NETWORK, DISK = "steps", "compute", "network", "disk"
LANES = (STEPS, COMPUTE, NETWORK, DISK)

# Names of spans in the compute lane that are not blocks.
WAIT_DISK, SAMPLE = "wait disk", "sample"

# Causes that time is counted for, the highest precedence first.
CAUSES = (COMPUTE, WAIT_DISK, NETWORK)
_IDLE = len(CAUSES)


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
    """The account and the lanes of one rank; lanes record nothing if ``spans`` is 0.

    Attributes:
        account: shared by all stopwatches.
        lanes: by name; empty if ``spans`` is 0.
    """

    def __init__(self, spans: int = 0):
        """Allocate memory for ``spans`` spans in each lane."""
        self.account = Account()
        self.lanes = {name: Lane(spans) for name in LANES} if spans else {}

    def stopwatch(self, cause: str) -> Stopwatch:
        """Make a stopwatch for one of :data:`CAUSES`."""
        lane = COMPUTE if cause == WAIT_DISK else cause
        return Stopwatch(self.account, CAUSES.index(cause), self.lanes.get(lane))

    def tally(self, lane: str) -> Tally:
        """Make a tally whose spans go to ``lane``."""
        return Tally(self.lanes.get(lane))


class Account:
    """Divides the time of one rank among :data:`CAUSES`; each moment counts once.

    While blocks of several causes are under way, the first cause gets the time: a sum over ranks
    costs nothing while the rank computes. For use on the event loop only.

    Attributes:
        last_ns: ``perf_counter`` up to which time is counted; 0 before the first block.
    """

    __slots__ = ("_charged", "_counts", "_spent_ns", "last_ns")

    def __init__(self) -> None:
        self.last_ns = 0
        self._spent_ns = [0] * _IDLE
        self._counts = [0] * _IDLE + [1]  # blocks under way by cause; idle is the last resort
        self._charged = _IDLE

    def enter(self, cause: int) -> int:
        """Begin a block; returns the time."""
        now, charged = perf_counter_ns(), self._charged
        if charged != _IDLE:
            self._spent_ns[charged] += now - self.last_ns
        self.last_ns = now
        self._counts[cause] += 1
        if cause < charged:
            self._charged = cause
        return now

    def leave(self, cause: int) -> int:
        """End a block; returns the time."""
        now, charged, counts = perf_counter_ns(), self._charged, self._counts
        self._spent_ns[charged] += now - self.last_ns
        self.last_ns = now
        counts[cause] -= 1
        while not counts[charged]:
            charged += 1
        self._charged = charged
        return now

    def read(self) -> tuple[int, int, int]:
        """Return the nanoseconds of each cause so far.

        Blocks that are under way count up to now.
        """
        if self._charged != _IDLE:
            now = perf_counter_ns()
            self._spent_ns[self._charged] += now - self.last_ns
            self.last_ns = now
        compute_ns, disk_ns, network_ns = self._spent_ns
        return compute_ns, disk_ns, network_ns


class Stopwatch:
    """Counts the time inside ``with`` blocks for one cause, and records each as a span.

    Blocks may overlap. The account divides their time; the lane keeps each span whole.
    """

    __slots__ = ("_account", "_cause", "_lane")

    def __init__(self, account: Account, cause: int, lane: Lane | None):
        self._account = account
        self._cause = cause
        self._lane = lane

    def running(
        self, name: str, amount: int = 0, number: int = 0
    ) -> AbstractContextManager[None, None]:
        """Count the time spent in this block; see :class:`Lane` for the arguments."""
        if self._lane is None:  # a token has hundreds of blocks: no object where none is needed
            return self
        return _Span(self._account, self._cause, self._lane, (name, amount, number))

    def __enter__(self) -> None:
        self._account.enter(self._cause)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._account.leave(self._cause)


class _Span:
    """A block that is also recorded."""

    __slots__ = ("_about", "_account", "_begin_ns", "_cause", "_lane")

    def __init__(self, account: Account, cause: int, lane: Lane, about: tuple[str, int, int]):
        self._account = account
        self._cause = cause
        self._lane = lane
        self._about = about

    def __enter__(self) -> None:
        self._begin_ns = self._account.enter(self._cause)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        end_ns = self._account.leave(self._cause)
        name, amount, number = self._about
        self._lane.record(name, self._begin_ns, end_ns, amount, number)


class Tally:
    """Adds up the time of background work, outside the account. One thread counts at a time.

    Attributes:
        total_ns: nanoseconds spent so far.
        ended_ns: ``perf_counter`` when the last work ended; 0 before.
    """

    __slots__ = ("_lane", "ended_ns", "total_ns")

    def __init__(self, lane: Lane | None = None):
        self.total_ns = 0
        self.ended_ns = 0
        self._lane = lane

    def count(self, name: str, begin_ns: int, amount: int, number: int) -> None:
        """Add the time from ``begin_ns`` until now; see :class:`Lane` for the arguments."""
        self.ended_ns = perf_counter_ns()
        self.total_ns += self.ended_ns - begin_ns
        if self._lane is not None:
            self._lane.record(name, begin_ns, self.ended_ns, amount, number)
