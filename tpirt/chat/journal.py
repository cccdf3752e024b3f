"""The journal of a conversation: a file that has all that was displayed, also after a crash.

Lines of JSON that are only appended to: the head of a saved conversation, its messages, and what
happened to them. An answer has many lines, a piece of its text on each. A last line that was torn
by a crash is ignored. :func:`tpirt.chat.saved.load` reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tpirt.chat.saved import VERSION, SavedConversation, load
from tpirt.chat.state import state_folder
from tpirt.errors import RequestError
from tpirt.locks import Lock, lock
from tpirt.types import Message

LISTED = "`tpirt chat --list` shows what there is"

_SUFFIX = ".jsonl"


class Journal:
    """Writes a conversation down as it goes; a file begins with the first message.

    Nothing here raises because of a disk: ``note`` is told once, and nothing more is written.

    Args:
        folder: of the conversations' files.
        note: shows a line to the user.

    Attributes:
        model: name of the model, for the heads of files.
    """

    def __init__(self, folder: Path, note: Callable[[str], None], model: str = ""):
        self._folder = folder
        self.model = model
        self._note = note
        self._file: int | None = None
        self._lock: Lock | None = None
        self._system: str | None = None
        self._failed = False

    def resume(self, path: Path) -> SavedConversation:
        """Go on with a file that exists; nobody else does until :meth:`close`.

        Raises:
            RequestError: it cannot be read or written, or another chat writes it.
        """
        held = lock(path)
        if held is None:
            raise RequestError(
                f"conversation {path.stem}: another chat goes on with it; end that first"
            )
        try:
            talk = load(path)
            self._file = _opened(path)
        except BaseException:
            held.release()
            raise
        self._lock, self._system = held, talk.system
        return talk

    def ask(self, system: str | None, turns: Sequence[Message], text: str) -> None:
        """Note a message of the user; ``turns`` are those before."""
        if self._file is None:
            self._begin(system, turns)
        elif system != self._system:
            self._write({"system": system})
        self._system = system
        self._write(asdict(Message("user", text)))

    def say(self, text: str) -> None:
        """Note a piece of the answer."""
        if text:
            self._write(asdict(Message("assistant", text)))

    def end(self, *, kept: bool) -> None:
        """Note the end of the answer, and whether it became part of the conversation."""
        self._write({"end": kept})
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._file)

    def close(self) -> None:
        """End this conversation; the next message begins another file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _begin(self, system: str | None, turns: Sequence[Message]) -> None:
        if self._failed:
            return
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}{_SUFFIX}"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND
            self._file = os.open(self._folder / name, flags, 0o600)
        except OSError as exc:
            self._fail(exc)
            return
        self._lock = lock(self._folder / name)
        self._write({"version": VERSION, "system": system, "model": self.model})
        for message in turns:
            self._write(asdict(message))

    def _write(self, entry: dict[str, Any]) -> None:
        if self._file is None:
            return
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        try:
            _append(self._file, line.encode("utf-8", "replace"))
        except OSError as exc:
            self.close()
            self._fail(exc)

    def _fail(self, exc: OSError) -> None:
        self._failed = True
        self._note(f"this conversation is not written to {self._folder}: {exc.strerror}")


def journal_folder() -> Path | None:
    """Where journals are; None without a home directory."""
    state = state_folder()
    return None if state is None else state / "conversations"


def journals(folder: Path | None) -> list[Path]:
    """The files of all conversations, the latest first."""
    found = folder.glob(f"*{_SUFFIX}") if folder is not None else []
    return sorted(found, key=changed_s, reverse=True)


def find(folder: Path | None, name: str) -> Path:
    """The file of the conversation called ``name``; of the latest one if that is empty.

    Raises:
        RequestError: there is none, or nothing is in it.
    """
    known = journals(folder)
    if not known:
        raise RequestError(f"there is no conversation to resume in {folder}")
    named = [path for path in known if name in ("", path.stem)]
    if not named:
        raise RequestError(f"no conversation {name!r}; {LISTED}")
    if named[0].is_file() and named[0].stat().st_size == 0:
        raise RequestError(
            f"conversation {named[0].stem} is empty: the disk was full, or the machine stopped, "
            f"before it was written; delete {named[0]}, or go on with another one: {LISTED}"
        )
    return named[0]


def _opened(path: Path) -> int:
    """Open a journal to append to it, after the end of a line that was torn.

    Raises:
        RequestError: it cannot be written.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                _append(file, b"\n")
        except BaseException:
            os.close(file)
            raise
    except OSError as exc:
        raise RequestError(f"{path}: cannot be written: {exc.strerror}") from exc
    return file


def _append(file: int, data: bytes) -> None:
    """Write all of it: a disk that is nearly full takes a part, and refuses the rest."""
    while data:
        data = data[os.write(file, data) :]


def changed_s(path: Path) -> float:
    """When a file was written last; 0 if it is gone."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0
