"""The master dies: its conversations are on disk, and another chat goes on with them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tpirt.chat.journal import Journal, find
from tpirt.chat.saved import load
from tpirt.testing.processes import PeerProcess, killed_at_exit, start_cli

Peers = Callable[[int], list[PeerProcess]]


@pytest.fixture
def arguments(model: Path, tmp_path: Path) -> list[str]:
    options = ["chat", "--model", str(model), "--threads", "1", "--temperature", "0", "--quiet"]
    return [*options, "--store", str(tmp_path / "store"), "--each-line"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"XDG_STATE_HOME": str(tmp_path / "state")}


def talk(
    arguments: list[str], environment: dict[str, str], *options: str, typed: str
) -> tuple[str, str]:
    process = start_cli(*arguments, *options, env=environment, stdin=subprocess.PIPE)
    with killed_at_exit(process) as chat:
        out, errors = chat.communicate(typed, timeout=60)
        assert chat.returncode == 0, errors
        return out, errors


def test_a_chat_goes_on_after_a_crash(
    arguments: list[str], environment: dict[str, str], peers: Peers, tmp_path: Path
) -> None:
    (peer,) = peers(1)
    addresses = ("--peers", peer.address)
    folder = tmp_path / "state" / "tpirt" / "conversations"
    process = start_cli(*arguments, *addresses, env=environment, stdin=subprocess.PIPE)
    with killed_at_exit(process) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write("hello there\n")
        chat.stdin.flush()
        shown = os.read(chat.stdout.fileno(), 64)
        chat.send_signal(signal.SIGKILL)
        shown += chat.stdout.buffer.read()
    (file,) = folder.iterdir()
    kept = load(find(folder, ""))
    (question, answer) = kept.messages
    assert question.content == "hello there"
    assert kept.cut
    assert shown.decode("utf-8", "replace").rstrip("\ufffd") in answer.content
    limit = ("--max-tokens", "4")
    talk(arguments, environment, *addresses, *limit, "--resume", typed="and now?\n")
    after = load(find(folder, file.stem))
    assert after.messages[:2] == kept.messages
    assert [message.content for message in after.messages[2:3]] == ["and now?"]
    assert len(after.messages) == 4
    assert not after.cut
    assert len(list(folder.iterdir())) == 1


def test_a_conversation_that_another_chat_has_is_refused_before_a_model_is_loaded(
    arguments: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    talk(arguments, environment, "--max-tokens", "4", typed="hi\n")
    (file,) = (tmp_path / "state" / "tpirt" / "conversations").iterdir()
    nowhere = ("--model", str(tmp_path / "nowhere"), "--resume")
    journal = Journal(file.parent, print)
    journal.resume(file)
    done = start_cli(*arguments, *nowhere, env=environment)
    with killed_at_exit(done) as chat:
        _, errors = chat.communicate(timeout=60)
    journal.close()
    assert chat.returncode == 2
    assert "another chat goes on with it" in errors


def test_a_model_that_nobody_named_does_not_go_on_with_a_conversation(
    arguments: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    """Before anything is loaded or sent."""
    talk(arguments, environment, "--max-tokens", "4", typed="hi\n")
    (file,) = (tmp_path / "state" / "tpirt" / "conversations").iterdir()
    before = file.read_bytes()
    done = start_cli("chat", "--fresh", "--resume", env=environment)
    with killed_at_exit(done) as chat:
        _, errors = chat.communicate(timeout=60)
    assert chat.returncode == 2
    assert re.search(r"conversation \S+ was with tiny, and this chat is with demo: give", errors)
    assert file.read_bytes() == before


def test_no_journal(arguments: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    talk(arguments, environment, "--max-tokens", "4", "--no-journal", typed="hi\n")
    assert not (tmp_path / "state").exists()
    done = start_cli(*arguments, "--resume", env=environment)
    with killed_at_exit(done) as chat:
        _, errors = chat.communicate(timeout=60)
    assert chat.returncode == 2
    assert "there is no conversation to resume" in errors
