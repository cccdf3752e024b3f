"""An answer on a terminal: words stay whole, whatever pieces they come in."""

from __future__ import annotations

import io
import re

import pytest

from tests.support.screen import shown
from tpirt.chat.console import Console


def test_the_beginning_of_a_word_moves_to_the_next_line() -> None:
    screen = shown(["The ket", "tle sing", "s", " lou", "dly\n", "Tea."], 12)
    assert screen.text() == ["The kettle", "sings", "loudly", "Tea."]


def test_lines_of_wide_characters_break_between_them() -> None:
    screen = shown(["\u4e16\u754c", "\u4f60\u597d\uff0c\u4e16", "\u754cabc", "def"], 9)
    assert screen.text() == ["\u4e16\u754c\u4f60\u597d", "\uff0c\u4e16\u754c", "abcdef"]


def test_code_keeps_its_indentation_and_tabs() -> None:
    screen = shown(["if a:\n    b", " = c\n", "\td"], 20)
    assert screen.text() == ["if a:", "    b = c", "\td"]


def test_a_long_word_is_left_to_the_terminal() -> None:
    address = "https://example.org/" + "x" * 30
    screen = shown(["see ", address[:9], address[9:], " now"], 20)
    assert screen.text() == ["see", address[:20], address[20:40], address[40:] + " now"]
    assert screen.breaks == {2, 3}


@pytest.mark.parametrize(("term", "is_wrapped"), [("xterm", True), ("dumb", False)])
def test_only_a_capable_terminal_gets_wrapped_answers(
    monkeypatch: pytest.MonkeyPatch, term: str, is_wrapped: bool
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("tpirt.terminal.width", lambda stream: 10)
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    console = Console(out, io.StringIO())
    for part in ("The ket", "tle si", "ngs"):
        console.stream(part)
    console.end_line()
    console.stream("and again")
    assert (re.search("\x1b|kettle\n", out.getvalue()) is not None) == is_wrapped
    assert out.getvalue().endswith("\nand again")
