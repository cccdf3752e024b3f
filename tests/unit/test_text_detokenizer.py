"""Streaming decode equals whole decode; stop strings, however the text is cut."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as FastTokenizer

from tests.support.text import byte_level, sentencepiece
from tpirt.errors import RequestError
from tpirt.text import StopMatcher, Tokenizer

KINDS = ["byte_level", "prepend", "first", "never", "metaspace", "mixed", "none"]


@cache
def sample(kind: str) -> Tokenizer:
    fast: FastTokenizer
    if kind in ("byte_level", "mixed"):
        fast = byte_level()
    else:
        fast = sentencepiece(scheme=kind if kind in ("first", "never") else "prepend")
    if kind == "mixed":
        fast.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("q", "q")])
    elif kind == "metaspace":
        fast.decoder = decoders.Metaspace()
    elif kind == "none":
        fast.decoder = None
    return Tokenizer(fast, {})


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


def after(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> str:
    """The text as ``tokenizers`` has it, and that ``decode`` has the same."""
    before = tokenizer._fast.decode(prompt, skip_special_tokens=True)
    whole: str = tokenizer._fast.decode(prompt + ids, skip_special_tokens=True)
    assert tokenizer.decode(prompt + ids, skip_special_tokens=True) == whole
    return whole[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_random_ids(kind: str, data: st.DataObject) -> None:
    tokenizer = sample(kind)
    any_id = st.integers(0, tokenizer.vocab_size + 3)
    ids = data.draw(st.lists(any_id, max_size=40))
    prompt = tokenizer.encode(data.draw(st.sampled_from(["", "the", "hat ", "é", "<s>", "你"])))
    assert "".join(stream(tokenizer, ids, prompt)) == after(tokenizer, ids, prompt)


@pytest.mark.parametrize("kind", ["byte_level", "prepend", "first", "never", "mixed"])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_random_text_comes_back_in_whole_characters(kind: str, text: str) -> None:
    tokenizer = sample(kind)
    prompt = tokenizer.encode("the cat")
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, ids, prompt)
    assert "".join(pieces) == after(tokenizer, ids, prompt)
    if "\ufffd" not in text and kind != "mixed":
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("special", [False, True])
def test_an_added_token_is_its_own_text(special: bool) -> None:
    """Also where its letters could all stand for bytes, as those of ``naïve`` can."""
    fast = byte_level()
    texts = ["naïve", "ü b", "<|café|>"]
    fast.add_tokens([AddedToken(t, special=special, normalized=False) for t in texts])
    tokenizer = Tokenizer(fast, {})
    ids = [tokenizer.encode(text)[0] for text in texts]
    assert [tokenizer.decode([i]) for i in ids] == texts
    text = "the naïve é<|café|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    shown = "" if special else "".join(texts)
    assert "".join(stream(tokenizer, ids, [])) == shown
    assert tokenizer.decode(ids, skip_special_tokens=True) == shown


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = sample("byte_level")
    detokenizer = tokenizer.detokenizer()
    fast = byte_level()
    ids = [fast.token_to_id(c) for c in "ðŁĺĢ"]  # the bytes of U+1F600
    assert [detokenizer.push(i) for i in ids] == ["", "", "", "😀"]
    assert detokenizer.flush() == ""


def test_an_incomplete_character_is_flushed_as_a_replacement() -> None:
    tokenizer = sample("byte_level")
    assert stream(tokenizer, [byte_level().token_to_id("ð")], []) == ["", "\ufffd"]


def test_a_prompt_that_ends_within_a_character() -> None:
    tokenizer = sample("byte_level")
    ids = [byte_level().token_to_id(c) for c in "ðŁĺĢ"]
    assert stream(tokenizer, ids[2:], ids[:2]) == ["", "😀", ""]


def test_byte_fallback_waits_for_the_end_of_the_run() -> None:
    tokenizer = sample("prepend")
    ids = tokenizer.encode("😀 the", add_special_tokens=False)
    assert stream(tokenizer, ids, []) == ["", "", "", "", "", "😀 the", ""]
    broken = [*ids[1:5], ids[1]]  # a fifth byte makes the whole run invalid
    assert "".join(stream(tokenizer, broken, [])) == "\ufffd" * 5


def test_leading_space_is_kept_after_a_prompt_only() -> None:
    tokenizer = sample("prepend")
    the = [i for i in tokenizer.encode("the") if i not in tokenizer.special_ids]
    assert stream(tokenizer, the, []) == ["the", ""]
    assert stream(tokenizer, the, [1]) == ["the", ""]
    assert stream(tokenizer, the, tokenizer.encode("the")) == [" the", ""]


def test_special_tokens_give_no_text() -> None:
    tokenizer = sample("byte_level")
    ids = tokenizer.encode("hello<|im_end|><think>")
    assert "".join(stream(tokenizer, ids, [])) == "hello<think>"


def pushed(stops: list[str], chunks: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    text, stopped = "", False
    for chunk in chunks:
        part, stopped = matcher.push(chunk)
        text += part
    return text + matcher.flush(), stopped


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        ([], "abc", ("abc", False)),
        (["b"], "abc", ("a", True)),
        (["xy"], "axxyz", ("ax", True)),
        (["xy"], "axxz x", ("axxz x", False)),
        (["abcd", "bc"], "abcd", ("a", True)),
        (["bc", "abc"], "abcd", ("", True)),
        (["\nUser:"], "hi\nUs\nUser: x", ("hi\nUs", True)),
    ],
)
def test_stop_strings(stops: list[str], text: str, expected: tuple[str, bool]) -> None:
    assert pushed(stops, [text]) == expected
    assert pushed(stops, list(text)) == expected


def test_text_that_cannot_begin_a_stop_string_is_released_at_once() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("aE") == ("a", False)
    assert matcher.push("Nx") == ("ENx", False)
    assert matcher.push("END") == ("", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="stop: expected non-empty"):
        StopMatcher(["a", ""])


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    chunks=st.lists(st.text("abc", max_size=5), max_size=10),
)
def test_any_chunking_gives_the_text_before_the_first_stop(
    stops: list[str], chunks: list[str]
) -> None:
    text = "".join(chunks)
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))]
    released, stopped = pushed(stops, chunks)
    assert stopped == bool(ends and stops)
    if stopped:
        first = text[: ends[0]]
        assert released == first[: -max(len(s) for s in stops if first.endswith(s))]
    else:
        assert released == text
    assert not any(stop in released for stop in stops)
