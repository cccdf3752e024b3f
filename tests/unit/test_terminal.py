"""Text that fits a terminal: control characters, encodings, widths, lines and tables."""

from __future__ import annotations

import io
import re
import sys

import pytest
from rich.cells import cell_len

from tpirt import terminal
from tpirt.terminal import (
    CleanStream,
    aligned,
    clean_output,
    definitions,
    print_whole,
    table,
    wants_color,
    wrap,
)

FIGURES = "peak RSS 289 MiB, TTFT 0.21 s, 14.2 tokens/s, context 25/1024, 12 of 30 tokens"
ROWS = [
    ("rank", "peer", "weights", "limit", "held"),
    ("0", "master", "2.57 MiB", "5.26 GiB", "streamed, window 2 of 8 blocks"),
    ("1", "küche-\u4e16\u754c:50051", "1.66 MiB", "none", "resident"),
]


@pytest.mark.parametrize("columns", [12, 20, 40])
def test_figures_keep_their_units(columns: int) -> None:
    lines = wrap(FIGURES, columns).split("\n")
    assert " ".join(lines) == FIGURES
    assert not [line for line in lines if re.search(r"\d$", line)]
    assert all(len(line) <= columns for line in lines) or columns < 20


def test_only_lines_that_are_too_long_are_broken() -> None:
    assert wrap("a  b\n  c d e", None) == "a  b\n  c d e"
    assert wrap("a  b\n  c d e", 6) == "a  b\n  c d\n  e"
    assert wrap("a " + "x" * 50 + " b", 10, "  ") == "a\n  " + "x" * 50 + "\n  b"


def test_a_command_in_a_message_stays_whole() -> None:
    text = "restore a copy, or invite it again with `tpirt cluster invite`, on the master"
    assert wrap(text, 20).split("\n") == [
        "restore a copy, or",
        "invite it again with",
        "`tpirt cluster invite`,",
        "on the master",
    ]
    assert wrap("   `a  ` b `c d", 3) == "   `a  `\n   b\n   `c\n   d"
    assert wrap(" " * 9, 3).strip() == ""


def test_a_name_that_ends_with_a_digit_is_no_figure() -> None:
    text = "received /s/86b9b9ba3224add87c9a4a25 (1.48 MiB of 2 MiB)"
    assert wrap(text, 34) == "received\n/s/86b9b9ba3224add87c9a4a25\n(1.48 MiB of 2 MiB)"


def test_columns_are_aligned_by_what_a_terminal_shows() -> None:
    names = ("pi", "\u4e16\u754c", "e\u0301te\u0301", "\U0001f600")
    ends = {cell_len(line) for line in aligned([(name, "12 MiB") for name in names])}
    assert len(ends) == 1


def test_a_wide_terminal_gets_a_table() -> None:
    head, *body = table(ROWS, left=2, columns=120)
    assert head.split() == list(ROWS[0])
    assert [line.split()[0] for line in body] == ["0", "1"]


@pytest.mark.parametrize("columns", [24, 40, 60])
def test_a_narrow_terminal_gets_names_and_values(columns: int) -> None:
    lines = table(ROWS, left=2, columns=columns)
    assert all(cell_len(line) <= columns for line in lines)
    assert [line for line in lines if not line.startswith("  ")] == ["rank 0", "rank 1"]
    text = " ".join(line.strip() for line in lines)
    for row in ROWS[1:]:
        first, *pairs = (f"{name} {cell}" for name, cell in zip(ROWS[0], row, strict=True))
        assert f"{first} {', '.join(pairs)}" in text
    for figure in ("2.57 MiB", "5.26 GiB", "1.66 MiB", "küche-\u4e16\u754c:50051"):
        assert any(figure in line for line in lines)


def test_meanings_stand_below_their_terms_where_it_is_narrow() -> None:
    rows = [("/help", "this list"), ("/set [NAME VALUE]", "show or set how tokens are chosen")]
    assert definitions(rows, 80)[0] == "/help              this list"
    assert definitions(rows, 30) == [
        "/help",
        "    this list",
        "/set [NAME VALUE]",
        "    show or set how tokens are",
        "    chosen",
    ]


@pytest.mark.parametrize(
    ("value", "colored"), [(None, True), ("", True), ("1", False), ("0", False)]
)
def test_only_a_non_empty_no_color_forbids_color(
    monkeypatch: pytest.MonkeyPatch, value: str | None, colored: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if value is not None:
        monkeypatch.setenv("NO_COLOR", value)
    assert wants_color() == colored


def test_whatever_is_printed_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    with clean_output():
        sys.stderr.write("a\x1b]0;title\x07 \u2026 \udce9\x9b\n")
        sys.stderr.writelines(["b\x1b[2J\n"])
        assert sys.stderr.encoding == "ascii"
    assert sys.stderr is stream
    stream.flush()
    assert raw.getvalue() == b"a]0;title ? ?\nb[2J\n"


def test_messages_are_broken_at_spaces_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "width", lambda _: 20)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", CleanStream(out))
    sys.stdout.write("tpirt: error: needs 1.5 GiB\n")
    print_whole('  {"text": "as  it was, \x1b and whole"}')
    wrapped = "tpirt: error: needs\n1.5 GiB\n"
    assert out.getvalue() == wrapped + '  {"text": "as  it was,  and whole"}\n'
