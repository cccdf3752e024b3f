"""The help of the command line, on narrow and wide terminals."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from tpirt.cli.main import main
from tpirt.cli.parser import build_parser

COMMANDS = (
    *("chat", "generate", "peer", "peers", "cluster"),
    *("split", "synth", "info", "eval", "store"),
)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    return int(exited.value.code or 0)


@pytest.mark.parametrize(
    "command", [(), *((name,) for name in COMMANDS), ("store", "ls"), ("store", "rm")], ids=" ".join
)
def test_help_fits_forty_columns(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = []
    for columns in (40, 120, 500):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert run(*command, "--help") == 0
        page = capsys.readouterr().out
        assert max(map(len, page.splitlines())) <= columns
        pages.append([word for word in page.split() if word != "\\"])
    assert pages[0] == pages[1] == pages[2]  # no word is cut


def test_every_option_is_explained() -> None:
    def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from options(command)
            else:
                yield action

    assert [each.option_strings for each in options(build_parser()) if not each.help] == []


@pytest.mark.parametrize("command", ["chat", "generate", "eval"])
def test_options_are_grouped(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(command, "--help")
    page = capsys.readouterr().out
    for group in (
        "model and ranks",
        "memory and cores",
        "format of weights and of the KV cache",
        "network",
        "reports",
    ):
        assert f"\n{group}:\n" in page
    assert f"example:\n  tpirt {command} " in page


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(f"\n    {name} " in printed.err for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("generat",), "no command 'generat': did you mean generate?"),
        (("xyzzy",), "no command 'xyzzy': expected one of chat, generate, "),
        (("store", "rmm"), "no action 'rmm': did you mean rm?"),
        (("--verson",), "unrecognized arguments: --verson: did you mean --version?"),
        (("info", "--quantise=int8"), "--quantise=int8: did you mean --quantize?"),
        (("info", "--quantise", "int8"), "--quantise int8: did you mean --quantize?"),
        (("store", "rm", "--sture", "x"), "did you mean --store?"),
        (("peer", "10.0.0.7:50051"), "10.0.0.7:50051: did you mean --listen 10.0.0.7:50051?"),
        (("info", "--xyzzy"), "unrecognized arguments: --xyzzy\n"),
        (("info", "--dtype", "bflot16"), "did you mean bfloat16?"),
        (("info", "--kv", "int3"), "'int3'"),
        (("info", "--dtype", "xyzzy"), "bfloat16')\n"),
    ],
)
def test_what_is_unknown_is_answered_with_the_nearest(
    arguments: tuple[str, ...], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert hint in capsys.readouterr().err
