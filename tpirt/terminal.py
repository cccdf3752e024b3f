"""Output for terminals and logs: control characters, encodings, lines and tables that fit."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from io import TextIOWrapper
from typing import Any, TextIO, cast

from tpirt.printable import printable

# What no line ends within: a figure with its unit, and a command in backticks, which is copied.
_WORD = re.compile(r"(?:`[^`]*`|(?<![^ (])\d[\d.,/-]* +|[^ ])+")


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether the stream is an open terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def is_capable(stream: TextIO | None) -> bool:
    """Return whether the stream is a terminal that can do more than print lines."""
    return is_terminal(stream) and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


def wants_color() -> bool:
    """Whether colour is allowed: only a non-empty ``NO_COLOR`` forbids it."""
    return not os.environ.get("NO_COLOR")


def width(stream: TextIO) -> int | None:
    """Columns of a terminal; None if the stream is none or its size is unknown."""
    if not is_terminal(stream):
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None


def cells(text: str) -> int:
    """Columns that a text takes on a terminal; wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def wrap(text: str, columns: int | None, indent: str = "") -> str:
    """Break lines that are wider than ``columns`` at spaces; figures and commands stay whole.

    Args:
        columns: None for no limit.
        indent: what continued lines begin with.
    """
    if columns is None:
        return text
    return "\n".join(
        line if cells(line) <= columns else _broken(line, columns, indent)
        for line in text.split("\n")
    )


def _broken(line: str, columns: int, indent: str) -> str:
    text = line.strip()
    lead = line[: line.index(text)]
    first, *rest = _WORD.findall(text) or [""]
    return fill([lead + first, *rest], " ", columns, lead + indent)


def fill(parts: Iterable[str], gap: str, columns: int, indent: str) -> str:
    """Join parts, with a line break instead of the gap's last space where a line is full."""
    lines: list[str] = []
    for part in parts:
        if lines and cells(lines[-1] + gap + part) <= columns:
            lines[-1] += gap + part
        elif lines:
            lines[-1] += gap.rstrip()
            lines.append(indent + part)
        else:
            lines.append(part)
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Align rows as lines: the first ``left`` columns to the left, others to the right."""
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = (
            cell + gap if at < left else gap + cell
            for at, (cell, size) in enumerate(zip(row, widths, strict=True))
            for gap in [" " * (size - cells(cell))]
        )
        lines.append("  ".join(padded).rstrip())
    return lines


def table(rows: Sequence[Sequence[str]], left: int = 1, columns: int | None = None) -> list[str]:
    """Format a table; its first row has the names of its columns.

    Where it is wider than ``columns``, every row becomes a list of names and values below its first
    cell.
    """
    lines = aligned(rows, left)
    if columns is None or max(map(cells, lines)) <= columns:
        return lines
    head, *body = rows
    records = (
        [f"{name} {cell}" for name, cell in zip(head, row, strict=True) if cell] for row in body
    )
    return [line for record in records for line in _listed(record, columns)]


def _listed(record: Sequence[str], columns: int) -> list[str]:
    first, *rest = record
    below = fill(
        (f"  {part}" if at == 0 else part for at, part in enumerate(rest)), ", ", columns - 1, "  "
    )
    return wrap(f"{first}\n{below}", columns, "    ").split("\n")


def definitions(rows: Sequence[tuple[str, str]], columns: int | None = None) -> list[str]:
    """Format terms and their meanings, below each other where they do not fit side by side."""
    lines = aligned(rows, left=2)
    if columns is None or max(map(cells, lines)) <= columns:
        return lines
    below = (f"{term}\n{wrap('    ' + text, columns)}" for term, text in rows)
    return [line for pair in below for line in pair.split("\n")]


class CleanStream:
    """A text stream that drops control characters, and on a terminal breaks lines at spaces.

    Whatever writes to it (``print``, ``argparse``, ``logging``, a traceback) may contain text of
    models, peers and files. Attributes are those of ``unfiltered``, the stream it writes to.
    """

    def __init__(self, unfiltered: TextIO):
        self.unfiltered = unfiltered

    def write(self, text: str) -> int:
        """Write the text that a terminal shows."""
        self.unfiltered.write(wrap(printable(text), width(self.unfiltered)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write every line."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unfiltered, name)


class BestEffortStream:
    """A text stream that may be gone (closed pipe, full disk): what cannot be written is lost."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print_whole(text: str) -> None:
    """Print what is copied or parsed, such as a command: only the terminal itself breaks lines."""
    unfiltered(sys.stdout).write(printable(text) + "\n")


def unfiltered(stream: TextIO) -> TextIO:
    """The stream below a :class:`CleanStream`, for those who draw on a terminal."""
    return stream.unfiltered if isinstance(stream, CleanStream) else stream


@contextlib.contextmanager
def clean_output() -> Iterator[None]:
    """Make standard output and error clean within the block.

    Characters that their encoding lacks become question marks. Commands go on without standard
    error, but not without standard output.
    """
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    out, err = before[0], cast(TextIO, BestEffortStream(before[1]))
    sys.stdout, sys.stderr = (cast(TextIO, CleanStream(stream)) for stream in (out, err))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
