"""Time and traffic of one rank by step. Counters only grow, so that any number of readers can take
differences."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from tpirt.stopwatch import STEPS, Recorder
from tpirt.types import StepTimes

MAX_STEPS = 4096  # kept


class Counters(NamedTuple):
    """The counters of a rank since its session began."""

    compute_ns: int = 0
    io_ns: int = 0
    comm_ns: int = 0
    read_ns: int = 0
    bytes_read: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0

    def since(self, earlier: Counters) -> Counters:
        """The difference to an earlier reading."""
        return Counters(*(now - then for now, then in zip(self, earlier, strict=True)))


@dataclass(slots=True)
class _Step:
    """A step: the counters at its begin, at the end of its layers, and at its end."""

    number: int
    tokens: int
    prefill: bool
    begin_ns: int
    begin: Counters
    layers: Counters | None = None
    end_ns: int | None = None
    end: Counters | None = None


class StepLog:
    """Reads a rank's counters at the boundaries of steps.

    A step lasts until the next one begins, so the steps add up to the totals.
    """

    def __init__(
        self, read: Callable[[], Counters], last_ns: Callable[[], int], recorder: Recorder
    ):
        """Begin with no steps.

        Args:
            read: returns the counters.
            last_ns: returns the ``perf_counter_ns`` up to which time is counted.
            recorder: gets a span for every step in its steps lane.
        """
        self._read = read
        self._last_ns = last_ns
        self._lane = recorder.lanes.get(STEPS)
        self._steps: deque[_Step] = deque(maxlen=MAX_STEPS)

    def begin(self, number: int, tokens: int, prefill: bool) -> None:
        """End the previous step, if there is one, and begin this one."""
        now, counters = time.perf_counter_ns(), self._read()
        now = max(now, self._last_ns())  # running work is counted up to the reading
        self._end(now, counters)
        self._steps.append(_Step(number, tokens, prefill, now, counters))

    def end_layers(self) -> None:
        """End the layers: the rest of this step is the master's own work."""
        if self._steps:
            self._steps[-1].layers = self._read()

    def since(self, number: int) -> tuple[Counters, list[StepTimes]]:
        """Counters since step ``number`` began (0: the session), and the times by step."""
        now = self._read()
        steps = [step for step in self._steps if step.number >= number]
        earliest = steps[0].begin if steps else now
        first = earliest if number else Counters()
        return now.since(first), [self._times(step, now) for step in steps]

    def flush(self) -> None:
        """End the current step, so that the trace includes it."""
        self._end(None, self._read())

    def _end(self, now_ns: int | None, counters: Counters) -> None:
        step = self._steps[-1] if self._steps else None
        if step is None or step.end is not None:
            return
        last_ns = max(step.begin_ns, self._last_ns())
        step.end_ns, step.end = now_ns or last_ns, counters
        if self._lane is not None:
            name = "prefill" if step.prefill else "decode"
            self._lane.record(name, step.begin_ns, last_ns, step.tokens, step.number)

    def _times(self, step: _Step, now: Counters) -> StepTimes:
        end = step.end or now
        end_ns = step.end_ns or max(step.begin_ns, self._last_ns())
        whole = end.since(step.begin)
        head = end.since(step.layers or end)
        return StepTimes(
            step=step.number,
            tokens=step.tokens,
            prefill=step.prefill,
            total_ms=(end_ns - step.begin_ns) / 1e6,
            compute_ms=whole.compute_ns / 1e6,
            io_ms=whole.io_ns / 1e6,
            comm_ms=whole.comm_ns / 1e6,
            head_compute_ms=head.compute_ns / 1e6,
            head_io_ms=head.io_ns / 1e6,
        )
