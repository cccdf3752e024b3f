"""Draws a trace: what every rank's compute, network and disk did, and what the tokens waited for.

tpirt generate --local 4 --prompt Hello --trace trace.json
python -m bench.timeline trace.json --tokens 2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.trace.critical_path import (
    CAUSES,
    COMPUTING,
    DISK_WAIT,
    NETWORK_WAIT,
    OTHER,
    Piece,
    critical_path,
    shares,
)
from bench.trace.reader import Rank, Span, Trace, merged, read_trace
from tpirt.cli.options import count
from tpirt.errors import RequestError, TpirtError
from tpirt.stopwatch import COMPUTE, DISK, NETWORK, SAMPLE, WAIT_DISK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    COMPUTING: "#4878a8",
    DISK_WAIT: "#d0342c",
    NETWORK_WAIT: "#59a14f",
    OTHER: "#c4c4c4",
    DISK: "#f0a830",
}
_LABELS = {COMPUTE: "compute", DISK_WAIT: "wait for disk", NETWORK: "network", DISK: "disk reads"}
_GAP = 1.0  # between ranks, in rows
_ROW_INCHES = 0.2
_NARROWEST_NAMED = 0.045  # share of the width that a block's name needs
_SMALL, _TINY = 8, 6.5  # points


@dataclass(frozen=True)
class View:
    """What is drawn: a stretch of time, the steps in it, and what they waited for."""

    trace: Trace
    begin_ms: float
    end_ms: float
    steps: Sequence[Span]
    path: Sequence[Piece]


def choose_view(trace: Trace, begin_s: float | None, end_s: float | None, tokens: int) -> View:
    """Choose the last tokens of the last answer, or what lies between two times.

    Raises:
        RequestError: nothing was recorded there.
    """
    if begin_s is None and end_s is None:
        steps = last_tokens(trace, tokens)
        begin_ms, end_ms = steps[0].begin_ms, steps[-1].end_ms
    else:
        whole_ms = max(span.end_ms for span in _all_spans(trace))
        begin_ms = 0.0 if begin_s is None else begin_s * 1e3
        end_ms = whole_ms if end_s is None else min(end_s * 1e3, whole_ms)
        if not begin_ms < end_ms:
            raise RequestError(
                f"from {begin_ms / 1e3:g} to {end_ms / 1e3:g} s: nothing was recorded there, "
                f"the trace ends at {whole_ms / 1e3:.3f} s"
            )
        steps = [s for s in trace.steps if s.end_ms > begin_ms and s.begin_ms < end_ms]
    path = list(_clipped(critical_path(trace, steps), begin_ms, end_ms))
    return View(trace, begin_ms, end_ms, steps, path)


def last_tokens(trace: Trace, tokens: int) -> list[Span]:
    """The last answer's last steps; its prefill, if it has no more than a first token."""
    steps: list[Span] = []
    for step in reversed(trace.steps):
        if steps and (len(steps) == tokens or step.name != steps[0].name):
            break
        steps.insert(0, step)
    return steps


def draw(view: View, out: Path) -> None:
    """Draw a PNG.

    Raises:
        RequestError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise RequestError(
            "drawing needs matplotlib: pip install matplotlib, or tpirt with its extra bench"
        ) from exc
    rows = 2 + len(view.trace.ranks) * (len(_LABELS) + _GAP)
    figure = Figure(figsize=(14, 1.9 + rows * _ROW_INCHES), layout="constrained")
    axes = figure.add_subplot()
    ticks: list[tuple[float, str]] = []
    _draw_path(axes, view)
    axes.text(1.005, 0.9, "busy", transform=axes.get_yaxis_transform(), fontsize=_SMALL)
    ticks.append((0.0, "the token waits for"))
    at = 2.0
    for rank in view.trace.ranks:
        ticks += _draw_rank(axes, view, rank, at)
        at += len(_LABELS) + _GAP
    axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks], fontsize=_SMALL)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(rows - _GAP + 0.2, -1.6)
    width_ms = view.end_ms - view.begin_ms
    axes.set_xlim(0, width_ms)
    axes.set_xlabel(f"ms, from {view.begin_ms / 1e3:.3f} s of the trace on", fontsize=_SMALL)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    _draw_steps(axes, view)
    axes.set_title(_title(view), fontsize=12, loc="left", pad=14)
    _draw_legend(figure, view)
    try:
        figure.savefig(out, dpi=150, format="png")
    except OSError as exc:
        raise RequestError(f"{out}: cannot be written: {exc.strerror}") from exc


def _draw_path(axes: Axes, view: View) -> None:
    for cause in CAUSES:
        spans = [(p.begin_ms, p.end_ms) for p in view.path if p.cause == cause]
        _bars(axes, view, spans, 0.0, COLORS[cause], height=1.2)


def _draw_rank(axes: Axes, view: View, rank: Rank, at: float) -> Iterator[tuple[float, str]]:
    axes.axhspan(at - 1.25, at + len(_LABELS) - 0.45, color="#f4f4f4", zorder=0, lw=0)
    name = f"rank {rank.rank}  {rank.peer}" + (f"  missing: {rank.missing}" * bool(rank.missing))
    axes.text(
        0.004, at - 0.55, name, transform=axes.get_yaxis_transform(), fontsize=_SMALL, weight="bold"
    )
    waits = [span for span in rank.lanes[COMPUTE] if span.name == WAIT_DISK]
    blocks = [span for span in rank.lanes[COMPUTE] if span.name != WAIT_DISK]
    lanes = (
        (COMPUTE, COMPUTING, blocks),
        (DISK_WAIT, DISK_WAIT, waits),
        (NETWORK, NETWORK_WAIT, rank.lanes[NETWORK]),
        (DISK, DISK, rank.lanes[DISK]),
    )
    for row, (lane, color, spans) in enumerate(lanes):
        y = at + 0.15 + row
        shown = [s for s in spans if s.end_ms > view.begin_ms and s.begin_ms < view.end_ms]
        _bars(axes, view, [(s.begin_ms, s.end_ms) for s in shown], y, COLORS[color])
        if lane in (COMPUTE, DISK):
            _name_blocks(axes, view, shown, y)
        busy = sum(min(e, view.end_ms) - max(b, view.begin_ms) for b, e in merged(shown))
        share = busy / (view.end_ms - view.begin_ms)
        axes.text(
            1.005,
            y,
            f"{share:.0%}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=_SMALL,
            color="#404040" if share >= 0.005 else "#b0b0b0",
        )
        yield y, _LABELS[lane]


def _bars(
    axes: Axes,
    view: View,
    spans: Sequence[tuple[float, float]],
    y: float,
    color: str,
    height: float = 0.8,
) -> None:
    bars = [(begin - view.begin_ms, end - begin) for begin, end in spans]
    axes.broken_barh(bars, (y - height / 2, height), facecolors=color, lw=0, zorder=2)


def _name_blocks(axes: Axes, view: View, spans: Sequence[Span], y: float) -> None:
    width = view.end_ms - view.begin_ms
    for span in spans:
        begin, end = max(span.begin_ms, view.begin_ms), min(span.end_ms, view.end_ms)
        if end - begin > _NARROWEST_NAMED * width:
            middle = (begin + end) / 2 - view.begin_ms
            name = span.name.removeprefix("layers.")
            axes.text(middle, y, name, ha="center", va="center", fontsize=_TINY, color="white")


def _draw_steps(axes: Axes, view: View) -> None:
    """Mark where steps begin, and say above which they are."""
    drawn = [span for span in view.trace.ranks[0].lanes[COMPUTE] if span.name == SAMPLE]
    for step in view.steps:
        begin, end = max(step.begin_ms, view.begin_ms), min(step.end_ms, view.end_ms)
        axes.axvline(step.begin_ms - view.begin_ms, color="black", lw=0.7, ls=(0, (4, 3)), zorder=3)
        token = next((s.number for s in drawn if step.begin_ms <= s.begin_ms < step.end_ms), None)
        name = step.name if step.name == "prefill" or token is None else f"token {token}"
        if end - begin > _NARROWEST_NAMED * (view.end_ms - view.begin_ms):
            label = f"{name}, {step.end_ms - step.begin_ms:.1f} ms"
            axes.text((begin + end) / 2 - view.begin_ms, -0.9, label, ha="center", fontsize=_SMALL)


def _title(view: View) -> str:
    ranks = len(view.trace.ranks)
    title = f"{view.trace.model} on {ranks} rank" + "s" * (ranks > 1)
    decoded = [step for step in view.steps if step.name == "decode"]
    if decoded and len(decoded) == len(view.steps):
        each = (view.end_ms - view.begin_ms) / len(decoded)
        title += f": {len(decoded)} decoded token{'s' * (len(decoded) > 1)}, {each:.1f} ms each"
    uncertain = max(rank.uncertainty_ms for rank in view.trace.ranks)
    return title + (f" (clocks aligned within {uncertain:.2f} ms)" if ranks > 1 else "")


def _draw_legend(figure: Figure, view: View) -> None:
    from matplotlib.patches import Patch

    spent = shares(view.path)
    entries = [Patch(color=COLORS[cause], label=f"{cause} {spent[cause]:.0%}") for cause in CAUSES]
    entries.append(Patch(color=COLORS[DISK], label="disk reads, in the background"))
    figure.legend(
        handles=entries,
        loc="outside lower center",
        ncols=len(entries),
        frameon=False,
        title="What the tokens waited for, in percent of their time",
        title_fontsize=_SMALL,
        fontsize=_SMALL,
    )


def _clipped(path: Sequence[Piece], begin_ms: float, end_ms: float) -> Iterator[Piece]:
    for piece in path:
        begin, end = max(piece.begin_ms, begin_ms), min(piece.end_ms, end_ms)
        if begin < end:
            yield Piece(begin, end, piece.cause, piece.rank)


def _all_spans(trace: Trace) -> Iterator[Span]:
    return (span for rank in trace.ranks for spans in rank.lanes.values() for span in spans)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, draw; returns 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="bench.timeline", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("file", type=Path, help="a trace")
    parser.add_argument("--out", type=Path, help="PNG to write (default: FILE.png)")
    parser.add_argument("--from", dest="begin", type=float, metavar="S", help="seconds")
    parser.add_argument("--to", dest="end", type=float, metavar="S", help="seconds")
    parser.add_argument(
        "--tokens", type=count, default=3, metavar="N", help="the last N (default 3)"
    )
    arguments = parser.parse_args(argv)
    out = arguments.out or Path(f"{arguments.file}.png")
    try:
        view = choose_view(
            read_trace(arguments.file), arguments.begin, arguments.end, arguments.tokens
        )
        draw(view, out)
    except TpirtError as exc:
        print(f"bench.timeline: error: {exc}", file=sys.stderr)
        return exc.exit_code
    print(out)
    for cause, share in shares(view.path).items():
        print(f"{share:6.1%}  {cause}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
