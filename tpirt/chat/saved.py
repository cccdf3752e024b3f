"""Conversations as JSON files: ``{"version": 1, "system": ..., "messages": [...]}``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpirt.errors import RequestError
from tpirt.types import Message
from tpirt.weights.files import sync_file

VERSION = 1
_MOST_BYTES = 64 << 20  # a larger file is not a conversation
_ROLES = ("user", "assistant")


@dataclass(frozen=True)
class SavedConversation:
    """A file's content: the system message, and the turns of user and assistant in pairs."""

    system: str | None
    messages: Sequence[Message]


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
        _write(path.resolve(), json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    except OSError as exc:
        raise RequestError(f"{path}: cannot be written: {exc.strerror}") from exc


def load(path: Path) -> SavedConversation:
    """Read and check a file.

    Raises:
        RequestError: it cannot be read, or is not a conversation.
    """
    path = Path(os.path.expanduser(path))
    try:
        if path.exists() and not path.is_file():
            raise RequestError(f"{path}: not a regular file")
        if path.stat().st_size > _MOST_BYTES:
            raise RequestError(f"{path}: not a saved conversation: too large")
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as exc:
        raise RequestError(f"{path}: cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise RequestError(f"{path}: not a saved conversation: not JSON ({exc})") from exc
    try:
        return _checked(content)
    except ValueError as exc:
        raise RequestError(f"{path}: not a saved conversation: {exc}") from exc


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


def _message(index: int, entry: Any) -> Message:
    if not isinstance(entry, dict):
        raise ValueError(f"messages[{index}]: expected an object with role and content")
    role, content = entry.get("role"), entry.get("content")
    if role != _ROLES[index % 2]:
        raise ValueError(f"messages[{index}].role: expected {_ROLES[index % 2]}, got {role!r}")
    if not isinstance(content, str):
        raise ValueError(f"messages[{index}].content: expected a string, got {content!r}")
    return Message(role, content)


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            sync_file(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
