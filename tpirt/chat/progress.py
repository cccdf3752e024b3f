"""Progress on standard error: bars on a terminal, otherwise lines every few seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column, Table
from rich.text import Text

from tpirt.printable import printable_line
from tpirt.terminal import is_capable, unfiltered, wants_color, width, wrap
from tpirt.types import LOST, RECONNECTED, RESUMED, Progress
from tpirt.units import format_bytes

_PATIENCE_S = 1.0  # shorter stages are not shown
_FIRST_LINE_S, _NEXT_LINE_S = 3.0, 5.0
_MOST_BARS = 8
_RATE_COLUMNS, _BAR_COLUMNS = 60, 92  # from this width on, rates and bars are shown

_AT_ONCE = ("peers", "seconds")  # these are not done one after another: there is no rate

_Clock = Callable[[], float]
_Key = tuple[str, str]


class ConsoleProgress:
    """Shows progress reports; a :data:`tpirt.types.ProgressCallback` and a context manager.

    On a terminal, stages longer than a second have bars, one per ``detail``. They vanish when all
    have ended, or with :meth:`close`. Elsewhere there is a plain line every few seconds. What a
    loss of peers brings are lines that stay. Thread-safe.

    Args:
        quiet: show nothing.
        stream: output stream; by default standard error.
        clock: monotonic seconds, for tests.

    Attributes:
        before: called before something is shown, also from other threads, to end a line that the
            terminal is within.
        aside: calls what shows a line that stays; where a prompt is shown, shows it again after.
    """

    def __init__(
        self, quiet: bool = False, stream: TextIO | None = None, clock: _Clock = time.monotonic
    ):
        stream = stream or sys.stderr
        self.quiet = quiet
        self.before: Callable[[], None] = _do_nothing
        self.aside: Callable[[Callable[[], None]], None] = lambda show: show()
        self._show: _Bars | _Lines | None = None
        if not quiet:
            kind = _Bars if is_capable(stream) else _Lines
            self._show = kind(unfiltered(stream), clock, lambda: self.before())

    def __call__(self, progress: Progress) -> None:
        """Show a report."""
        if self._show is None:
            return
        if progress.stage in _NOTES:
            self.note(_NOTES[progress.stage](progress))
        else:
            self._show.update(progress)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if (show := self._show) is not None:
            self.aside(lambda: show.note(text))

    def close(self) -> None:
        """Clear the screen's progress; nothing is written until the next report."""
        if self._show is not None:
            self._show.close()

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class _Lines:
    """At most one plain line per stage every few seconds."""

    def __init__(self, stream: TextIO, clock: _Clock, before: Callable[[], None]):
        self._stream = stream
        self._clock = clock
        self._before = before
        self._lock = threading.Lock()
        self._stage = ""
        self._due_s = 0.0
        self._begun: dict[_Key, tuple[float, int]] = {}  # start time, and the amount done by then

    def update(self, progress: Progress) -> None:
        with self._lock:
            now = self._clock()
            if progress.stage != self._stage:
                self._stage, self._due_s = progress.stage, now + _FIRST_LINE_S
                self._begun.clear()
            key = (progress.stage, progress.detail)
            begun_s, done = self._begun.setdefault(key, (now, progress.done))
            if now < self._due_s:
                return
            self._due_s = now + _NEXT_LINE_S
            pace = _pace(progress, progress.done - done, now - begun_s)
            self._write(f"{_title(progress)}: {_amount(progress)}{pace}")

    def note(self, line: str) -> None:
        with self._lock:
            self._write(line)

    def close(self) -> None:
        with self._lock:
            self._stage = ""

    def _write(self, line: str) -> None:
        self._before()
        _write_line(self._stream, line)


class _Bars:
    """Bars that are redrawn in place by a thread of rich."""

    def __init__(self, stream: TextIO, clock: _Clock, before: Callable[[], None]):
        self._stream = stream
        self._console = _QuietConsole(file=stream, no_color=not wants_color())
        self._clock = clock
        self._before = before
        self._lock = threading.Lock()
        self._bars: RichProgress | None = None
        self._tasks: dict[_Key, TaskID] = {}
        self._stage = ""
        self._shown = False
        self._timer: threading.Timer | None = None
        self._shown_until_s = -_PATIENCE_S

    def update(self, progress: Progress) -> None:
        with self._lock:
            bars = self._bars or self._begin()
            if progress.stage != self._stage:
                self._stage = progress.stage
                for old in self._tasks.values():
                    bars.remove_task(old)
                self._tasks.clear()
            self._put(bars, progress)
            if bars.finished:
                self._end()

    def note(self, line: str) -> None:
        with self._lock:
            self._end()
            self._before()
            _write_line(self._stream, line)

    def close(self) -> None:
        with self._lock:
            self._end()
            self._shown_until_s = -_PATIENCE_S

    def _begin(self) -> RichProgress:
        self._bars = _FittingProgress(self._console)
        if self._clock() - self._shown_until_s < _PATIENCE_S:
            self._start(self._bars)  # a next stage right after one that is on the screen
        else:
            self._timer = threading.Timer(_PATIENCE_S, self._on_timer, [self._bars])
            self._timer.daemon = True
            self._timer.start()
        return self._bars

    def _put(self, bars: RichProgress, progress: Progress) -> None:
        key = (progress.stage, progress.detail)
        if key not in self._tasks:
            title = _title(progress)
            self._tasks[key] = bars.add_task(title, total=None, unit=progress.unit)
        task = bars.tasks[bars.task_ids.index(self._tasks[key])]
        others = sum(other.visible for other in bars.tasks if other is not task)
        done = 0 < progress.total <= progress.done
        bars.update(
            task.id,
            completed=progress.done,
            total=progress.total or None,
            visible=not done and others < _MOST_BARS,
        )

    def _on_timer(self, bars: RichProgress) -> None:
        with self._lock:
            if self._bars is bars and not self._shown:
                self._start(bars)

    def _start(self, bars: RichProgress) -> None:
        self._shown = True
        self._before()
        bars.start()

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._bars is not None and self._shown:
            self._bars.stop()
            self._shown_until_s = self._clock()
        self._bars, self._shown, self._stage = None, False, ""
        self._tasks.clear()


class _QuietConsole(RichConsole):
    """Never hides the cursor: a killed process could not restore it."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class _FittingProgress(RichProgress):
    """Leaves out columns that the terminal has no room for; long titles take several lines."""

    def __init__(self, console: RichConsole):
        self._output = console  # the base class asks for columns before it has a console
        super().__init__(
            console=console, transient=True, redirect_stdout=False, redirect_stderr=False
        )

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        columns = self._output.width
        title = TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold"))
        extras = [
            *([BarColumn(24)] if columns >= _BAR_COLUMNS else []),
            _Amount(),
            *([_Rate(), _Remaining()] if columns >= _RATE_COLUMNS else []),
        ]
        self.columns = (title, *extras)
        return super().make_tasks_table(tasks)


class _Figure(ProgressColumn):
    """A figure with its unit, in one line."""

    def get_table_column(self) -> Column:
        return Column(no_wrap=True)


class _Amount(_Figure):
    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text(f"{task.elapsed or 0:.0f} s")
        unit = task.fields["unit"]
        return Text(_amount(Progress("", int(task.completed), int(task.total), unit)))


class _Rate(_Figure):
    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        return Text(_rate(task.speed, unit) if task.speed and unit not in _AT_ONCE else "")


class _Remaining(_Figure):
    def render(self, task: Task) -> Text:
        left = None if task.fields["unit"] in _AT_ONCE else task.time_remaining
        return Text("" if left is None or task.finished else _left(left))


def _do_nothing() -> None:
    pass


def _write_line(stream: TextIO, line: str) -> None:
    stream.write(wrap(printable_line(line), width(stream), "  ") + "\n")
    stream.flush()


def _reconnected(progress: Progress) -> str:
    peers = f"{progress.total} peer" + "s" * (progress.total != 1)
    done = f"reconnected to {peers}" if progress.total else "no peer is left"
    return done + (f"; {progress.detail}" if progress.detail else "")


_NOTES: dict[str, Callable[[Progress], str]] = {
    LOST: lambda progress: f"{progress.detail}; reconnecting",
    RECONNECTED: _reconnected,
    RESUMED: lambda progress: f"going on {progress.detail}",
}


def _title(progress: Progress) -> str:
    title = f"{progress.stage}, {progress.detail}" if progress.detail else progress.stage
    return printable_line(title)


def _amount(progress: Progress) -> str:
    if progress.total <= 0:
        return "..."
    if progress.unit == "bytes":
        return f"{format_bytes(progress.done)} of {format_bytes(progress.total)}"
    return f"{progress.done} of {progress.total} {progress.unit}"


def _pace(progress: Progress, done: int, seconds: float) -> str:
    """Format the rate and the remaining time of a stage; "" if unknown."""
    if seconds < _PATIENCE_S or done <= 0 or progress.total <= 0 or progress.unit in _AT_ONCE:
        return ""
    speed = done / seconds
    left = (progress.total - progress.done) / speed
    return f", {_rate(speed, progress.unit)}, {_left(left)}"


def _rate(speed: float, unit: str) -> str:
    if unit == "bytes":
        return f"{format_bytes(speed)}/s"
    return f"{speed:.0f} {unit}/s" if speed >= 100 else f"{speed:.2g} {unit}/s"


def _left(seconds: float) -> str:
    for length, unit in ((1, "s"), (60, "min")):
        if seconds < 100 * length:
            return f"{seconds / length:.0f} {unit} left"
    return f"{seconds / 3600:.1f} h left"
