"""The spans of all ranks, collected on the master and converted to its clock.

Every peer's monotonic clock has its own zero. The master asks for the time between steps: for a
request at ``t0`` and a reply ``t`` at ``t2``, the offset of the peer's clock is between ``t - t2``
and ``t - t0``, however long the round trip took. The intersection of several intervals is narrower
than the shortest one; half of it is the uncertainty.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

from tpirt.errors import TpirtError, TransportError
from tpirt.protocol.link import Link
from tpirt.protocol.messages import Clock, ClockRequest, Trace, TraceRequest
from tpirt.stopwatch import LANES, Lane, Recorder

TRACE_SPANS = 1 << 17  # in each lane, 16 MiB a rank: about 1,000 tokens of 32 layers
_PROBES = 16
_PATIENCE_S = 10.0  # do not wait longer for a trace


@dataclass(frozen=True)
class ClockReading:
    """A peer's clock minus the master's at one time, to within ``error_ns``."""

    master_ns: int
    offset_ns: int
    error_ns: int


@dataclass(frozen=True)
class ClockMap:
    """The offset of a peer's clock over time, to within ``error_ns`` between readings."""

    offset_ns: int = 0  # at peer_ns
    peer_ns: int = 0
    drift: float = 0.0  # change of the offset per nanosecond
    error_ns: int = 0

    @classmethod
    def fit(cls, readings: Sequence[ClockReading]) -> ClockMap:
        """Fit a constant if it agrees with all readings, or a line through the first and the last.

        If an offset of 0 agrees with all readings, the clocks are the same.
        """
        lowest = max(r.offset_ns - r.error_ns for r in readings)
        highest = min(r.offset_ns + r.error_ns for r in readings)
        first, last = readings[0], readings[-1]
        if lowest <= highest:
            offset = 0 if lowest <= 0 <= highest else (lowest + highest) // 2
            error = max(abs(r.offset_ns - offset) + r.error_ns for r in readings)
            return cls(offset_ns=offset, error_ns=error)
        begin, end = (r.master_ns + r.offset_ns for r in (first, last))
        drift = (last.offset_ns - first.offset_ns) / (end - begin)
        return cls(first.offset_ns, begin, drift, max(r.error_ns for r in readings))

    def to_master(self, peer_ns: int) -> int:
        """Convert a time of the peer's clock to the master's."""
        return peer_ns - self.offset_ns - round(self.drift * (peer_ns - self.peer_ns))


@dataclass(frozen=True)
class LaneTrace:
    """Spans of one lane, in the peer's clock; see :class:`tpirt.stopwatch.Lane`."""

    lane: str
    names: Sequence[str]
    dropped: int
    records: memoryview | bytes


@dataclass(frozen=True)
class RankTrace:
    """The trace of one rank; ``missing`` is the reason if there is none."""

    rank: int
    peer_id: str
    clock: ClockMap = field(default_factory=ClockMap)
    lanes: Sequence[LaneTrace] = ()
    missing: str = ""


class Tracer:
    """The master's side: reads clocks at the begin of the session, collects traces at its end."""

    def __init__(self, links: Sequence[Link]):
        self._links = links
        self._readings: list[list[ClockReading]] = [[] for _ in links]
        self._fetched: list[RankTrace] | None = None

    async def read_clocks(self) -> None:
        """Read every worker's clock, one after another.

        Raises:
            PeerLostError, TransportError: a worker is gone.
        """
        for link, readings in self._workers():
            readings.append(await _read_clock(link))

    async def fetch(self) -> None:
        """Fetch the workers' traces for :meth:`collect`, before their links are closed."""
        self._fetched = [await self._trace(*worker) for worker in self._workers()]

    async def collect(self, own: Recorder) -> AsyncIterator[RankTrace]:
        """Yield each rank's trace, or the reason why it is missing.

        Args:
            own: the master's recorder.
        """
        yield RankTrace(0, "master", lanes=lane_traces(own))
        for trace in self._fetched or ():
            yield trace
        if self._fetched is None:
            for link, readings in self._workers():
                yield await self._trace(link, readings)

    def _workers(self) -> Iterable[tuple[Link, list[ClockReading]]]:
        return zip(self._links, self._readings, strict=True)

    async def _trace(self, link: Link, readings: list[ClockReading]) -> RankTrace:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                readings.append(await _read_clock(link))
                lanes = [await _fetch(link, lane) for lane in LANES]
        except TimeoutError:
            missing = f"peer {link.peer_id}: no answer within {_PATIENCE_S:g} s"
        except TpirtError as exc:
            missing = str(exc)
        else:
            return RankTrace(link.rank, link.peer_id, ClockMap.fit(readings), lanes)
        return RankTrace(link.rank, link.peer_id, missing=missing)


def answer_clock() -> Clock:
    """Answer with the current time, as a worker."""
    return Clock(time.perf_counter_ns())


def answer_trace(recorder: Recorder, lane: str) -> tuple[Trace, memoryview | bytes]:
    """Answer with the spans of a lane, as a worker; empty if no trace was asked for."""
    recorded = recorder.lanes.get(lane)
    if recorded is None:
        return Trace(lane), b""
    return Trace(lane, tuple(recorded.names), recorded.dropped), recorded.records


async def _read_clock(link: Link) -> ClockReading:
    lowest, highest = -(1 << 63), 1 << 63
    begin = time.perf_counter_ns()
    for _ in range(_PROBES):
        asked = time.perf_counter_ns()
        answer = (await link.request(ClockRequest())).body
        answered = time.perf_counter_ns()
        if not isinstance(answer, Clock):
            raise _unexpected(link, "Clock", answer)
        lowest, highest = max(lowest, answer.now_ns - answered), min(highest, answer.now_ns - asked)
    middle = (begin + time.perf_counter_ns()) // 2
    return ClockReading(middle, (lowest + highest) // 2, max(0, (highest - lowest + 1) // 2))


async def _fetch(link: Link, lane: str) -> LaneTrace:
    reply = await link.request(TraceRequest(lane))
    trace, records = reply.body, reply.frame.payload
    if not isinstance(trace, Trace) or trace.lane != lane or not _is_valid(trace, records):
        raise _unexpected(link, f"the trace of lane {lane}", trace)
    return LaneTrace(lane, trace.names, trace.dropped, records)


def _unexpected(link: Link, expected: str, got: object) -> TransportError:
    return TransportError(
        f"peer {link.peer_id}: expected {expected}, got {type(got).__name__}; refused"
    )


def _is_valid(trace: Trace, records: memoryview | bytes) -> bool:
    if len(records) % Lane.RECORD.size:
        return False
    return all(
        begin <= end and name < len(trace.names)
        for begin, end, _, name, _ in Lane.RECORD.iter_unpack(records)
    )


def lane_traces(recorder: Recorder) -> list[LaneTrace]:
    """Return the spans recorded so far."""
    return [
        LaneTrace(name, lane.names, lane.dropped, lane.records)
        for name, lane in recorder.lanes.items()
    ]
