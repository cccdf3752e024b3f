"""What a model directory says about ends and lengths of answers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.text import CHATML, LLAMA2, byte_level, sentencepiece, write_dir
from tpirt.chat.console import Console
from tpirt.chat.interrupts import Interrupts
from tpirt.chat.session import ChatOptions, Session
from tpirt.cli.main import main
from tpirt.engine.defaults import GenerationDefaults
from tpirt.engine.model import open_model
from tpirt.errors import CheckpointError
from tpirt.model.decoder import Decoder
from tpirt.testing.cluster import memory_engine
from tpirt.testing.models import make_model
from tpirt.text import Tokenizer
from tpirt.types import SamplingParams

END, START, TURN = 256, 257, 258  # <|endoftext|>, <|im_start|>, <|im_end|>


def defaults(path: Path, **generation: Any) -> GenerationDefaults:
    (path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8-sig")
    return GenerationDefaults.from_dir(path, ())


@pytest.mark.parametrize("answer", ["{{ m.content }}<|im_end|>\n", "{{ m.content }}\n"])
def test_end_tokens_of_all_files_together(tmp_path: Path, answer: str) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + answer + "{% endfor %}"
    model = make_model(tmp_path, template=template, eos_token_id=7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    opened = open_model(model)
    opened.checkpoint.close()
    turn = {TURN} if "<|im_end|>" in answer else set()
    assert opened.defaults.eos_ids == {3, 4, 7, END} | turn


def test_end_tokens_of_a_tokenizer(tmp_path: Path) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": LLAMA2}
    llama = Tokenizer.from_dir(write_dir(tmp_path, sentencepiece(), names))
    assert llama.end_ids() == {2}
    raising = {"chat_template": "{{ raise_exception('no') }}"}
    assert Tokenizer.from_dir(write_dir(tmp_path, sentencepiece(), raising)).end_ids() == set()
    tokenizer = byte_level()
    chatml = Tokenizer.from_dir(write_dir(tmp_path, tokenizer, {"chat_template": CHATML}))
    assert chatml.end_ids() == {tokenizer.token_to_id("<|im_end|>")}


def test_lengths_and_stops(tmp_path: Path) -> None:
    nothing = defaults(tmp_path)
    assert (nothing.sampling.max_tokens, nothing.chat.max_tokens) == (256, None)
    assert nothing.sampling.stop == ()
    new = defaults(tmp_path, max_new_tokens=9, max_length=20, stop_strings="Y")
    assert (new.sampling.max_tokens, new.chat.max_tokens) == (9, 9)
    assert new.sampling.stop == new.chat.stop == ("Y",)
    length = defaults(tmp_path, max_length=20, stop_strings=["a", "b"])
    assert length.sampling.max_tokens is length.chat.max_tokens is None
    assert length.max_length == 20
    assert length.sampling.stop == ("a", "b")
    for wrong in ({"max_new_tokens": 0}, {"max_length": "x"}, {"stop_strings": [1]}):
        with pytest.raises(CheckpointError, match=f"generation_config.json: {next(iter(wrong))}"):
            defaults(tmp_path, **wrong)


async def test_an_answer_without_a_limit_runs_to_the_end(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", max_position_embeddings=24)
    prompt = list(range(40, 48))
    async with memory_engine(model, 1) as engine:

        async def length(**params: Any) -> int:
            return len((await engine.complete(prompt, SamplingParams(**params))).token_ids)

        assert await length(max_tokens=None) == 16
        engine.defaults = replace(engine.defaults, max_length=11)
        assert await length(max_tokens=None) == 3
        assert await length(max_tokens=5) == 5
        engine.defaults = replace(engine.defaults, max_length=8)
        assert await length(max_tokens=None) == 16


def emit(monkeypatch: pytest.MonkeyPatch, *ids: int) -> None:
    """Have every model answer these ids, again and again."""
    at = 0

    async def chosen(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        nonlocal at
        at += 1
        logits = torch.zeros(len(hidden), self.config.vocab_size)
        logits[-1, ids[(at - 1) % len(ids)]] = 9
        return logits

    monkeypatch.setattr(Decoder, "logits", chosen)


async def test_stop_at_a_control_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emit(monkeypatch, 60, 61, START)
    async with memory_engine(make_model(tmp_path / "model"), 1) as engine:
        params = SamplingParams(max_tokens=9, stop=("<|im_start|>\n", "no"))
        answer = await engine.complete("hi", params)
    assert (answer.token_ids, answer.finish_reason) == ([60, 61, START], "stop")


@pytest.mark.parametrize("json_option", [(), ("--json",)])
def test_generate_says_what_an_answer_lacks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    json_option: tuple[str, ...],
) -> None:
    emit(monkeypatch, 60, 262)
    model = make_model(tmp_path / "model", max_position_embeddings=24)
    options = ("--model", str(model), "--store", str(tmp_path / "store"), "--threads", "1")
    command = ("generate", *options, *json_option, "--prompt", "hello")
    assert main([*command, "--max-tokens", "4"]) == 0
    notes = capsys.readouterr().err.splitlines()[-2:]
    assert notes[0] == "tpirt: stopped after 4 tokens: --max-tokens N for more"
    assert notes[1].startswith(
        "tpirt: token id 262 is not in the tokenizer and has no text (2 of 4"
    )
    assert main([*command, "--max-tokens", "100"]) == 0
    assert "stopped at the end of the context of 24 tokens" in capsys.readouterr().err
    assert main([*command, "--max-tokens", "4", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


async def test_a_chat_says_that_tokens_have_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    emit(monkeypatch, 262, TURN)
    async with memory_engine(make_model(tmp_path / "model"), 1) as engine:
        options = ChatOptions(engine.defaults.chat)
        session = Session(engine, options, Console(sys.stdout, sys.stderr))
        await session.answer("hi", Interrupts())
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "[token id 262 is not in the tokenizer and has no text (1 of 2 tokens): do tokenizer and "
        "model belong together?]\n"
    )
