"""What all ranks recorded, brought to the master and onto its clock.

Every peer's monotonic clock has a zero of its own. The master asks for the time, between steps:
an answer ``t`` that was asked for at ``t0`` and came at ``t2`` puts the offset of the peer's clock
between ``t - t2`` and ``t - t0``, whatever the way there and back took. The interval common to
several such answers is narrower than that of the quickest; its half is the uncertainty.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from tpirt.errors import TpirtError, TransportError
from tpirt.stopwatch import LANES, Lane, Recorder
from tpirt.transport.base import Channel
from tpirt.transport.codec import Frame
from tpirt.transport.pb import tpirt_pb2 as pb

TRACE_SPANS = 1 << 17  # in each lane, 16 MiB a rank: about 1,000 tokens of 32 layers
_PROBES = 16
_PATIENCE_S = 10.0  # a trace is worth no longer wait
_LEFTOVERS = ("partial", "reduced", "error", "stats")  # of what was given up


@dataclass(frozen=True)
class ClockReading:
    """A peer's clock minus the master's at one moment, right within ``error_ns``."""

    master_ns: int
    offset_ns: int
    error_ns: int


@dataclass(frozen=True)
class ClockMap:
    """How a peer's clock goes against the master's, right within ``error_ns`` between readings."""

    offset_ns: int = 0  # at peer_ns
    peer_ns: int = 0
    drift: float = 0.0  # by how much the offset grows per nanosecond
    error_ns: int = 0

    @classmethod
    def fit(cls, readings: Sequence[ClockReading]) -> ClockMap:
        """Lay a line through the first and the last reading, or a constant where that will do.

        Where the clocks can be the same one, as on one machine, they are taken for it.
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
        """Translate a time of the peer's clock."""
        return peer_ns - self.offset_ns - round(self.drift * (peer_ns - self.peer_ns))


@dataclass(frozen=True)
class LaneTrace:
    """What one lane recorded, in the peer's clock; see :class:`tpirt.stopwatch.Lane`."""

    lane: str
    names: Sequence[str]
    dropped: int
    records: memoryview | bytes


@dataclass(frozen=True)
class RankTrace:
    """What one rank recorded; ``missing`` says why it is not here, if it is not."""

    rank: int
    peer_id: str
    clock: ClockMap = field(default_factory=ClockMap)
    lanes: Sequence[LaneTrace] = ()
    missing: str = ""


class Tracer:
    """The master's side: reads clocks when the session begins, collects when it ends."""

    def __init__(self, channels: Sequence[Channel], timeout_s: float):
        self._channels = channels
        self._timeout_s = min(timeout_s, _PATIENCE_S)
        self._readings: list[list[ClockReading]] = [[] for _ in channels]

    async def read_clocks(self) -> None:
        """Read every worker's clock, one after another.

        Raises:
            PeerLostError, TransportError: a worker is gone or makes no sense.
        """
        for channel, readings in zip(self._channels, self._readings, strict=True):
            readings.append(await self._read_clock(channel))

    async def collect(self, own: Recorder, busy: bool) -> AsyncIterator[RankTrace]:
        """Yield each rank's trace; a worker that cannot be asked is told of as missing.

        Args:
            own: the master's.
            busy: somebody else talks to the workers still, so that none can be asked.
        """
        yield RankTrace(0, "master", lanes=lane_traces(own))
        for rank, channel in enumerate(self._channels, start=1):
            if busy:
                yield RankTrace(rank, channel.peer_id, missing="it was still at a step")
            else:
                yield await self._rank_trace(rank)

    async def _rank_trace(self, rank: int) -> RankTrace:
        channel, readings = self._channels[rank - 1], self._readings[rank - 1]
        try:
            readings.append(await self._read_clock(channel))
            lanes = await self._fetch(channel)
        except TpirtError as exc:
            return RankTrace(rank, channel.peer_id, missing=str(exc))
        return RankTrace(rank, channel.peer_id, ClockMap.fit(readings), lanes)

    async def _read_clock(self, channel: Channel) -> ClockReading:
        lowest, highest = -(1 << 63), 1 << 63
        begin = time.perf_counter_ns()
        for _ in range(_PROBES):
            asked = time.perf_counter_ns()
            await channel.send(Frame(pb.FrameHeader(clock_request=pb.ClockRequest())))
            frame = await self._reply(channel, "clock")
            answered = time.perf_counter_ns()
            now = frame.header.clock.now_ns
            lowest, highest = max(lowest, now - answered), min(highest, now - asked)
        middle = (begin + time.perf_counter_ns()) // 2
        return ClockReading(middle, (lowest + highest) // 2, max(0, (highest - lowest + 1) // 2))

    async def _fetch(self, channel: Channel) -> list[LaneTrace]:
        await channel.send(Frame(pb.FrameHeader(trace_request=pb.TraceRequest())))
        lanes: dict[str, LaneTrace] = {}
        while True:
            frame = await self._reply(channel, "trace")
            trace = frame.header.trace
            if trace.lane in lanes or not _makes_sense(trace, frame.payload):
                raise TransportError(
                    f"peer {channel.peer_id}: a trace of lane {trace.lane!r} that makes no sense; "
                    "refused"
                )
            names = list(trace.names)
            lanes[trace.lane] = LaneTrace(trace.lane, names, trace.dropped, frame.payload)
            if trace.last:
                return list(lanes.values())

    async def _reply(self, channel: Channel, kind: str) -> Frame:
        while (frame := await channel.recv(self._timeout_s)).kind != kind:
            if frame.kind not in _LEFTOVERS:
                raise TransportError(f"peer {channel.peer_id}: expected {kind}, got {frame.kind}")
        return frame


def lane_traces(recorder: Recorder) -> list[LaneTrace]:
    """Tell what was recorded so far."""
    return [
        LaneTrace(name, lane.names, lane.dropped, lane.records)
        for name, lane in recorder.lanes.items()
    ]


async def send_clock(channel: Channel) -> None:
    """Tell the time, as a worker.

    Raises:
        PeerLostError: the master left.
    """
    await channel.send(Frame(pb.FrameHeader(clock=pb.Clock(now_ns=time.perf_counter_ns()))))


async def send_trace(channel: Channel, recorder: Recorder) -> None:
    """Send what was recorded so far, as a worker; nothing where no trace was asked for.

    Raises:
        PeerLostError: the master left.
    """
    lanes = lane_traces(recorder)
    for lane in lanes:
        trace = pb.Trace(
            lane=lane.lane, names=lane.names, dropped=lane.dropped, last=lane is lanes[-1]
        )
        await channel.send(Frame(pb.FrameHeader(trace=trace), lane.records))


def _makes_sense(trace: pb.Trace, payload: memoryview | bytes) -> bool:
    if trace.lane not in LANES or len(payload) % Lane.RECORD.size:
        return False
    return all(
        begin <= end and name < len(trace.names)
        for begin, end, _, name, _ in Lane.RECORD.iter_unpack(payload)
    )
