"""Words of an answer stay whole on a terminal, wherever its pieces begin and end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.support.screen import shown
from tpirt.terminal import cells

WORDS = st.sampled_from(["a", "tea", "kettle", "e\u0301te\u0301", "extraordinarily-long-word"])
GAPS = st.sampled_from([" ", " ", " ", "  ", "\n", "\n\n", ". "])


def cut(text: str, places: list[int]) -> list[str]:
    at = sorted({place % (len(text) + 1) for place in places})
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]


@given(
    st.lists(st.tuples(WORDS, GAPS), max_size=20),
    st.lists(st.integers(0, 500), max_size=30),
    st.integers(8, 30),
)
def test_words_stay_whole(parts: list[tuple[str, str]], places: list[int], columns: int) -> None:
    text = "".join(word + gap for word, gap in parts)
    screen = shown(cut(text, places), columns)
    assert screen.text() == shown([text], columns).text()
    lines = screen.text()
    assert all(cells(line) <= columns for line in lines)
    assert all(cells(lines[row - 1]) == columns for row in screen.breaks)
    joined = "".join(
        line if row + 1 in screen.breaks else line + " " for row, line in enumerate(lines)
    )
    assert joined.split() == text.split()
