"""The commands of a chat, which begin with ``/``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from tpirt.chat import saved, settings
from tpirt.chat.session import Session
from tpirt.chat.status import peers_table, recoveries_table, stats_table, times_tables
from tpirt.errors import RequestError
from tpirt.terminal import definitions

_ASSIGNMENT = re.compile(r"([\w-]+)(?:\s*=\s*|\s+)?(.*)", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """``run`` gets the session and the text after the name."""

    usage: str
    about: str
    run: Callable[[Session, str], Awaitable[None]]


async def run_command(session: Session, line: str) -> None:
    """Execute a line that begins with ``/``.

    Raises:
        TpirtError: no such command, or the command failed.
    """
    name, *rest = line.split(maxsplit=1)
    command = COMMANDS.get(name.lower())
    if command is None:
        raise RequestError(f"no command {name}: {_hint(name)} Write // to begin a message with /.")
    await command.run(session, "".join(rest).strip())


def _hint(name: str) -> str:
    # Without the slash, which would make any two short names alike.
    names = [each.removeprefix("/") for each in COMMANDS]
    near = difflib.get_close_matches(name.lower().removeprefix("/"), names, 1, 0.65)
    return f"did you mean /{near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}."


async def _help(session: Session, _: str) -> None:
    shown = {id(command): command for command in COMMANDS.values()}.values()
    rows = [(command.usage, command.about) for command in shown]
    rows.append(("//TEXT", "send a message that begins with /"))
    rows.append(("Ctrl-C", "stop the answer, or clear the line"))
    rows.append(("Alt-Enter", "a new line within the message"))
    session.console.say(*definitions(rows, session.console.width))


async def _reset(session: Session, _: str) -> None:
    session.begin()
    session.engine.reset()
    session.console.note("A new conversation begins.")


async def _system(session: Session, text: str) -> None:
    if session.is_base:
        raise RequestError("a base model has no system message")
    if not text:
        session.console.say(session.talk.system or "There is no system message.")
        return
    session.talk.system = None if text == "-" else text
    session.console.note("Takes effect with the next message, for the whole conversation.")


async def _set(session: Session, text: str) -> None:
    match = _ASSIGNMENT.fullmatch(text)
    if match is not None and match[2]:
        session.params = settings.change(session.params, match[1], match[2])
    elif text and match is None:
        raise RequestError("usage: /set NAME VALUE")
    names = (settings.canonical(match[1]),) if match else settings.NAMES
    values = [(name, settings.shown(session.params, name)) for name in names]
    session.console.say(*definitions(values, session.console.width))


async def _stats(session: Session, _: str) -> None:
    ranks = await session.engine.stats()
    width = session.console.width
    session.console.say(*stats_table(ranks, width), *times_tables(ranks, width))
    if losses := session.engine.recoveries:
        session.console.say(*recoveries_table(losses, width))
    if session.timing is not None:
        session.console.say(f"last answer: {session.timing.tokens} tokens, {session.timing}")
    session.console.say(session.engine.explain_drafts(), session.engine.explain_cache())
    if session.engine.goodput.targets:
        session.console.say(session.engine.goodput.explain())


async def _peers(session: Session, _: str) -> None:
    plan, width = session.engine.deployment, session.console.width
    session.console.say(*peers_table(plan, session.lost_rank, width))


async def _save(session: Session, name: str) -> None:
    if not name:
        raise RequestError("usage: /save FILE")
    talk = session.talk
    saved.save(Path(name), saved.SavedConversation(talk.system, talk.turns))
    session.console.note(f"{len(talk.turns)} messages saved.")


async def _load(session: Session, name: str) -> None:
    if not name:
        raise RequestError("usage: /load FILE")
    if session.is_base:
        raise RequestError("a base model continues texts; it has no conversation to load")
    found = saved.load(Path(name))
    session.begin()
    session.talk.system = found.system
    session.talk.turns.extend(found.messages)
    session.console.note(
        f"{len(found.messages)} messages loaded; the next answer reads them first."
    )


async def _exit(session: Session, _: str) -> None:
    session.leaving = True


_EXIT = Command("/exit", "leave; so do /quit and Ctrl-D", _exit)

COMMANDS = {
    "/help": Command("/help", "this list", _help),
    "/reset": Command("/reset", "begin a new conversation; the system message stays", _reset),
    "/system": Command("/system [TEXT]", "show or set the system message; - removes it", _system),
    "/set": Command("/set [NAME VALUE]", "show or set how tokens are chosen", _set),
    "/stats": Command("/stats", "memory, traffic and times of the last answer by rank", _stats),
    "/peers": Command("/peers", "the part and the state of every peer", _peers),
    "/save": Command("/save FILE", "write the conversation to a file", _save),
    "/load": Command("/load FILE", "continue a saved conversation", _load),
    "/exit": _EXIT,
    "/quit": _EXIT,
}
