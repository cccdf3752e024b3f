"""Trace files for https://ui.perfetto.dev and chrome://tracing.

The format is Chrome's trace event format (JSON): a process per rank, a thread per lane, times in
microseconds of the master's clock since the file was created. Spans of a thread must not overlap:
overlapping spans of a lane, such as the sums of two micro-batches, are in a second thread.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tpirt.cluster.tracing import ClockMap, LaneTrace, RankTrace
from tpirt.errors import RequestError
from tpirt.files import sync_file
from tpirt.stopwatch import COMPUTE, DISK, LANES, NETWORK, SAMPLE, STEPS, Lane
from tpirt.version import __version__

Traces = Callable[[], AsyncIterator[RankTrace]]

# Names of a span's number and amount.
_NUMBER = {STEPS: "step", COMPUTE: "block", NETWORK: "step", DISK: "block"}
_TOKEN = "token"  # of a span named SAMPLE
_AMOUNT = {STEPS: "tokens", COMPUTE: "bytes", NETWORK: "bytes", DISK: "bytes"}


class TraceFile:
    """Reserves the output file up front so that a bad path fails early; a context manager.

    An existing file stays until a whole trace replaces it.
    """

    def __init__(self, path: Path):
        """Create a temporary file next to ``path``.

        Raises:
            RequestError: the path is not writable.
        """
        self.path = Path(os.path.expanduser(path))
        self._begin_ns = time.perf_counter_ns()
        if self.path.exists() and not self.path.is_file():
            raise RequestError(f"trace {path}: not an ordinary file; give another name")
        self._target = self.path.resolve()  # a link's target
        try:
            handle, self._draft = tempfile.mkstemp(
                prefix=f".{self._target.name}.", dir=self._target.parent
            )
        except OSError as exc:
            raise RequestError(
                f"trace {path}: cannot be written: {exc.strerror}; give another path"
            ) from exc
        self._out = open(handle, "w", encoding="utf-8")  # noqa: SIM115 - closed on leaving

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._out.close()
        Path(self._draft).unlink(missing_ok=True)

    @asynccontextmanager
    async def saved(self, traces: Traces, model: str) -> AsyncIterator[None]:
        """Write the trace on exit, also after an error, which has precedence.

        Raises:
            RequestError: see :meth:`write`.
        """
        try:
            yield
        except BaseException:
            with suppress(RequestError):
                await self.write(traces(), model)
            raise
        await self.write(traces(), model)

    async def write(self, traces: AsyncIterator[RankTrace], model: str) -> None:
        """Write the ranks' traces as they come; creates the file atomically.

        Raises:
            RequestError: the disk is full, or the folder is gone.
        """
        try:
            await write_trace(self._out, traces, model, self._begin_ns)
            self._out.flush()
            sync_file(self._out.fileno())
            os.replace(self._draft, self._target)
        except OSError as exc:
            raise RequestError(f"trace {self.path}: cannot be written: {exc.strerror}") from exc


async def write_trace(
    out: TextIO, traces: AsyncIterator[RankTrace], model: str, begin_ns: int
) -> None:
    """Write one JSON object; times are relative to ``begin_ns`` of the master's clock."""
    ranks: list[dict[str, Any]] = []
    out.write('{"displayTimeUnit":"ms","traceEvents":[\n')
    async for trace in traces:
        if ranks:
            out.write(",\n")
        lead = ""
        for event in _events(trace, begin_ns):
            out.write(lead + event)
            lead = ",\n"
        ranks.append(_facts(trace))
    about = {"tool": f"tpirt {__version__}", "model": model, "ranks": ranks}
    out.write(f'\n],\n"otherData":{json.dumps(about)}}}\n')


def _facts(trace: RankTrace) -> dict[str, Any]:
    return {
        "rank": trace.rank,
        "peer": trace.peer_id,
        "missing": trace.missing,
        "clock_offset_ms": trace.clock.offset_ns / 1e6,
        "clock_drift_ppm": trace.clock.drift * 1e6,
        "clock_uncertainty_ms": trace.clock.error_ns / 1e6,
        "not_recorded": {lane.lane: lane.dropped for lane in trace.lanes if lane.dropped},
    }


def _events(trace: RankTrace, begin_ns: int) -> Iterator[str]:
    name = f"rank {trace.rank} {trace.peer_id}" + (" (missing)" if trace.missing else "")
    yield _meta("process_name", trace.rank, 0, name=name)
    yield _meta("process_sort_index", trace.rank, 0, sort_index=trace.rank)
    for lane in trace.lanes:
        yield from _lane_events(lane, trace.rank, trace.clock, begin_ns)


def _meta(what: str, rank: int, thread: int, **args: object) -> str:
    return json.dumps({"ph": "M", "name": what, "pid": rank, "tid": thread, "args": args})


def _lane_events(lane: LaneTrace, rank: int, clock: ClockMap, begin_ns: int) -> Iterator[str]:
    """Format one lane without ``json``, because there can be millions of spans."""
    heads = [f'{{"ph":"X","cat":"{lane.lane}","name":{json.dumps(name)}' for name in lane.names]
    amount_of = _AMOUNT[lane.lane]
    numbers = [_TOKEN if name == SAMPLE else _NUMBER[lane.lane] for name in lane.names]
    places = [f'"pid":{rank},"tid":{_thread(lane.lane, 0)}']  # of each thread
    free_ns = [-(1 << 63)]  # when each thread's last span ended
    end_us = 0.0
    yield from _thread_names(lane.lane, rank, 0)
    for begin, end, amount, name, number in Lane.RECORD.iter_unpack(lane.records):
        thread = next((t for t, free in enumerate(free_ns) if free <= begin), len(free_ns))
        if thread == len(free_ns):
            yield from _thread_names(lane.lane, rank, thread)
            places.append(f'"pid":{rank},"tid":{_thread(lane.lane, thread)}')
            free_ns.append(end)
        free_ns[thread] = end
        where = places[thread]
        begin_us = (clock.to_master(begin) - begin_ns) / 1e3
        end_us = (clock.to_master(end) - begin_ns) / 1e3
        args = f'"{numbers[name]}":{number}' + (f',"{amount_of}":{amount}' if amount else "")
        times = f'"ts":{begin_us:.3f},"dur":{end_us - begin_us:.3f}'
        yield f'{heads[name]},{where},{times},"args":{{{args}}}}}'
        if lane.names[name] == SAMPLE:
            yield _instant(f"token {number}", where, "p", end_us)
    if lane.dropped:
        full = f"full: {lane.dropped} later spans are not recorded"
        yield _instant(full, places[0], "t", end_us)


def _thread(lane: str, number: int) -> int:
    """The id of a lane's first, second, ... thread."""
    return LANES.index(lane) + 1 + len(LANES) * number


def _thread_names(lane: str, rank: int, number: int) -> Iterator[str]:
    """Name a thread, and put it below the others of its lane."""
    thread = _thread(lane, number)
    name = lane if number == 0 else f"{lane} {number + 1}"
    yield _meta("thread_name", rank, thread, name=name)
    order = 100 * LANES.index(lane) + number
    yield _meta("thread_sort_index", rank, thread, sort_index=order)


def _instant(name: str, where: str, scope: str, at_us: float) -> str:
    """An instant event of the process (``scope`` p) or of one thread (t)."""
    return f'{{"ph":"i","s":"{scope}",{where},"name":{json.dumps(name)},"ts":{at_us:.3f}}}'
