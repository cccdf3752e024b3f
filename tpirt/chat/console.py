"""Coordinated output to stdout and stderr."""

from __future__ import annotations

from typing import TextIO

from tpirt import terminal
from tpirt.chat.word_wrap import WordWrap
from tpirt.printable import printable
from tpirt.terminal import is_capable, is_terminal, wants_color, wrap

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Console:
    """Answers and requested output go to ``out``, remarks to ``err``.

    Both may be the same terminal; notes begin on a new line. Control characters from the model or
    a peer are removed, except from an answer that goes to a file or a pipe. Characters that the
    stream cannot encode become question marks. Lines break at spaces; those of an answer only on a
    terminal that can move its cursor.
    """

    def __init__(self, out: TextIO, err: TextIO):
        self._out = terminal.unfiltered(out)
        self._err = terminal.unfiltered(err)
        self._within_line = False
        self._words = WordWrap()

    @property
    def width(self) -> int | None:
        """Columns of the terminal that command output goes to; None elsewhere."""
        return terminal.width(self._out)

    def stream(self, text: str) -> None:
        """Write a part of an answer."""
        if is_terminal(self._out):
            text = printable(text)
        if not text:
            return
        self._within_line = not text.endswith("\n")
        columns = self.width if is_capable(self._out) else None
        if columns is not None:
            text = self._words.feed(_encodable(self._out, text), columns)
        self._put(self._out, text)

    def end_line(self) -> None:
        """End the current line, so that further output begins on a new one."""
        if self._within_line:
            self._put(self._out, "\n")
            self._within_line = False
            self._words = WordWrap()

    def end_line_on_terminal(self) -> None:
        """End the current line if others see it; a file gets the answer in one piece."""
        if is_terminal(self._out):
            self.end_line()

    def say(self, *lines: str) -> None:
        """Write command output."""
        self.end_line()
        text = wrap(printable("\n".join(lines)), self.width)
        self._put(self._out, text + "\n")

    def note(self, text: str) -> None:
        """Write a note."""
        self._remark(text, dim=is_capable(self._err) and wants_color())

    def status(self, text: str) -> None:
        """Write a remark, only on a terminal."""
        if is_terminal(self._err):
            self.note(text)

    def complain(self, error: object) -> None:
        """Write an error as one line."""
        self._remark(f"error: {error}".replace("\n", " "))

    def _remark(self, text: str, dim: bool = False) -> None:
        self.end_line()
        text = wrap(printable(text), terminal.width(self._err))
        self._put(self._err, f"{_DIM}{text}{_PLAIN}\n" if dim else text + "\n")

    @staticmethod
    def _put(stream: TextIO, text: str) -> None:
        stream.write(_encodable(stream, text))
        stream.flush()


def _encodable(stream: TextIO, text: str) -> str:
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
