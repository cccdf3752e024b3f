"""What everybody waited for, moment by moment, out of a trace of all ranks.

All ranks meet in every collective, and it cannot end before the last of them has come. So the path
of a step leads, from collective to collective, over the rank that came to each last: over what
that rank did since the last one came to the collective before. That is its compute, its waiting
for the disk, and where it did neither, the network while a collective was under way there. After
the last collective it leads over the master alone. Two micro-batches' collectives overlap; all
ranks begin them in the same order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from bench.trace.reader import Rank, Span, Trace, merged
from tpirt.stopwatch import COMPUTE, NETWORK, STEPS, WAIT_DISK

COMPUTING, DISK_WAIT, NETWORK_WAIT, OTHER = "compute", "waiting for disk", "network", "other"
CAUSES = (COMPUTING, DISK_WAIT, NETWORK_WAIT, OTHER)


@dataclass(frozen=True)
class Piece:
    """A piece of the path: what it is spent on, and on which rank."""

    begin_ms: float
    end_ms: float
    cause: str
    rank: int


def critical_path(trace: Trace, steps: Sequence[Span]) -> list[Piece]:
    """Follow the path through the master's ``steps``, which follow one another.

    The pieces cover the time from the first step's beginning to the last one's end, gapless. A
    rank whose part is missing is taken for one that nobody waited for.
    """
    if not steps:
        return []
    path = _Path(steps[0].begin_ms, trace.ranks)
    visits = [_visits(rank, {step.number for step in steps}) for rank in trace.ranks]
    for step in steps:
        present = [found[step.number] for found in visits if step.number in found]
        path.follow(step, present)
    return path.pieces


def shares(pieces: Sequence[Piece]) -> dict[str, float]:
    """Share of each cause in the path's time."""
    total = sum(piece.end_ms - piece.begin_ms for piece in pieces)
    spent = dict.fromkeys(CAUSES, 0.0)
    for piece in pieces:
        spent[piece.cause] += (piece.end_ms - piece.begin_ms) / total  # no piece is empty
    return spent


@dataclass(frozen=True)
class _Visit:
    """One rank's part in one step: from ``begin_ms`` on it had what it needed to compute."""

    rank: Rank
    begin_ms: float
    meetings: Sequence[Span]


def _visits(rank: Rank, wanted: set[int]) -> dict[int, _Visit]:
    meetings: dict[int, list[Span]] = {step: [] for step in wanted}
    for span in rank.lanes[NETWORK]:
        if span.number in wanted:
            meetings[span.number].append(span)
    found = {}
    for step in rank.lanes[STEPS]:
        if step.number in wanted:
            begin, met = step.begin_ms, meetings[step.number]
            if met and met[0].name == "send step":  # the master's, before it computes itself
                begin = met.pop(0).end_ms
            found[step.number] = _Visit(rank, begin, met)
    return found


class _Path:
    def __init__(self, at_ms: float, ranks: Sequence[Rank]):
        self.pieces: list[Piece] = []
        self._at = at_ms
        self._meeting = [merged(rank.lanes[NETWORK]) for rank in ranks]

    def follow(self, step: Span, visits: Sequence[_Visit]) -> None:
        """Go through one step, the master's visit first."""
        master = visits[0]
        self._own(step.begin_ms, master.rank)  # what lay between two steps
        for meeting in range(min(len(visit.meetings) for visit in visits)):
            last = max(visits, key=lambda visit: visit.meetings[meeting].begin_ms)
            if not meeting:
                self._spend(last.begin_ms, NETWORK_WAIT, last.rank)
            self._own(last.meetings[meeting].begin_ms, last.rank)
        self._own(step.end_ms, master.rank)

    def _own(self, until_ms: float, rank: Rank) -> None:
        """Spend the time until then on what the rank itself did."""
        spans = rank.lanes[COMPUTE]
        first = bisect_left(spans, self._at, key=lambda span: span.end_ms)
        for span in spans[first:]:
            if span.begin_ms >= until_ms:
                break
            self._idle(span.begin_ms, rank)
            cause = DISK_WAIT if span.name == WAIT_DISK else COMPUTING
            self._spend(min(span.end_ms, until_ms), cause, rank)
        self._idle(until_ms, rank)

    def _idle(self, until_ms: float, rank: Rank) -> None:
        """Spend the time until then, in which the rank did nothing itself."""
        stretches = self._meeting[rank.rank]
        first = bisect_left(stretches, self._at, key=lambda stretch: stretch[1])
        for begin_ms, end_ms in stretches[first:]:
            if begin_ms >= until_ms:
                break
            self._spend(begin_ms, OTHER, rank)
            self._spend(min(end_ms, until_ms), NETWORK_WAIT, rank)
        self._spend(until_ms, OTHER, rank)

    def _spend(self, until_ms: float, cause: str, rank: Rank) -> None:
        if until_ms > self._at:
            self.pieces.append(Piece(self._at, until_ms, cause, rank.rank))
            self._at = until_ms
