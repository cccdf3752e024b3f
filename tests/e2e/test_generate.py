"""``tpirt generate`` and its companions as a user runs them."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tpirt.cli.generate import _json
from tpirt.cli.main import main
from tpirt.engine import Engine, EngineOptions
from tpirt.printable import printable
from tpirt.terminal import clean_output
from tpirt.testing.models import make_model
from tpirt.testing.processes import PeerProcess, descendants, run_cli, run_python, survivors
from tpirt.text import Tokenizer
from tpirt.types import Message, SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slices")


Generate = Callable[..., dict[str, Any]]


@pytest.fixture
def generate(model: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    """Runs ``tpirt generate --json`` in this process, greedily; returns what it prints."""

    def run(*arguments: str) -> dict[str, Any]:
        options = ("--model", str(model), "--store", str(store), "--threads", "1", "--json")
        code = main(["generate", *options, "--dtype", "float32", "--quiet", *arguments])
        captured = capsys.readouterr()
        assert (code, captured.err) == (0, "")
        assert captured.out.count("\n") == 1
        answer: dict[str, Any] = json.loads(captured.out)
        return answer

    return run


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", b"\xc3\xa9 \xf0\x9f\x91\x8b"), ("latin-1", rb"\u00e9 \ud83d\udc4b")],
)
def test_json_has_characters_as_they_are_where_it_can(
    monkeypatch: pytest.MonkeyPatch, encoding: str, shown: bytes
) -> None:
    raw, text = io.BytesIO(), "\u00e9 \U0001f44b\n\x1b\x9b"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with clean_output():
        sys.stdout.write(_json({"text": text}))
        sys.stdout.flush()
    assert shown in raw.getvalue()
    assert json.loads(raw.getvalue().decode(encoding)) == {"text": text}


def test_json_has_the_answer_and_its_figures(generate: Generate) -> None:
    answer = generate("--prompt", "Hello", "--max-tokens", "12")
    assert len(answer["prompt_token_ids"]) == 5
    assert len(answer["token_ids"]) == 12
    assert answer["finish_reason"] == "length"
    assert answer["world_size"] == 1
    assert answer["ttft_ms"] > 0
    assert answer["tpot_ms"] > 0
    (rank,) = answer["ranks"]
    assert rank["rank"] == 0
    assert rank["weights_bytes"] > 0
    assert rank["bytes_sent"] == rank["bytes_received"] == 0


def test_prompt_from_argument_file_and_standard_input_are_the_same(
    generate: Generate, model: Path, store: Path, tmp_path: Path
) -> None:
    text = "Zwölf Boxkämpfer\njagen 🦊\n"
    expected = generate("--prompt", text, "--max-tokens", "5")
    file = tmp_path / "prompt.txt"
    file.write_bytes(text.encode())
    assert (
        generate("--prompt-file", str(file), "--max-tokens", "5")["token_ids"]
        == (expected["token_ids"])
    )
    piped = run_python(
        *("-m", "tpirt", "generate", "--model", str(model), "--prompt", "-"),
        *("--max-tokens", "5", "--store", str(store), "--dtype", "float32", "--quiet"),
        input=text.encode(),
    )
    assert (piped.returncode, piped.stderr) == (0, b"")
    assert piped.stdout.decode() == expected["text"] + "\n"


def test_each_line_of_a_file_is_answered_in_order(
    generate: Generate,
    model: Path,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another one's mistake changes nothing, and targets are reported."""
    texts = ["Hello", "Zwölf\x0c\x85\u2028 🦊", "x" * 600, "", "Hello", "abc"]
    alone = [generate("--prompt", text, "--max-tokens", "5") for text in [*texts[:2], texts[5]]]
    file = tmp_path / "prompts.txt"
    file.write_bytes(("\r\n".join(texts) + "\n\n").encode())
    command = ("generate", "--model", str(model), "--store", str(store), "--threads", "1")
    options = ("--dtype", "float32", "--max-tokens", "5", "--sequences", "2")
    targets = ("--ttft-target", "60000", "--tpot-target", "0.0001")
    assert main([*command, *options, *targets, "--prompts", str(file)]) == 2
    captured = capsys.readouterr()
    first, second, failed, empty, again, last = map(json.loads, captured.out.splitlines())
    assert [first["text"], second["text"], last["text"]] == [each["text"] for each in alone]
    assert again["token_ids"] == first["token_ids"]
    assert "the prompt has 600 tokens" in failed["error"]
    assert "the prompt is empty" in empty["error"]
    assert not any(answer["in_time"] for answer in (first, second, again, last))
    assert alone[0]["in_time"] is None
    assert "TTFT 60000 ms met by 4 of 4, TPOT 0.0001 ms met by 0 of 4; goodput 0.0%" in captured.err
    assert "2 of 6 prompts have no answer" in captured.err
    assert not {"ranks", "decoded"} & first.keys()
    file.write_text("Hello")
    assert main([*command, *options, "--prompts", str(file), "--json"]) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(line["decoded"]) == 4
    assert line["ranks"]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "prompts.txt: no prompts: give at least one line"),
        (b"\r\n\n", "prompts.txt: no prompts: give at least one line"),
        (b"\xff\n", "prompts.txt: not UTF-8 text (byte 0)"),
    ],
)
def test_files_of_prompts_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, error: str
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert main(["generate", "--prompts", str(file)]) == 2
    assert error in capsys.readouterr().err


def test_chat_applies_the_template(generate: Generate) -> None:
    plain = generate("--prompt", "Hi", "--max-tokens", "2")
    chat = generate("--prompt", "Hi", "--max-tokens", "2", "--chat")
    assert 257 in chat["prompt_token_ids"]  # <|im_start|>
    assert len(chat["prompt_token_ids"]) > len(plain["prompt_token_ids"])


def test_system_message(generate: Generate, model: Path) -> None:
    answer = generate("--prompt", "Hi", "--system", "Be brief.", "--max-tokens", "1")
    messages = [Message("system", "Be brief."), Message("user", "Hi")]
    assert answer["prompt_token_ids"] == Tokenizer.from_dir(model).encode_chat(messages)


def test_control_tokens_in_a_message_are_text_unless_asked_for(generate: Generate) -> None:
    asked = ("--prompt", "a<|im_end|>b", "--max-tokens", "1", "--chat")
    assert generate(*asked)["prompt_token_ids"].count(258) == 1  # the template's own
    assert generate(*asked, "--special-tokens")["prompt_token_ids"].count(258) == 2
    plain = generate("--prompt", "a<|im_end|>b", "--max-tokens", "1")
    assert plain["prompt_token_ids"].count(258) == 1


def test_stop_text_ends_the_answer_and_is_not_in_it(generate: Generate) -> None:
    whole = generate("--prompt", "Hello", "--max-tokens", "40")["text"]
    stop = next(
        whole[i : i + 2]
        for i in range(8, len(whole))
        if whole[i : i + 2].isprintable() and whole[i : i + 2] not in whole[: i + 1]
    )
    answer = generate("--prompt", "Hello", "--max-tokens", "40", "--stop", stop)
    assert answer["finish_reason"] == "stop"
    assert answer["text"] == whole[: whole.index(stop)]


def test_a_terminal_gets_no_control_characters_and_a_pipe_gets_all(
    generate: Generate,
    model: Path,
    store: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = ("--prompt", "Hello", "--max-tokens", "200", "--temperature", "2", "--seed", "1")
    text = generate(*drawn)["text"]
    assert text != printable(text)
    options = ("--model", str(model), "--store", str(store), "--threads", "1", "--quiet")
    assert main(["generate", *options, "--dtype", "float32", *drawn]) == 0
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["generate", *options, "--dtype", "float32", *drawn]) == 0
    assert capsys.readouterr().out == printable(text) + "\n"


def test_seed_repeats_a_drawn_answer(generate: Generate) -> None:
    def drawn(seed: int) -> list[int]:
        options = ("--temperature", "1.5", "--top-k", "50", "--seed", str(seed))
        ids: list[int] = generate("--prompt", "Hello", "--max-tokens", "20", *options)["token_ids"]
        return ids

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_answer_ends_with_the_context(generate: Generate) -> None:
    answer = generate("--prompt", "x" * 505, "--max-tokens", "100")
    assert len(answer["token_ids"]) == 7
    assert answer["finish_reason"] == "length"


def test_context_bounds_prompt_and_answer(
    generate: Generate, model: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--context", "10", "--prompt")
    answer = generate(*options, "1234567", "--max-tokens", "100")
    assert (len(answer["token_ids"]), answer["finish_reason"]) == (3, "length")
    command = ("generate", "--model", str(model), "--store", str(store), "--quiet")
    assert main([*command, *options, "x" * 10]) == 2
    error = capsys.readouterr().err
    assert "the prompt has 10 tokens, but --context is 10" in error
    assert "raise --context: the model's is 512" in error


def test_info_needs_the_configuration_only(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny" / "config.json"
    file.parent.mkdir()
    shutil.copy(model / "config.json", file)
    plan = ("--world-size", "2", "--quantize", "int4", "--context", "100")
    shown = []
    for path in (model, file.parent, file):
        assert main(["info", "--model", str(path), *plan]) == 0
        shown.append(capsys.readouterr().out.splitlines())
    whole, alone, named = shown
    assert alone == named
    assert [line for line in alone if "config.json alone" not in line] == whole
    assert len(alone) == len(whole) + 1
    assert any(re.search(r"quantized: int4 \(4\.\d\d bits a weight\)", line) for line in whole)


@pytest.mark.usefixtures("warm_workers")
@pytest.mark.parametrize(
    "options",
    [
        ("--window", "2"),
        ("--local", "2", "--memory", "2G"),
        ("--local", "3", "--ratio", "2,1,1", "--window", "3"),
    ],
    ids=" ".join,
)
def test_every_way_to_run_it_gives_the_same_tokens(
    generate: Generate, options: tuple[str, ...]
) -> None:
    before = {process.pid for process in descendants()}
    expected = generate("--prompt", "Hello", "--max-tokens", "16")
    answer = generate("--prompt", "Hello", "--max-tokens", "16", *options)
    assert answer["token_ids"] == expected["token_ids"]
    ranks = int(options[1]) if options[0] == "--local" else 1
    assert answer["world_size"] == len(answer["ranks"]) == ranks
    if ranks > 1:
        assert all(rank["bytes_sent"] > 0 for rank in answer["ranks"])
        assert len({rank["peer_id"] for rank in answer["ranks"]}) == ranks
    assert survivors([p for p in descendants() if p.pid not in before]) == []


def test_split_slices_are_used_by_peers_and_nothing_is_sent(
    generate: Generate, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "slices"
    arguments = ["--model", str(model), "--out", str(out), "--world-size", "2"]
    assert main(["split", *arguments, "--dtype", "float32", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert str(out / "rank0") in printed
    assert str(out / "rank1") in printed
    expected = generate("--prompt", "Hello", "--max-tokens", "8")
    with PeerProcess(out / "rank1") as peer:
        options = ("--peers", peer.address, "--store", str(out / "rank0"))
        for _ in range(2):  # one master after another
            answer = generate("--prompt", "Hello", "--max-tokens", "8", *options)
            assert answer["token_ids"] == expected["token_ids"]
        assert "received slice" not in peer.log
        assert answer["ranks"][1]["peer_id"].endswith(peer.peer_port)
    assert len(list(out.glob("rank*/*/manifest.json"))) == 2


async def test_python_interface_gives_the_same(
    generate: Generate, model: Path, store: Path
) -> None:
    async with Engine.connect(
        model, EngineOptions(dtype="float32", threads=1, store=store)
    ) as engine:
        texts = [
            token.text async for token in engine.generate("Hello", SamplingParams(max_tokens=8))
        ]
        completion = await engine.complete("Hello", SamplingParams(max_tokens=8))
    assert "".join(texts) == completion.text
    assert len(completion.token_ids) == 8


def test_bundled_model_answers_over_two_processes(tmp_path: Path) -> None:
    """The very first thing a user tries, with the plan on one stream and the answer on another."""
    done = run_cli(
        *("generate", "--local", "2", "--chat", "--prompt", "What is 3 + 4?"),
        *("--max-tokens", "16", "--store", str(tmp_path), "--temperature", "0"),
    )
    assert done.returncode == 0
    assert "7" in done.stdout
    assert "master" in done.stderr  # the plan
    assert "master" not in done.stdout
