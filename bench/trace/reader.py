"""Reads the files that ``tpirt ... --trace FILE`` writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpirt.errors import RequestError
from tpirt.stopwatch import LANES, STEPS


@dataclass(frozen=True)
class Span:
    """Something that one rank did; times in milliseconds."""

    name: str
    begin_ms: float
    end_ms: float
    number: int = 0  # of the step, in the lanes steps and network; of the token it drew


@dataclass
class Rank:
    """One rank's spans, each lane in the order of time.

    Spans of the network may overlap: the sums of two micro-batches do.
    """

    rank: int
    peer: str
    missing: str
    uncertainty_ms: float
    lanes: dict[str, list[Span]] = field(default_factory=lambda: {lane: [] for lane in LANES})


def merged(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """When at least one of the spans, given in the order of time, was under way."""
    stretches: list[tuple[float, float]] = []
    for span in spans:
        if stretches and span.begin_ms <= stretches[-1][1]:
            begin, end = stretches[-1]
            stretches[-1] = begin, max(end, span.end_ms)
        else:
            stretches.append((span.begin_ms, span.end_ms))
    return stretches


@dataclass(frozen=True)
class Trace:
    """A whole trace."""

    model: str
    ranks: Sequence[Rank]

    @property
    def steps(self) -> list[Span]:
        """The master's steps, ``prefill`` and ``decode``."""
        return self.ranks[0].lanes[STEPS]


def read_trace(path: Path) -> Trace:
    """Read a trace.

    Raises:
        RequestError: not such a file; says why.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as exc:
        raise RequestError(f"{path}: cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise RequestError(f"{path}: not a trace: it is not JSON ({exc})") from exc
    try:
        trace = _parse(content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as exc:
        raise RequestError(
            f"{path}: not a trace of tpirt's; make one with tpirt generate --trace FILE"
        ) from exc
    if not trace.steps:
        raise RequestError(f"{path}: an empty trace: nothing was computed while it was recorded")
    return trace


def _parse(content: Any) -> Trace:
    about = content["otherData"]
    if not about["tool"].startswith("tpirt "):
        raise ValueError
    ranks = [
        Rank(fact["rank"], fact["peer"], fact["missing"], float(fact["clock_uncertainty_ms"]))
        for fact in about["ranks"]
    ]
    if [rank.rank for rank in ranks] != list(range(len(ranks))) or not ranks:
        raise ValueError
    for event in content["traceEvents"]:
        if event["ph"] == "X":
            begin, args = float(event["ts"]) / 1e3, event["args"]
            end = begin + float(event["dur"]) / 1e3
            number = int(args.get("step", args.get("token", 0)))
            span = Span(str(event["name"]), begin, end, number)
            ranks[event["pid"]].lanes[event["cat"]].append(span)
    for rank in ranks:
        for spans in rank.lanes.values():
            spans.sort(key=lambda span: span.begin_ms)
    return Trace(str(about["model"]), ranks)
