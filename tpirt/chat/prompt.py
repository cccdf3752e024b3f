"""Reading user input on a capable terminal: editing, history, completion."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.application.current import set_app
from prompt_toolkit.completion import (
    CompleteEvent,
    Completer,
    Completion,
    DummyCompleter,
    PathCompleter,
    WordCompleter,
)
from prompt_toolkit.data_structures import Size
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth, Output, create_output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from tpirt.chat import settings
from tpirt.chat.commands import COMMANDS
from tpirt.chat.reader import PROMPT
from tpirt.chat.state import state_folder
from tpirt.files import open_regular
from tpirt.terminal import unfiltered, wants_color


class PromptReader:
    """See :class:`tpirt.chat.reader.Reader`.

    Args:
        out: the terminal to draw on.
        history: history file; None for no history.
    """

    def __init__(self, out: TextIO, history: Path | None):
        self._session: PromptSession[str] = PromptSession(
            history=open_history(history),
            completer=CommandCompleter(),
            complete_style=CompleteStyle.READLINE_LIKE,  # without a menu below the line
            complete_while_typing=False,
            key_bindings=_bindings(),
            prompt_continuation="  ",
            output=_output(unfiltered(out)),
        )

    async def read(self) -> str | None:
        """See :class:`Reader`."""
        try:
            text = await self._session.prompt_async(PROMPT, handle_sigint=False)
        except EOFError:
            return None
        return clean(text)

    def interrupt(self) -> None:
        """See :class:`Reader`; for signals from outside, since Ctrl-C is read as a key."""
        if self._session.app.is_running:
            self._session.app.exit(exception=KeyboardInterrupt())

    def aside(self, work: Callable[[], None]) -> None:
        """See :class:`Reader`; also from other threads."""
        app = self._session.app
        if not app.is_running or app.loop is None:
            work()
        elif asyncio._get_running_loop() is not app.loop:
            app.loop.call_soon_threadsafe(self.aside, work)
        else:
            with set_app(app):
                run_in_terminal(work)

    def release(self) -> None:
        """See :class:`Reader`."""
        if self._session.app.is_running:
            with contextlib.suppress(OSError):
                self._session.app.renderer.erase()


class CommandCompleter(Completer):
    """Completes commands and their arguments."""

    def __init__(self) -> None:
        files = PathCompleter(expanduser=True)
        self._following: dict[str, Completer] = {
            "/set": WordCompleter(settings.NAMES),
            "/save": files,
            "/load": files,
            "/system": DummyCompleter(),
        }

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        """See :class:`prompt_toolkit.completion.Completer`."""
        typed, space, rest = document.text_before_cursor.partition(" ")
        if space:
            following = self._following.get(typed, DummyCompleter())
            yield from following.get_completions(Document(rest), event)
        elif typed:
            for name in COMMANDS:
                if name.startswith(typed):
                    yield Completion(name + " " * (name in self._following), -len(typed))


class _SafeHistory(FileHistory):
    """A history file; if it can no longer be written, the chat goes on without it."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def clean(text: str) -> str:
    """Replace typed bytes that are not UTF-8 with U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def history_file() -> Path | None:
    """The file of the input history: ``$XDG_STATE_HOME/tpirt/history`` or its default.

    None without a home directory.
    """
    state = state_folder()
    return None if state is None else state / "history"


def open_history(path: Path | None) -> History:
    """Open the history file, readable by its owner only; in memory if that fails."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600))
        os.close(open_regular(path))
    except OSError:
        return InMemoryHistory()
    return _SafeHistory(path)


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def newline(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    if hasattr(signal, "SIGTSTP"):  # a POSIX system

        @bindings.add("c-z")
        def suspend(event: KeyPressEvent) -> None:
            os.kill(os.getpid(), signal.SIGTSTP)  # TerminalModes stops the rest of the group

    return bindings


def _output(out: TextIO) -> Output:
    if sys.platform == "win32":
        return create_output(out)

    def size() -> Size:
        columns, lines = 0, 0
        with contextlib.suppress(OSError):
            columns, lines = os.get_terminal_size(out.fileno())
        return Size(rows=lines or 24, columns=columns or 80)

    # Cursor position requests are only needed for menus, and some terminals never answer.
    term, depth = os.environ.get("TERM"), None if wants_color() else ColorDepth.DEPTH_1_BIT
    return Vt100_Output(out, size, term=term, default_color_depth=depth, enable_cpr=False)
