"""Saved conversations: round trip, refusals, nothing half written."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tpirt.chat.saved import SavedConversation, load, save
from tpirt.errors import RequestError
from tpirt.types import Message

TALK = SavedConversation(
    "Be brief.", [Message("user", "héllo\n\U0001f44b"), Message("assistant", "")]
)


def test_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    save(file, TALK)
    assert load(file) == TALK
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    save(file, SavedConversation(None, []))
    assert load(file) == SavedConversation(None, [])
    assert os.listdir(tmp_path) == ["talk.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    save(tmp_path / "real.json", TALK)
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    save(tmp_path / "link.json", SavedConversation(None, []))
    assert (tmp_path / "link.json").is_symlink()
    assert load(tmp_path / "real.json").messages == []


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("precious")
    with pytest.raises(RequestError, match=r"another name.*not a saved conversation"):
        save(file, TALK)
    assert file.read_text() == "precious"
    with pytest.raises(RequestError, match="not a regular file"):
        save(tmp_path, TALK)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    file = tmp_path / "talk.json"
    save(file, TALK)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RequestError, match="No space left"):
        save(file, SavedConversation(None, []))
    assert load(file) == TALK
    assert os.listdir(tmp_path) == ["talk.json"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be written: No such file"):
        save(tmp_path / "no" / "talk.json", TALK)
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        load(tmp_path / "no" / "talk.json")


def content(**changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return {"version": 1, "system": None, "messages": messages, **changes}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "expected a JSON object"),
        (json.dumps(content(version=2)), "version: expected 1, got 2"),
        (json.dumps(content(system=3)), "system: expected a string"),
        (json.dumps(content(messages=None)), "messages: expected a list"),
        (json.dumps(content(messages=[{"role": "user", "content": ""}])), "alternating"),
        (json.dumps(content(messages=[1, 2])), r"messages\[0\]: expected an object"),
        (
            json.dumps(content(messages=[{"role": "user", "content": ""}] * 2)),
            r"messages\[1\].role: expected assistant, got 'user'",
        ),
        (json.dumps(content(messages=[{"role": "user"}, {}])), r"messages\[0\].content"),
    ],
)
def test_what_is_no_conversation(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(text)
    with pytest.raises(RequestError, match=f"talk.json: not a saved conversation: .*{said}"):
        load(file)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(RequestError, match="not JSON"):
        load(tmp_path / "talk.json")


def test_home_directory_of_nobody_is_a_folder_that_is_not_there() -> None:
    with pytest.raises(RequestError, match="~nobody-there"):
        load(Path("~nobody-there/talk.json"))
