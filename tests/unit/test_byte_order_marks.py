"""Files and input that begin with a byte order mark, as some editors write them."""

from __future__ import annotations

import io
import json
import sys
from codecs import BOM_UTF8
from pathlib import Path

import pytest

from tpirt.chat.saved import SavedConversation, load, save
from tpirt.cli.main import main
from tpirt.engine.model import open_model
from tpirt.testing.models import CHATML, make_model
from tpirt.types import Message


def mark(file: Path) -> None:
    file.write_bytes(BOM_UTF8 + file.read_bytes())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory all of whose text files have the mark."""
    path = make_model(tmp_path / "model", shards=2, template=None)
    (path / "chat_template.jinja").write_text(CHATML)
    (path / "special_tokens_map.json").write_text("{}")
    for file in path.iterdir():
        if file.suffix in (".json", ".jinja"):
            mark(file)
    return path


def test_files_of_a_model(model: Path) -> None:
    opened = open_model(model)
    opened.checkpoint.close()
    assert opened.tokenizer.render_chat([Message("user", "hi")]).startswith("<|im_start|>user")


def test_a_conversation(tmp_path: Path) -> None:
    talk = SavedConversation("system", [])
    save(tmp_path / "talk.json", talk)
    mark(tmp_path / "talk.json")
    assert load(tmp_path / "talk.json") == talk


def test_prompts(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(BOM_UTF8 + b"hello")
    options = ("--model", str(model), "--store", str(tmp_path / "store"), "--threads", "1")
    command = ("generate", *options, "--max-tokens", "1", "--quiet", "--json")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    for prompt in (("--prompt-file", str(file)), ("--prompt", "-")):
        assert main([*command, *prompt]) == 0
        assert len(json.loads(capsys.readouterr().out)["prompt_token_ids"]) == len("hello")
    assert main(["eval", *options, "--text", str(file), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == len("hello") - 1
