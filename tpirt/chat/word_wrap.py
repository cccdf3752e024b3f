"""Lines that break at spaces although their text comes in pieces."""

from __future__ import annotations

from collections.abc import Iterator

from tpirt.terminal import cells

_TAB = 8


class WordWrap:
    """Places the words of a text on a terminal's lines; a new one begins on a new line.

    The edge of the terminal may be reached before the end of a word has come. Every piece is shown
    at once; when one goes beyond the edge, what the line has of its word is erased and written on
    the next line. A line may also break beside a wide character, as Chinese needs it. A word
    longer than a line is left to the terminal, which copies it in one piece.

    The last column stays empty: terminals differ in how a cursor moves that has passed it.
    """

    def __init__(self) -> None:
        self._column = 0
        self._word = ""  # what the line has of the last word
        self._is_long = False  # this word is left to the terminal

    def feed(self, text: str, columns: int) -> str:
        """Return what to write for the next piece of text, on a terminal of so many columns."""
        return "".join(self._placed(piece, columns) for piece in _pieces(text))

    def _placed(self, piece: str, columns: int) -> str:
        if piece in "\n\t ":
            return self._spaced(piece, columns - 1)
        if not _is_wide(piece):
            return self._worded(piece, columns)
        self._end_word()
        placed = self._worded(piece, columns)
        self._end_word()
        return placed

    def _spaced(self, space: str, edge: int) -> str:
        self._end_word()
        if space == "\n":
            self._column = 0
            return space
        self._column += 1 if space == " " else _TAB - self._column % _TAB
        if self._column <= edge:
            return space
        self._column = edge  # the next word begins a line, without this space
        return ""

    def _worded(self, piece: str, columns: int) -> str:
        begun = cells(self._word)
        end = self._column + cells(piece)
        if end < columns and not self._is_long:
            self._column = end
            self._word += piece
            return piece
        if self._is_long or begun == self._column:
            self._is_long = True
            self._column = (end - 1) % columns + 1
            return piece
        word = self._word + piece
        self._word, self._column = "", 0
        back = f"\x1b[{begun}D\x1b[K" if begun else ""
        return f"{back}\n{self._worded(word, columns)}"

    def _end_word(self) -> None:
        self._word, self._is_long = "", False


def _pieces(text: str) -> Iterator[str]:
    """Split into single spaces, single wide characters, and runs of others."""
    run = ""
    for char in text:
        if char in "\n\t " or _is_wide(char):
            if run:
                yield run
            yield char
            run = ""
        else:
            run += char
    if run:
        yield run


def _is_wide(piece: str) -> bool:
    return len(piece) == 1 and cells(piece) == 2
