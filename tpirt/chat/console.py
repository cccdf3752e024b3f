"""Coordinated output to stdout and stderr."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TextIO

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"

# C0 except newline and tab, DEL, C1: a terminal obeys these instead of showing them.
_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")})


def printable(text: str) -> str:
    """Drop all control characters that a terminal would obey."""
    return text.translate(_CONTROLS)


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether the stream is an open terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def is_capable(stream: TextIO | None) -> bool:
    """Return whether the stream is a terminal that can do more than print lines."""
    return is_terminal(stream) and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Align rows as lines of text: the first ``left`` columns to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return lines


class Console:
    """Answers and requested output go to ``out``, remarks to ``err``.

    Both may be the same terminal; notes begin on a new line. On a terminal, control characters
    from the model or a peer are removed. Characters that the stream cannot encode become question
    marks.
    """

    def __init__(self, out: TextIO, err: TextIO):
        self._out = out
        self._err = err
        self._within_line = False

    def stream(self, text: str) -> None:
        """Write a part of an answer."""
        if text := self._put(self._out, text):
            self._within_line = not text.endswith("\n")

    def end_line(self) -> None:
        """End the current line, so that further output begins on a new one."""
        if self._within_line:
            self._put(self._out, "\n")
            self._within_line = False

    def end_line_on_terminal(self) -> None:
        """End the current line if others see it; a file gets the answer in one piece."""
        if is_terminal(self._out):
            self.end_line()

    def say(self, *lines: str) -> None:
        """Write command output."""
        self.end_line()
        self._put(self._out, "".join(line + "\n" for line in lines))

    def note(self, text: str) -> None:
        """Write a note."""
        self.end_line()
        self._put(
            self._err, text + "\n", dim=is_capable(self._err) and "NO_COLOR" not in os.environ
        )

    def status(self, text: str) -> None:
        """Write a remark, only on a terminal."""
        if is_terminal(self._err):
            self.note(text)

    def complain(self, error: object) -> None:
        """Write an error as one line."""
        self.end_line()
        self._put(self._err, f"error: {error}".replace("\n", " ") + "\n")

    @staticmethod
    def _put(stream: TextIO, text: str, dim: bool = False) -> str:
        if is_terminal(stream):
            text = printable(text)
        encoding = stream.encoding or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        stream.write(f"{_DIM}{text}{_PLAIN}" if dim else text)
        stream.flush()
        return text
