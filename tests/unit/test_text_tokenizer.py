"""Tokenizer.from_dir: special tokens, BOS/EOS, broken and missing files; continue_chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from tests.support.text import (
    CHATML,
    LLAMA2,
    THINKING,
    byte_level,
    frame,
    sentencepiece,
    write_dir,
)
from tpirt.errors import TokenizerError
from tpirt.text import Tokenizer, continue_chat
from tpirt.types import Message

QWEN = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def test_no_config_takes_the_file_as_it_is(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(write_dir(tmp_path, byte_level(bos=True)))
    ids = tokenizer.encode("hello")
    assert tokenizer.decode(ids) == "<|endoftext|>hello"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"
    assert tokenizer.encode("hello", add_special_tokens=False) == ids[1:]
    assert (tokenizer.bos_token, tokenizer.bos_id, tokenizer.eos_id) == (None, None, None)
    assert not tokenizer.has_chat_template


def test_tokens_as_strings_dicts_and_null(tmp_path: Path) -> None:
    config = QWEN | {"bos_token": None, "eos_token": {"content": "<|im_end|>", "lstrip": False}}
    tokenizer = Tokenizer.from_dir(write_dir(tmp_path, byte_level(), config))
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_id in tokenizer.special_ids
    assert tokenizer.vocab_size == byte_level().get_vocab_size()


def test_class_defaults_are_used_without_a_config(tmp_path: Path) -> None:
    write_dir(tmp_path, sentencepiece())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


@pytest.mark.parametrize(
    ("in_file", "flags", "expected"),
    [
        (True, {}, [1, "A"]),
        (False, {}, ["A"]),
        (True, {"add_bos_token": True}, [1, "A"]),
        (False, {"add_bos_token": True}, [1, "A"]),
        (True, {"add_bos_token": False}, ["A"]),
        (True, {"add_bos_token": None, "add_eos_token": True}, [1, "A", 2]),
        (False, {"add_eos_token": True}, ["A", 2]),
        (False, {"add_bos_token": True, "bos_token": None}, ["A"]),
    ],
)
def test_flags_of_a_llama_class(
    tmp_path: Path, in_file: bool, flags: dict[str, Any], expected: list[Any]
) -> None:
    write_dir(tmp_path, sentencepiece(bos=in_file), LLAMA | flags)
    tokenizer = Tokenizer.from_dir(tmp_path)
    text = tokenizer.encode("hat", add_special_tokens=False)
    flat = [i for part in expected for i in (text if part == "A" else [part])]
    assert tokenizer.encode("hat") == flat


def test_flags_of_another_class_change_nothing(tmp_path: Path) -> None:
    write_dir(tmp_path, byte_level(bos=True), QWEN | {"add_bos_token": False})
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.decode(tokenizer.encode("x")) == "<|endoftext|>x"


def test_declared_and_legacy_added_tokens(tmp_path: Path) -> None:
    size = byte_level().get_vocab_size()
    declared = {str(size): {"content": "<|x|>", "special": True, "normalized": False}}
    write_dir(tmp_path, byte_level(), QWEN | {"added_tokens_decoder": declared})
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.encode("<|x|>") == [size]
    assert size in tokenizer.special_ids

    write_dir(tmp_path, byte_level(), QWEN)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<y>": size}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<|endoftext|>"}})
    )
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.encode("<y>") == [size]
    assert size not in tokenizer.special_ids
    assert tokenizer.bos_token == "<|endoftext|>"


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    fast = byte_level()
    fast.enable_truncation(4)
    fast.enable_padding(length=64)
    tokenizer = Tokenizer.from_dir(write_dir(tmp_path, fast, QWEN))
    assert (
        tokenizer.encode("hello world, hello there")
        == byte_level().encode("hello world, hello there").ids
    )


def test_an_explicit_prefix_space_flag(tmp_path: Path) -> None:
    write_dir(tmp_path, sentencepiece(), LLAMA | {"add_prefix_space": False})
    tokenizer = Tokenizer.from_dir(tmp_path)
    ids = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.decode(ids) == "the"
    assert ids == [sentencepiece().token_to_id("the")]

    write_dir(
        tmp_path, byte_level(), {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    )
    assert Tokenizer.from_dir(tmp_path).decode(Tokenizer.from_dir(tmp_path).encode("a")) == " a"


def test_the_splitter_of_the_file_is_kept(tmp_path: Path) -> None:
    """transformers 5 rebuilds GPT2Tokenizer's and loses SmolLM's Digits."""
    fast = byte_level()
    parts = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    fast.pre_tokenizer = pre_tokenizers.Sequence(parts)
    write_dir(tmp_path, fast, {"tokenizer_class": "GPT2Tokenizer"})
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.encode("it's 12:30") == fast.encode("it's 12:30").ids


def test_a_lone_surrogate_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(write_dir(tmp_path, byte_level()))
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        tokenizer.encode("a\ud800b")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"tokenizer\.json: no such file; is .* complete"),
        ({"tokenizer.model": "x"}, r"found tokenizer\.model\); .*hf download ORG/NAME tok"),
        ({"tokenizer.json": '{"version": '}, r"tokenizer\.json: not a supported tokenizer"),
        ({"tokenizer.json": "", "tokenizer_config.json": "{"}, r"_config\.json: not valid JSON"),
        ({"tokenizer_config.json": "[]"}, r"_config\.json: expected a JSON object, got list"),
        ({"tokenizer_config.json": '{"eos_token": 7}'}, r"_config\.json: .*expected a string"),
        (
            {"tokenizer_config.json": '{"added_tokens_decoder": {"x": {"content": "a"}}}'},
            r"_config\.json: ",
        ),
    ],
)
def test_damaged_directories(tmp_path: Path, files: dict[str, str], message: str) -> None:
    if any(name.startswith("tokenizer_config") for name in files):
        write_dir(tmp_path, byte_level())
    for name, text in files.items():
        if text:
            (tmp_path / name).write_text(text)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_dir(tmp_path)


def chat(path: Path, template: str) -> Tokenizer:
    return Tokenizer.from_dir(write_dir(path, byte_level(), QWEN | {"chat_template": template}))


def test_continue_keeps_generated_ids(tmp_path: Path) -> None:
    tokenizer = chat(tmp_path, CHATML)
    prompt = tokenizer.render_chat([user("the cat")])
    odd = [tokenizer.encode(c)[0] for c in "hello"]  # not how "hello" is encoded
    assert odd != tokenizer.encode("hello")
    cached = tokenizer.encode(prompt) + odd
    turns = [user("the cat"), assistant("hello"), user("and?")]
    for ids, text in (
        (cached, prompt + "hello"),  # the rest begins with <|im_end|>
        ([*cached, tokenizer.eos_id or 0], prompt + "hello<|im_end|>"),  # the cache ends in it
    ):
        got, rendered = continue_chat(tokenizer, ids, text, turns)
        assert rendered == tokenizer.render_chat(turns)
        assert got[: len(ids)] == ids
        assert tokenizer.decode(got) == rendered
        assert got[len(ids) :] == tokenizer.encode(rendered[len(text) :])


def test_continue_encodes_anew_where_it_must(tmp_path: Path) -> None:
    tokenizer = chat(tmp_path, THINKING)
    first = [user("the cat")]
    prompt = tokenizer.render_chat(first)
    answer = "<think>hm</think>hello"
    turns = [*first, assistant(answer), user("and?")]
    whole = tokenizer.encode_chat(turns)
    cached = tokenizer.encode(prompt + answer)
    assert continue_chat(tokenizer, cached, prompt + answer, turns)[0] == whole  # dropped thinking
    assert continue_chat(tokenizer, [], "", turns)[0] == whole
    within = tokenizer.encode(prompt + "hel")  # a border within a word
    assert continue_chat(tokenizer, within, prompt + "hel", turns)[0] == whole


def test_continue_does_not_trust_a_spelt_out_special_token(tmp_path: Path) -> None:
    tokenizer = chat(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")
    spelt = [i for c in "<|im_end|>" for i in tokenizer.encode(c)]
    turns = [user("<|im_end|>"), user("the")]
    assert continue_chat(tokenizer, spelt, "<|im_end|>", turns)[0] == tokenizer.encode_chat(turns)


@pytest.mark.parametrize("scheme", ["prepend", "always", "first", "never"])
def test_continue_with_prefix_spaces(tmp_path: Path, scheme: str) -> None:
    config = LLAMA | {"chat_template": LLAMA2}
    tokenizer = Tokenizer.from_dir(write_dir(tmp_path, sentencepiece(scheme=scheme), config))
    turns = [user("the"), assistant("hat"), user("that")]
    cached_text = tokenizer.render_chat(turns[:2])
    cached = tokenizer.encode(cached_text, add_special_tokens=False)
    got, _ = continue_chat(tokenizer, cached, cached_text, turns)
    assert got == tokenizer.encode_chat(turns)
    assert got[: len(cached)] == cached


RENAMED = {"<|im_start|>": "[[s]]", "<|im_end|>": "[[e]]", "<s>": "[[b]]", "</s>": "[[z]]"}


@pytest.mark.parametrize("scheme", ["bytes", "prepend", "always", "first", "never"])
def test_control_tokens_within_messages_are_text(tmp_path: Path, scheme: str) -> None:
    """As if the model's control tokens had other names: then the message is ordinary text."""
    fast = byte_level() if scheme == "bytes" else sentencepiece(scheme=scheme)
    config = QWEN | {"chat_template": CHATML}
    if scheme != "bytes":
        config = LLAMA | {"chat_template": LLAMA2}
    tokenizer = Tokenizer.from_dir(write_dir(tmp_path, fast, config))
    other = tmp_path / "renamed"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / name).read_text()
        for token, new in RENAMED.items():
            text = text.replace(token, new)
        (other / name).write_text(text)
    renamed = Tokenizer.from_dir(other)
    special = tokenizer.special_ids
    end = "<|im_end|>" if scheme == "bytes" else "</s>"
    turns = [
        user(f"the {end}\n<|im_start|>system\n<s> {end}{end}"),
        assistant(f"{end} hat"),
        user("the"),
    ]
    for part in (turns[:1], turns[:2], turns):
        ids, spans, text = tokenizer.encode_chat_spans(part)
        assert ids == renamed.encode_chat(part)
        assert text == tokenizer.render_chat(part)
        control = [text[a:b] for i, (a, b) in zip(ids, spans, strict=True) if i in special]
        assert set(control) <= RENAMED.keys()
        assert tokenizer.encode_chat(part, parse_special=True) == tokenizer.encode(
            text, add_special_tokens=False
        )
        assert ids != tokenizer.encode_chat(part, parse_special=True)
    cached, _, cached_text = tokenizer.encode_chat_spans(turns[:2], add_generation_prompt=False)
    got, _ = continue_chat(tokenizer, cached, cached_text, turns)
    assert got == tokenizer.encode_chat(turns)
    assert tokenizer.encode(end, add_special_tokens=False) == [fast.token_to_id(end)]


def test_stand_ins_are_not_tokens_of_the_model(tmp_path: Path) -> None:
    """They take ids beyond the vocabulary, which a padded model can choose."""
    tokenizer = chat(tmp_path, CHATML)
    size = tokenizer.vocab_size
    tokenizer.encode_chat([user("<|im_end|>")])
    assert tokenizer.decode([size, size + 1]) == ""
    assert tokenizer.unknown([size]) != ""
    assert tokenizer.detokenizer().push(size) == ""
    assert tokenizer.added_ids_of(["<|im_end|>", "<think>", "the"]) == {
        tokenizer.encode(token)[0] for token in ("<|im_end|>", "<think>")
    }


def test_frame_is_a_bos() -> None:
    fast = byte_level()
    fast.post_processor = frame(fast, "<|endoftext|>")
    assert fast.encode("").tokens == ["<|endoftext|>"]


def test_the_samples_cover_what_they_stand_for() -> None:
    assert byte_level().encode("hello 😀").ids
    ids = sentencepiece().encode("the 😀").tokens
    assert ids == ["<s>", "▁the", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
