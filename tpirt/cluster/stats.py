"""One rank's time, divided among its steps; and what a worker tells its master of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tpirt.stopwatch import STEPS, Recorder, Stopwatch
from tpirt.transport.pb import tpirt_pb2 as pb
from tpirt.types import RankStats, StepTimes

MAX_STEPS = 4096  # so many are kept, for answers of any length


@dataclass
class _Step:
    """The step at hand: what the watches showed when it began, and when its layers ended."""

    step: int
    tokens: int
    prefill: bool
    begin_ns: int
    begin: Sequence[int]
    layers: Sequence[int] | None = None


class StepLog:
    """Reads three stopwatches at the borders of steps.

    What they count from one beginning to the next belongs to one step, so that steps add up to
    what was counted in total.
    """

    def __init__(self, compute: Stopwatch, io: Stopwatch, comm: Stopwatch, recorder: Recorder):
        self._watches = (compute, io, comm)
        self._lane = recorder.lanes.get(STEPS)
        self._done: deque[StepTimes] = deque(maxlen=MAX_STEPS)
        self._current: _Step | None = None
        self._base = self._totals()

    def begin(self, step: int, tokens: int, prefill: bool) -> None:
        """End the step before, if there is one, and begin this one."""
        now = time.perf_counter_ns()
        self._close(now)
        self._current = _Step(step, tokens, prefill, now, self._totals())

    def end_layers(self) -> None:
        """What follows in this step is the master's own work."""
        if self._current is not None:
            self._current.layers = self._totals()

    def totals_ms(self) -> tuple[float, float, float]:
        """Milliseconds of compute, io and comm since the last reset."""
        compute, io, comm = (
            (now - base) / 1e6 for now, base in zip(self._totals(), self._base, strict=True)
        )
        return compute, io, comm

    def steps(self) -> list[StepTimes]:
        """The latest steps since the last reset, the one at hand as far as it came."""
        current = self._current
        if current is None:
            return list(self._done)
        return [*self._done, self._times(current, self._last_ns(current))][-MAX_STEPS:]

    def reset(self) -> None:
        """Begin anew."""
        self.flush()
        self._done.clear()
        self._base = self._totals()

    def flush(self) -> None:
        """End the step at hand, so that the trace has it."""
        if self._current is not None:
            self._close(self._last_ns(self._current))

    def _close(self, until_ns: int) -> None:
        current, self._current = self._current, None
        if current is None:
            return
        self._done.append(self._times(current, until_ns))
        if self._lane is not None:
            name = "prefill" if current.prefill else "decode"
            end_ns = self._last_ns(current)
            self._lane.record(name, current.begin_ns, end_ns, current.tokens, current.step)

    def _times(self, current: _Step, until_ns: int) -> StepTimes:
        now = self._totals()
        whole = [(n - b) / 1e6 for n, b in zip(now, current.begin, strict=True)]
        head = [(n - b) / 1e6 for n, b in zip(now, current.layers or now, strict=True)]
        return StepTimes(
            step=current.step,
            tokens=current.tokens,
            prefill=current.prefill,
            total_ms=(until_ns - current.begin_ns) / 1e6,
            compute_ms=whole[0],
            io_ms=whole[1],
            comm_ms=whole[2],
            head_compute_ms=head[0],
            head_io_ms=head[1],
        )

    def _totals(self) -> tuple[int, ...]:
        return tuple(watch.total_ns for watch in self._watches)

    def _last_ns(self, current: _Step) -> int:
        """When anything was last done for a step."""
        return max(current.begin_ns, *(watch.ended_ns for watch in self._watches))


def stats_message(stats: RankStats) -> pb.Stats:
    """Turn a worker's figures into a message; who the worker is, its master knows."""
    fields = asdict(stats)
    del fields["peer_id"]
    fields["steps"] = [pb.StepTimes(**asdict(step)) for step in stats.steps]
    return pb.Stats(**fields)


def read_stats(message: pb.Stats, peer_id: str) -> RankStats:
    """Turn a worker's message back into figures."""
    fields = {field.name: getattr(message, field.name) for field in pb.Stats.DESCRIPTOR.fields}
    fields["steps"] = [
        StepTimes(**{field.name: getattr(step, field.name) for field in step.DESCRIPTOR.fields})
        for step in message.steps
    ]
    return RankStats(peer_id=peer_id, **fields)
