"""Conversations as JSON files: ``{"version": 1, "system": ..., "messages": [...]}``.

A journal (:mod:`tpirt.chat.journal`) has the same in lines, the first without messages, and each
message in a line of its own, or in several.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpirt.errors import RequestError
from tpirt.files import read_regular, replace_file
from tpirt.types import Message

VERSION = 1
_MOST_BYTES = 64 << 20  # a larger file is not a conversation
_OUTLINE_BYTES = 1 << 20
_ROLES = ("user", "assistant")


@dataclass(frozen=True)
class SavedConversation:
    """A file's content.

    Attributes:
        system: the system message.
        messages: the turns of user and assistant, in pairs.
        model: name of the model; empty if unknown.
        unanswered: the user's last message, if there is no answer to it.
        cut: whether the last answer ended with the program.
    """

    system: str | None
    messages: Sequence[Message]
    model: str = ""
    unanswered: str = ""
    cut: bool = False


def save(path: Path, conversation: SavedConversation) -> None:
    """Write the file atomically, readable by its owner only.

    Raises:
        RequestError: it cannot be written, or the existing file is not a conversation.
    """
    path = Path(os.path.expanduser(path))
    if path.exists():
        try:
            load(path)
        except RequestError as exc:
            raise RequestError(f"not written, give another name: {exc}") from exc
    content = {
        "version": VERSION,
        "system": conversation.system,
        "messages": [asdict(message) for message in conversation.messages],
    }
    try:
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        replace_file(path.resolve(), text.encode(errors="replace"), 0o600)
    except OSError as exc:
        raise RequestError(f"{path}: cannot be written: {exc.strerror}") from exc


def load(path: Path) -> SavedConversation:
    """Read and check a file.

    Raises:
        RequestError: it cannot be read, or is not a conversation.
    """
    path = Path(os.path.expanduser(path))
    try:
        data = read_regular(path, _MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise RequestError(f"{path}: not a saved conversation: too large")
        if (head := _journal_head(data)) is not None:
            return _journalled(head, data.split(b"\n")[1:-1])  # without a torn one
        content = json.loads(data.decode("utf-8-sig"))
    except OSError as exc:
        raise RequestError(f"{path}: cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise RequestError(f"{path}: not a saved conversation: not JSON ({exc})") from exc
    try:
        return _checked(content)
    except ValueError as exc:
        raise RequestError(f"{path}: not a saved conversation: {exc}") from exc


def outline(path: Path) -> tuple[str, str]:
    """The model of a journal, and the user's first message; each empty if it is not found."""
    model = ""
    with contextlib.suppress(OSError, ValueError):
        for line in read_regular(path, _OUTLINE_BYTES).split(b"\n"):
            match json.loads(line):
                case {"version": _, "model": str(model)}:
                    pass
                case {"role": "user", "content": str(text)}:
                    return model, text
    return model, ""


def _checked(content: Any) -> SavedConversation:
    if not isinstance(content, dict):
        raise ValueError("expected a JSON object")
    version, system = content.get("version"), content.get("system")
    if version != VERSION:
        raise ValueError(f"version: expected {VERSION}, got {version!r}")
    if not (system is None or isinstance(system, str)):
        raise ValueError(f"system: expected a string or null, got {system!r}")
    entries = content.get("messages")
    if not isinstance(entries, list) or len(entries) % 2:
        raise ValueError("messages: expected a list of alternating user and assistant messages")
    return SavedConversation(system, [_message(*entry) for entry in enumerate(entries)])


def _journal_head(data: bytes) -> dict[str, Any] | None:
    """The first line of a journal; None if it is something else."""
    first, newline, _ = data.partition(b"\n")
    if newline and first.startswith(b'{"version"'):
        with contextlib.suppress(ValueError):
            head = json.loads(first)
            return head if isinstance(head, dict) and "messages" not in head else None
    return None


def _journalled(head: dict[str, Any], lines: Iterable[bytes]) -> SavedConversation:
    """Read the whole lines of a journal.

    Raises:
        ValueError: it is not a journal.
    """
    system, model = _checked({**head, "messages": []}).system, str(head.get("model", ""))
    turns: list[Message] = []
    asked: str | None = None
    answer: str | None = None
    ended = True
    for number, line in enumerate(lines, start=2):
        try:
            entry = json.loads(line)
        except ValueError:  # torn by a crash, before the conversation was resumed
            continue
        match entry:
            case {"role": "user", "content": str(text)}:
                turns += _pair(asked, answer)
                asked, answer, ended = text, None, False
            case {"role": "assistant", "content": str(text)} if asked is not None:
                answer = (answer or "") + text
            case {"end": bool(kept)}:
                answer, ended = (answer or "") if kept else None, True
                asked = asked if kept else None
            case {"system": str() | None as system}:
                pass
            case _:
                raise ValueError(f"line {number}: expected a message, got {line[:80]!r}")
    turns += _pair(asked, answer)
    return SavedConversation(
        system,
        turns,
        model,
        unanswered=asked or "" if answer is None else "",
        cut=answer is not None and not ended,
    )


def _pair(asked: str | None, answer: str | None) -> list[Message]:
    if asked is None or answer is None:
        return []
    return [Message("user", asked), Message("assistant", answer)]


def _message(index: int, entry: Any) -> Message:
    if not isinstance(entry, dict):
        raise ValueError(f"messages[{index}]: expected an object with role and content")
    role, content = entry.get("role"), entry.get("content")
    if role != _ROLES[index % 2]:
        raise ValueError(f"messages[{index}].role: expected {_ROLES[index % 2]}, got {role!r}")
    if not isinstance(content, str):
        raise ValueError(f"messages[{index}].content: expected a string, got {content!r}")
    return Message(role, content)
