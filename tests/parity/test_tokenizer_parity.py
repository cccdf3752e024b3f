"""The same ids, text and prompts as transformers' AutoTokenizer for the same directory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from tests.support.text import (
    CHATML,
    LLAMA2,
    RAISING,
    THINKING,
    byte_level,
    sentencepiece,
    write_dir,
)
from tpirt.errors import TokenizerError
from tpirt.text import Tokenizer
from tpirt.types import Message

transformers = pytest.importorskip("transformers")

SHARED = Path(__file__).parents[3] / "shared"  # beside a checkout; else skipped
TEXTS = [
    "",
    "the cat",
    "hat  the\n\nthe ",
    "é 你好😀",
    "x<s>the</s>the",
    "<|im_end|>\nhi <think>",
    "7",
]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FAST: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
LLAMA: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "legacy": True}
ADDED = {
    "__type": "AddedToken",
    "content": "<s>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
}
DECLARED = {
    "added_tokens_decoder": {
        "9999": {
            "content": "<|x|>",
            "lstrip": False,
            "normalized": False,
            "rstrip": True,
            "single_word": False,
            "special": True,
        }
    }
}


def qwen() -> FastTokenizer:
    fast = byte_level()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    fast.normalizer = normalizers.NFC()
    return fast


CASES: dict[str, tuple[FastTokenizer, dict[str, Any] | None]] = {
    "llama3": (byte_level(bos=True), FAST | {"bos_token": "<|endoftext|>"}),
    "fast": (byte_level(), FAST),
    "fast, flags ignored": (byte_level(bos=True), FAST | {"add_bos_token": False}),
    "no config": (byte_level(bos=True), None),
    "no config, sentencepiece": (sentencepiece(), None),
    "declared": (byte_level(), FAST | DECLARED),
    "new named": (byte_level(), FAST | {"pad_token": "[PAD]", "extra_special_tokens": ["[E]"]}),
    "model specific": (byte_level(), FAST | {"image_token": "<|image|>"}),
    "byte-level as Llama": (byte_level(bos=True), FAST | {"tokenizer_class": "LlamaTokenizerFast"}),
    "gpt2": (byte_level(), FAST | {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}),
    "gpt2, prefix": (
        byte_level(),
        FAST | {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
    ),
    "qwen": (qwen(), FAST | {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False}),
    "llama": (sentencepiece(), LLAMA | {"add_bos_token": True, "add_eos_token": False}),
    "llama fast": (sentencepiece(), LLAMA | {"tokenizer_class": "LlamaTokenizerFast"}),
    "llama, no bos": (sentencepiece(bos=False), LLAMA | {"add_bos_token": False}),
    "llama, dicts": (sentencepiece(), LLAMA | {"bos_token": ADDED}),
    "llama, first": (sentencepiece(scheme="first"), LLAMA | {"legacy": False}),
    "llama, always": (sentencepiece(scheme="always"), LLAMA),
    "llama, never": (sentencepiece(scheme="never"), LLAMA | {"add_prefix_space": False}),
    "llama, prefix off": (sentencepiece(), LLAMA | {"add_prefix_space": False}),
}


def both(path: Path) -> tuple[Tokenizer, Any]:
    return Tokenizer.from_dir(path), transformers.AutoTokenizer.from_pretrained(path)


def assert_same(ours: Tokenizer, theirs: Any, texts: list[str]) -> None:
    for text in texts:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids, text
        bare = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, add_special_tokens=False) == bare, text
        for skip in (False, True):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected
    special = {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.special_ids == special
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("case", CASES)
def test_ids_and_text(tmp_path: Path, case: str) -> None:
    fast, config = CASES[case]
    ours, theirs = both(write_dir(tmp_path, fast, config))
    assert_same(ours, theirs, [*TEXTS, "a<|x|>  b[PAD][E]<|image|>c"])
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token) or (
        config and config["tokenizer_class"] in ("GPT2Tokenizer", "Qwen2Tokenizer")
    )


def test_where_transformers_5_departs_from_the_published_file(tmp_path: Path) -> None:
    """Llama 2: ``legacy: false`` beside ``Prepend``; flags that contradict the post-processor."""
    published = sentencepiece()
    ours, theirs = both(write_dir(tmp_path, published, LLAMA | {"legacy": False}))
    assert ours.encode("<s>the") == published.encode("<s>the").ids != theirs("<s>the").input_ids
    assert ours.encode(" the") == published.encode(" the").ids != theirs(" the").input_ids
    ours, theirs = both(write_dir(tmp_path, published, LLAMA | {"add_bos_token": False}))
    assert ours.encode("the") == theirs("the").input_ids[1:]


CHATS = [
    [("user", "hi")],
    [("system", "Be brief."), ("user", 'hi <b> & "q" é 你好 😀')],
    [("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"), ("user", "c")],
    [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    [("user", "a"), ("user", "b")],
]
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "thinking": THINKING, "raising": RAISING}
TEMPLATES |= {
    f.stem: f.read_text(encoding="utf-8")
    for f in sorted((SHARED / "tokenizers" / "chat_templates").glob("*.jinja"))
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(tmp_path: Path, name: str) -> None:
    config = FAST | {"bos_token": "<|endoftext|>"}
    write_dir(tmp_path, byte_level(bos=True), config)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    ours, theirs = both(tmp_path)
    for chat in CHATS:
        messages = [Message(role, content) for role, content in chat]
        dicts = [{"role": role, "content": content} for role, content in chat]
        for prompt in (False, True):
            options = {"add_generation_prompt": prompt, "return_dict": False}
            try:
                expected = theirs.apply_chat_template(dicts, tokenize=False, **options)
            except Exception as exc:
                said = re.escape(str(exc))
                with pytest.raises(TokenizerError, match=said):
                    ours.render_chat(messages, add_generation_prompt=prompt)
                continue
            assert ours.render_chat(messages, add_generation_prompt=prompt) == expected
            ids = theirs.apply_chat_template(dicts, tokenize=True, **options)
            assert ours.encode_chat(messages, add_generation_prompt=prompt) == ids


@pytest.mark.parametrize("name", ["tokenizers/minimind", "models/stories260K"])
def test_published_directories(name: str) -> None:
    path = SHARED / name
    if not (path / "tokenizer.json").is_file():
        pytest.skip(f"{path} is not on this machine")
    ours, theirs = both(path)
    assert_same(ours, theirs, TEXTS)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False)
        stream = ours.detokenizer(ours.encode("Once upon a time"))
        assert (
            "".join([*map(stream.push, ids), stream.flush()]).strip()
            == theirs.decode(ids, skip_special_tokens=True).strip()
        )
