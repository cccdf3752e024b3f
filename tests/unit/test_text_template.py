"""Chat templates: where they are found, what they may use, how their failures read."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from tests.support.text import CHATML, RAISING, byte_level, write_dir
from tpirt.errors import TokenizerError
from tpirt.text import ChatTemplate, Tokenizer
from tpirt.types import Message

HI = [Message("user", "hi")]


def render(source: str, messages: list[Message] | None = None, *, prompt: bool = True) -> str:
    template = ChatTemplate(source, "chat_template.jinja")
    special = {"bos_token": "<s>"}
    return template.render(
        HI if messages is None else messages, special, add_generation_prompt=prompt
    )


def test_chatml() -> None:
    assert render(CHATML) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "{{ bos_token }}{{ eos_token }}|{{ tools is none }}|{{ documents is none }}",
            "<s>|True|True",
        ),
        ("{{ {'a': '<é&>'} | tojson }}", '{"a": "<é&>"}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{%- set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}", "2"),
        ("{{ dict(a=1).a }}{{ messages[0]['role'] }}", "1user"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
    ],
)
def test_environment(source: str, expected: str) -> None:
    assert render(source) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (RAISING, "chat_template.jinja: the chat template failed: no system role"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[0].content + 1 }}", "the chat template failed"),
        ("{{ messages.append(1) }}", "the chat template failed"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|the chat template failed"),
        ("{{ namespace(_x=1) }}", "not allowed"),
    ],
)
def test_failures_have_the_templates_own_words(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        render(source, [Message("system", "s"), *HI])


def test_broken_syntax_names_file_and_line() -> None:
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja: .* \(line 2\): "):
        render("\n{% if %}")


def test_no_messages() -> None:
    with pytest.raises(TokenizerError, match="at least one message"):
        render(CHATML, [])


def test_no_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(write_dir(tmp_path, byte_level()))
    assert not tokenizer.has_chat_template
    with pytest.raises(TokenizerError, match=r"has no chat template .* chat_template\.jinja"):
        tokenizer.render_chat(HI)


def test_precedence(tmp_path: Path) -> None:
    def text() -> str:
        tokenizer = Tokenizer.from_dir(tmp_path)
        assert tokenizer.has_chat_template
        return tokenizer.render_chat(HI)

    write_dir(tmp_path, byte_level(), {"chat_template": ""})  # an empty one is none
    (tmp_path / "chat_template.jinja").write_text("\n")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "legacy"}))
    assert text() == "legacy"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "listed"}]
    write_dir(tmp_path, byte_level(), {"chat_template": named})
    assert text() == "listed"
    write_dir(tmp_path, byte_level(), {"chat_template": "config"})
    assert text() == "config"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert text() == "config"
    (tmp_path / "additional_chat_templates" / "default.jinja").write_text("additional")
    assert text() == "additional"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert text() == "file"


def test_a_list_without_a_default(tmp_path: Path) -> None:
    config = {"chat_template": [{"name": "rag", "template": "x"}]}
    with pytest.raises(TokenizerError, match='expected a template named "default", got rag'):
        Tokenizer.from_dir(write_dir(tmp_path, byte_level(), config))
