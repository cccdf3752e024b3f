"""What a terminal shows: a model of the few things that a streamed answer makes it do."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tpirt.chat.word_wrap import WordWrap
from tpirt.terminal import cells


class Screen:
    """Lines of a terminal of so many columns; a wide character is followed by an empty cell.

    Attributes:
        lines: rows of cells.
        breaks: the numbers of the rows that the terminal itself went on to from a full one.
    """

    def __init__(self, columns: int):
        self.columns = columns
        self.lines: list[list[str]] = [[]]
        self.breaks: set[int] = set()
        self._at = 0

    def write(self, text: str) -> None:
        for back, erase, char in re.findall(r"\x1b\[(\d+)D|(\x1b\[K)|((?s:.))", text):
            if back:
                assert self._at < self.columns, "terminals differ here"
                self._at = max(0, self._at - int(back))
            elif erase:
                del self.lines[-1][self._at :]
            elif char == "\n":
                self._new_line()
            else:
                self._put(char)

    def text(self) -> list[str]:
        """The rows' text."""
        return ["".join(line).rstrip() for line in self.lines]

    def _put(self, char: str) -> None:
        size = cells(char)
        if size == 0:
            self.lines[-1][-1] += char
            return
        if self._at + size > self.columns:
            self._new_line()
            self.breaks.add(len(self.lines) - 1)
        self.lines[-1][self._at :] = [char, *[""] * (size - 1)]
        self._at += size

    def _new_line(self) -> None:
        self.lines.append([])
        self._at = 0


def shown(pieces: Iterable[str], columns: int) -> Screen:
    """The screen after an answer in these pieces."""
    screen, words = Screen(columns), WordWrap()
    for piece in pieces:
        screen.write(words.feed(piece, columns))
    return screen
