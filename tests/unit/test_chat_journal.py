"""Journals: what was displayed is on disk, whatever ends the program."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tpirt.chat.journal import Journal, find, journals
from tpirt.chat.saved import SavedConversation, load
from tpirt.cli import chat
from tpirt.cli.main import main
from tpirt.errors import RequestError
from tpirt.types import Message

HELLO = [Message("user", "héllo\n"), Message("assistant", "hi there")]
MORE = [Message("user", "and?"), Message("assistant", "no more")]


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def journal(tmp_path: Path, notes: list[str]) -> Iterator[Journal]:
    journal = Journal(tmp_path / "talks", notes.append, "tiny")
    yield journal
    journal.close()


def hold(journal: Journal, system: str | None, before: list[Message], turn: list[Message]) -> None:
    journal.ask(system, before, turn[0].content)
    for piece in (turn[1].content[:3], "", turn[1].content[3:]):
        journal.say(piece)
    journal.end(kept=True)


def only(folder: Path) -> Path:
    (path,) = (folder / "talks").iterdir()
    return path


def test_round_trip(tmp_path: Path, journal: Journal) -> None:
    assert not (tmp_path / "talks").exists()
    hold(journal, "Be brief.", [], HELLO)
    hold(journal, "Be briefer.", HELLO, MORE)
    path = only(tmp_path)
    assert load(path) == SavedConversation("Be briefer.", HELLO + MORE, "tiny")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_every_prefix_of_the_file_is_a_conversation(tmp_path: Path, journal: Journal) -> None:
    """A crash can end the file anywhere."""
    hold(journal, None, [], HELLO)
    head = only(tmp_path).read_bytes().index(b"\n") + 1
    hold(journal, None, HELLO, MORE)
    content = only(tmp_path).read_bytes()
    torn = tmp_path / "torn.jsonl"
    seen = set()
    for end in range(head, len(content) + 1):
        torn.write_bytes(content[:end])
        found = load(torn)
        assert found.messages[:2] in ([], HELLO) or found.cut
        seen.add((len(found.messages), found.unanswered, found.cut))
    assert seen == {
        (0, "", False),
        (0, HELLO[0].content, False),
        (2, "", True),
        (2, "", False),
        (2, MORE[0].content, False),
        (4, "", True),
        (4, "", False),
    }


def test_a_torn_file_is_gone_on_with(tmp_path: Path, journal: Journal) -> None:
    hold(journal, None, [], HELLO)
    journal.ask(None, HELLO, "lost")
    journal.close()
    path = only(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    found = journal.resume(path)
    hold(journal, None, list(found.messages), MORE)
    assert load(path).messages == HELLO + MORE


def test_an_answer_that_is_not_kept(tmp_path: Path, journal: Journal) -> None:
    journal.ask(None, [], "a")
    journal.say("nan")
    journal.end(kept=False)
    hold(journal, None, [], HELLO)
    assert load(only(tmp_path)) == SavedConversation(None, HELLO, "tiny")


def test_another_conversation_is_another_file(tmp_path: Path, journal: Journal) -> None:
    hold(journal, None, [], HELLO)
    first = only(tmp_path)
    journal.close()
    hold(journal, None, HELLO, MORE)  # as after /load
    os.utime(first, (1, 1))
    path = find(tmp_path / "talks", "")
    assert path != first
    assert load(path).messages == HELLO + MORE
    assert find(tmp_path / "talks", first.stem) == first
    assert journals(tmp_path / "talks") == [path, first]
    with pytest.raises(RequestError, match=r"no conversation 'x'; `tpirt chat --list` shows"):
        find(tmp_path / "talks", "x")
    with pytest.raises(RequestError, match=r"no conversation to resume in .*empty"):
        find(tmp_path / "empty", "")


def test_an_empty_file_is_answered_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").touch()
    os.mkfifo(tmp_path / "two.jsonl")
    assert find(tmp_path, "two") == tmp_path / "two.jsonl"  # refused when it is read
    os.remove(tmp_path / "two.jsonl")
    for name in ("", "one"):
        with pytest.raises(RequestError, match=r"one is empty: .*delete .*one\.jsonl, or .*--list"):
            find(tmp_path, name)


def test_the_list_of_conversations(
    tmp_path: Path,
    journal: Journal,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(chat, "_MOST_LISTED", 3)
    monkeypatch.setattr("tpirt.chat.journal.journal_folder", lambda: tmp_path / "talks")
    assert main(["chat", "--list"]) == 0
    assert "there is no conversation in" in capsys.readouterr().out
    hold(journal, None, [], HELLO)
    journal.close()
    hold(journal, None, [], [Message("user", "long\n" * 20), HELLO[1]])
    latest = journals(tmp_path / "talks")[0]
    latest.with_stem("empty").touch()
    latest.with_stem("torn").write_text('{"version": 1, "mod')
    for seconds, name in enumerate(("torn", "empty", latest.stem)):
        os.utime(latest.with_stem(name), (seconds + (1 << 32),) * 2)
    assert main(["chat", "--list"]) == 0
    head, *rows, more = capsys.readouterr().out.splitlines()
    assert head.split() == ["conversation", "last", "written", "model", "begins", "with"]
    assert rows[0].startswith(latest.stem)
    assert rows[0].endswith("tiny   " + ("long " * 20)[:37] + "...")
    assert [row.split()[0] for row in rows[1:]] == ["empty", "torn"]
    assert more == f"and 1 more in {tmp_path / 'talks'}"


def test_two_chats_do_not_share_a_file(tmp_path: Path, journal: Journal) -> None:
    hold(journal, None, [], HELLO)
    other = Journal(tmp_path, lambda _: None)
    with pytest.raises(RequestError, match="another chat goes on with it"):
        other.resume(only(tmp_path))


@pytest.mark.parametrize(
    "turn",
    [
        [Message("user", ""), Message("assistant", "you said nothing")],
        [Message("user", "go"), Message("assistant", "")],
        [Message("user", ""), Message("assistant", "")],
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_empty_messages_are_kept(
    tmp_path: Path, journal: Journal, turn: list[Message], loaded: bool
) -> None:
    """``loaded`` ones were in a file that /load read."""
    if loaded:
        hold(journal, None, turn, MORE)
    else:
        hold(journal, None, [], turn)
        hold(journal, None, turn, MORE)
    found = load(only(tmp_path))
    assert (found.messages, found.cut) == (turn + MORE, False)


@pytest.mark.parametrize("function", ["pread", "write"])
def test_a_file_that_cannot_be_gone_on_with_is_let_go(
    tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    hold(journal, None, [], HELLO)
    journal.close()
    path = only(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    opened = psutil.Process().num_fds()
    with monkeypatch.context() as patch:
        patch.setattr(os, function, broken)
        with pytest.raises(RequestError, match="cannot be written: Input/output error"):
            journal.resume(path)
    assert psutil.Process().num_fds() == opened
    assert Journal(tmp_path, lambda _: None).resume(path).messages == HELLO


def test_a_write_that_takes_a_part_is_gone_on_with(
    tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    hold(journal, "Be brief.", [], HELLO)
    assert load(only(tmp_path)) == SavedConversation("Be brief.", HELLO, "tiny")


def test_a_disk_that_refuses_is_told_once(
    tmp_path: Path, journal: Journal, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for _ in range(2):
        hold(journal, None, [], HELLO)
    folder = tmp_path / "talks"
    assert notes == [f"this conversation is not written to {folder}: No space left on device"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"version": 2}\n', "version: expected 1"),
        ('{"version": 1}\n{"role": "robot", "content": ""}\n', "line 2: expected a message"),
        ('{"version": 1}\n[1]\n', "line 2"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(content)
    with pytest.raises(RequestError, match=f"not a saved conversation: .*{words}"):
        load(path)
