"""Draws the rows of ``bench.latency``: time per token over the links' latency, and its floor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.lib.latency_row import Row
from tpirt.errors import RequestError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#4878a8", "#d0342c", "#59a14f", "#f0a830", "#7b5ea7", "#8c8c8c")
_PANEL_INCHES = (5.5, 4.2)
_CAUSES = ("compute_ms", "disk_ms", "network_ms", "other_ms")
_CAUSE_COLORS = ("#4878a8", "#d0342c", "#59a14f", "#c4c4c4")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG: lines over latency where it was swept, else a bar for each row.

    Raises:
        RequestError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise RequestError("--plot needs matplotlib: pip install matplotlib") from exc
    swept = len({row.latency_ms for row in rows}) > 1
    panels = sorted({row.devices for row in rows}) if swept else [0]
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * len(panels), height), layout="constrained")
    for number, devices in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        if swept:
            _lines(axes, [row for row in rows if row.devices == devices])
            axes.set_title(f"{devices} devices")
        else:
            _bars(axes, rows)
    try:
        figure.savefig(path, dpi=150)
    except OSError as exc:
        raise RequestError(f"{path}: {exc.strerror}") from exc


def _lines(axes: Axes, rows: Sequence[Row]) -> None:
    """One line per setting over the latency, its floor dashed in the same colour."""
    names = list(dict.fromkeys(map(_name, rows)))
    for name, color in zip(names, _COLORS * len(names), strict=False):
        mine = sorted((row for row in rows if _name(row) == name), key=_latency)
        x = [_latency(row) for row in mine]
        axes.plot(x, [row.tpot_ms for row in mine], "o-", color=color, label=name)
        axes.plot(x, [row.floor_ms for row in mine], "--", color=color, label=f"{name}, floor")
    resident_ms = rows[0].resident_ms
    axes.axhline(resident_ms, color="#888888", linewidth=0.8, label="compute alone")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("one-way latency, ms")
    axes.set_ylabel("time per token, ms")
    ticks = sorted({_latency(row) for row in rows})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    values = [row.tpot_ms for row in rows] + [resident_ms]
    steps = [10.0**power * step for power in range(-1, 6) for step in (1, 2, 5)]
    shown = [step for step in steps if min(values) / 2 < step < max(values) * 2]
    axes.set_yticks(shown, [f"{step:g}" for step in shown])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    """One bar per row, divided by cause, its floor a line across."""
    for number, row in enumerate(rows):
        bottom = 0.0
        for cause, color in zip(_CAUSES, _CAUSE_COLORS, strict=True):
            label = cause.removesuffix("_ms") if number == 0 else None
            axes.bar(number, getattr(row, cause), bottom=bottom, color=color, label=label)
            bottom += getattr(row, cause)
        label = "floor" if number == 0 else None
        ends = (number - 0.45, number + 0.45)
        axes.plot(ends, (row.floor_ms, row.floor_ms), color="black", label=label)
    names = [f"{row.devices} x {row.link}\n{_name(row)}" for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=7)
    axes.set_ylabel("time per token, ms")
    axes.legend(fontsize=8)


def _name(row: Row) -> str:
    parts = [row.collective, row.comm_dtype]
    if row.window is not None:
        parts.append(f"window {row.window}")
    rate = row.link.partition("/")[2]
    return ", ".join([*parts, *([rate] if rate else [])])


def _latency(row: Row) -> float:
    return math.nan if row.latency_ms is None else row.latency_ms
