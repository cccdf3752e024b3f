"""The chat loop on the master: read a message, stream the answer."""

from __future__ import annotations

import sys
from contextlib import nullcontext

from tpirt.chat.commands import run_command
from tpirt.chat.console import Console
from tpirt.chat.interrupts import Interrupts
from tpirt.chat.modes import TerminalModes
from tpirt.chat.reader import LEAVE_HINT, PlainReader, Reader
from tpirt.chat.session import Around, ChatOptions, Session
from tpirt.engine import Engine
from tpirt.errors import TpirtError
from tpirt.terminal import is_capable, is_terminal

__all__ = ["ChatOptions", "run_chat"]


async def run_chat(engine: Engine, options: ChatOptions) -> None:
    """Chat on this process's terminal, or answer piped input.

    On a terminal, the chat continues after errors, and Ctrl-C stops the answer. Otherwise, and
    with ``options.prompt``, an error ends the chat, and SIGINT is left to the caller.

    Raises:
        TpirtError: an answer or command failed, unless input is a terminal.
    """
    console = Console(sys.stdout, sys.stderr)
    session = Session(engine, options, console)
    session.progress.close()
    if session.is_base:
        console.note(
            "This is a base model (it has no chat template): it does not answer, it continues "
            "your text, each time from the beginning."
        )
    if options.prompt is not None:
        await session.answer(options.prompt, Interrupts())
    elif is_terminal(sys.stdin):
        await _talk(session, remembers=options.journal is not None)
    else:
        await _work_off(session)


async def _talk(session: Session, *, remembers: bool) -> None:
    """Chat on a terminal."""
    _greet(session)
    interrupts = Interrupts()
    modes = TerminalModes()
    reader = _terminal_reader(remembers)
    session.progress.aside = reader.aside
    around = nullcontext if isinstance(reader, PlainReader) else modes.echo_off
    with interrupts.installed(), modes.guarded(reader):
        while not session.leaving:
            try:
                with interrupts.to(reader.interrupt):
                    text = await reader.read()
            except KeyboardInterrupt:
                session.console.note(f"({LEAVE_HINT})")
                continue
            if text is None:
                return
            try:
                await _handle(session, text, interrupts, around)
            except TpirtError as exc:
                session.complain(exc)


async def _work_off(session: Session) -> None:
    """Answer piped input: one message, or one message or command per line.

    A program that writes a line and waits for the answer writes messages line by line.
    """
    closed = sys.stdin is None or sys.stdin.closed
    reader = PlainReader(None if closed else sys.stdin.fileno())
    if not session.options.each_line:
        message = await reader.read_all()
        if message is not None:
            if message.strip():
                await session.answer(message, Interrupts())
            elif not session.progress.quiet:
                session.console.note("standard input is empty: there is nothing to answer")
            return
        if not session.progress.quiet:
            session.console.note("standard input stays open: each line is a message from here on")
    while not session.leaving and (text := await reader.read()) is not None:
        await _handle(session, text, Interrupts(), nullcontext)


async def _handle(session: Session, text: str, interrupts: Interrupts, around: Around) -> None:
    if not text.strip():
        return
    if text.startswith("/") and not text.startswith("//"):
        await run_command(session, text)
    else:
        await session.answer(text.removeprefix("/"), interrupts, around)


def _terminal_reader(remembers: bool) -> Reader:
    streams = (sys.stdout, sys.stderr)
    out = next(filter(is_capable, streams), None)
    if out is None:
        return PlainReader(sys.stdin.fileno(), next(filter(is_terminal, streams), None))
    from tpirt.chat.prompt import PromptReader, history_file

    return PromptReader(out, history_file() if remembers else None)


def _greet(session: Session) -> None:
    engine, options = session.engine, session.options
    if not session.progress.quiet:
        ranks = f"{engine.world_size} rank" + "s" * (engine.world_size > 1)
        parts = [options.model_name or engine.config.model_type, ranks]
        parts.append(engine.deployment.dtype.name)
        usable, longest = engine.deployment.usable_context, engine.context_length
        less = "" if usable == longest else f" (as memory allows; the model's is {longest})"
        session.console.note(", ".join([*parts, f"context {usable} tokens{less}"]))
        session.console.note("/help for commands, Ctrl-C stops an answer, Ctrl-D leaves")
