"""Commands, settings and answers, against a real engine in this process; no terminal."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path

import pytest

from tpirt.chat.commands import COMMANDS, run_command
from tpirt.chat.console import Console
from tpirt.chat.interrupts import Interrupts
from tpirt.chat.journal import Journal
from tpirt.chat.progress import ConsoleProgress
from tpirt.chat.repl import _greet, run_chat
from tpirt.chat.session import ChatOptions, Session
from tpirt.chat.settings import NAMES, change, shown
from tpirt.engine import Engine, EngineOptions
from tpirt.errors import ConfigError, PeerLostError, RequestError
from tpirt.planning import Deployment
from tpirt.testing.models import make_model
from tpirt.types import SamplingParams, Token
from tpirt.units import format_bytes


class Chat:
    """A session whose output can be read."""

    def __init__(self, engine: Engine, system: str | None = None):
        self.out, self.err = io.StringIO(), io.StringIO()
        options = ChatOptions(
            SamplingParams(max_tokens=4), system, progress=ConsoleProgress(stream=self.err)
        )
        self.session = Session(engine, options, Console(self.out, self.err))

    async def command(self, line: str) -> str:
        before = len(self.out.getvalue())
        await run_command(self.session, line)
        return self.out.getvalue()[before:]

    async def ask(self, text: str) -> str:
        before = len(self.out.getvalue())
        await self.session.answer(text, Interrupts())
        return self.out.getvalue()[before:]


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    async with Engine.connect(
        make_model(tmp_path / "model"), EngineOptions(store=tmp_path / "store")
    ) as engine:
        yield engine


@pytest.fixture
def chat(engine: Engine) -> Chat:
    return Chat(engine)


async def test_help_names_every_command(chat: Chat) -> None:
    text = await chat.command("/help")
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize(("typed", "near"), [("/hepl", "/help"), ("/STATT x", "/stats")])
async def test_unknown_command_names_the_nearest(chat: Chat, typed: str, near: str) -> None:
    with pytest.raises(RequestError, match=f"did you mean {near}?"):
        await chat.command(typed)


async def test_unknown_command_like_no_other(chat: Chat) -> None:
    """A slash and a letter in common are no likeness."""
    for typed in ("/xyzzyx", "/new", "/retry", "/bye"):
        with pytest.raises(RequestError, match=f"no command {typed}: expected one of /help, /res"):
            await chat.command(typed)


async def test_set_shows_and_changes(chat: Chat) -> None:
    shown_all = await chat.command("/set")
    assert [line.split()[0] for line in shown_all.splitlines()] == list(NAMES)
    assert await chat.command("/set top-p 0.5") == "top_p  0.5\n"
    assert await chat.command("/set temperature=0.7") == "temperature  0.7\n"
    assert await chat.command("/set top_p") == "top_p  0.5\n"
    assert chat.session.params.temperature == 0.7


async def test_a_refused_setting_changes_nothing(chat: Chat) -> None:
    before = chat.session.params
    for line in ("/set temperature -1", "/set temprature 1", "/set top_k 1.5", "/set ="):
        with pytest.raises((ConfigError, RequestError)):
            await chat.command(line)
    assert chat.session.params == before


async def test_every_answer_follows_the_settings(chat: Chat) -> None:
    await chat.command("/set max_tokens 2")
    await chat.ask("hi")
    assert chat.session.timing is not None
    assert chat.session.timing.tokens == 2
    assert "cut at 2 tokens: --max-tokens N" in chat.err.getvalue()  # nobody can type /set


async def test_stats_and_peers(chat: Chat) -> None:
    await chat.ask("hi")
    stats = (await chat.command("/stats")).splitlines()
    assert stats[1].split()[:2] == ["0", "master"]
    assert format_bytes(chat.session.engine.deployment.ranks[0].budget.weights_bytes) in stats[1]
    prefill, decode = (stats.index(line) for line in stats if line.endswith(":"))
    assert stats[prefill].startswith("prefill of ")
    assert stats[decode] == "a decoded token, ms (medians of 3):"
    for table in (prefill, decode):
        assert stats[table + 1].split() == ["rank", "peer", "compute", "disk", "network", "other"]
        assert stats[table + 2].split()[:2] == ["0", "master"]
    assert re.fullmatch(r"longest wait: [\w ]+, in [123] of 3 tokens", stats[decode + 3])
    assert stats[-3].startswith("last answer: 4 tokens, TTFT")
    assert stats[-2].startswith("drafts: ")
    assert stats[-1].startswith("conversations: 1 kept in memory, 0 on disk (0 B a rank);")
    peers = await chat.command("/peers")
    assert "ok" in peers
    assert "lost" not in peers


async def test_stats_before_the_first_answer_have_no_times(chat: Chat) -> None:
    stats = (await chat.command("/stats")).splitlines()
    assert [line.split()[0] for line in stats] == ["rank", "0", "drafts:", "conversations:"]


async def test_reset_begins_anew(chat: Chat) -> None:
    first = await chat.ask("hi")
    await chat.ask("and now?")
    assert len(chat.session.talk.turns) == 4
    await chat.command("/reset")
    assert chat.session.talk.turns == []
    assert await chat.ask("hi") == first


async def test_system(chat: Chat) -> None:
    assert "no system message" in await chat.command("/system")
    await chat.command("/system  Be brief.\nAnd kind. ")
    assert await chat.command("/system") == "Be brief.\nAnd kind.\n"
    await chat.command("/system -")
    assert chat.session.talk.system is None


async def test_save_and_load(chat: Chat, engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    await chat.command("/system Be brief.")
    await chat.ask("hi")
    await chat.command(f"/save {file}")
    saved = list(chat.session.talk.turns)
    other = Chat(engine)
    await other.ask("forgotten")
    await other.command(f"/load {file}")
    assert (other.session.talk.system, other.session.talk.turns) == ("Be brief.", saved)
    await other.ask("more")
    assert len(other.session.talk.turns) == 4


@pytest.mark.parametrize("line", ["/save", "/load"])
async def test_file_commands_want_a_name(chat: Chat, line: str) -> None:
    with pytest.raises(RequestError, match="usage"):
        await chat.command(line)


@pytest.mark.parametrize(
    ("piped", "messages"),
    [
        (
            b"\xef\xbb\xbfDear you,\r\n\n/exit\n//x\nb\xffye\n",
            ["Dear you,\r\n\n/exit\n//x\nb\ufffdye"],
        ),
        (b"no newline", ["no newline"]),
        (b" \n\n", []),
        (b"", []),
    ],
)
async def test_piped_text_is_one_message(
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    piped: bytes,
    messages: list[str],
) -> None:
    asked: list[str] = []

    async def answer(self: Session, text: str, interrupts: Interrupts) -> None:
        asked.append(text)

    (tmp_path / "piped").write_bytes(piped)
    monkeypatch.setattr(Session, "answer", answer)
    with open(tmp_path / "piped") as stdin:  # noqa: ASYNC230
        monkeypatch.setattr(sys, "stdin", stdin)
        await run_chat(engine, ChatOptions(SamplingParams()))
    assert asked == messages
    assert ("there is nothing to answer" in capsys.readouterr().err) == (not messages)


@pytest.mark.parametrize("line", ["/exit", "/quit", "/EXIT"])
async def test_exit(chat: Chat, line: str) -> None:
    await chat.command(line)
    assert chat.session.leaving


@pytest.mark.parametrize(
    ("usable", "shown"),
    [(512, "context 512 tokens"), (99, "context 99 tokens (as memory allows; the model's is 512)")],
)
async def test_the_greeting_has_the_context_that_memory_allows(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, usable: int, shown: str
) -> None:
    monkeypatch.setattr(Deployment, "usable_context", usable)
    _greet(chat.session)
    assert chat.err.getvalue().splitlines()[0].endswith(shown)


async def test_full_context_says_what_to_do(chat: Chat) -> None:
    await chat.ask("hi")
    with pytest.raises(RequestError, match="/reset"):
        await chat.ask("x" * 600)
    assert len(chat.session.talk.turns) == 2
    await chat.ask("still there?")


async def test_an_answer_to_the_end_of_the_context(chat: Chat, engine: Engine) -> None:
    await chat.command("/set max_tokens 100000")
    await chat.ask("hi")
    assert "the context is full" in chat.err.getvalue()
    assert chat.session.talk.used_tokens == engine.context_length
    with pytest.raises(RequestError, match="/reset"):
        await chat.ask("more")


async def begun(chat: Chat) -> tuple[asyncio.Task[None], Interrupts]:
    """Begin an endless answer and wait for its third token."""
    three = asyncio.Event()
    stream, count = chat.session.console.stream, iter(range(1 << 30))

    def counted(text: str) -> None:
        stream(text)
        if next(count) == 2:
            three.set()

    chat.session.console.stream = counted  # type: ignore[method-assign]
    chat.session.params = SamplingParams(max_tokens=100_000)
    interrupts = Interrupts()
    task = asyncio.create_task(chat.session.answer("hi", interrupts))
    await three.wait()
    return task, interrupts


async def test_stopping_keeps_what_was_said(chat: Chat) -> None:
    task, interrupts = await begun(chat)
    interrupts._pass_on()
    await task
    answer = chat.session.talk.turns[1].content
    assert answer
    assert chat.out.getvalue() == answer + "\n" * (not answer.endswith("\n"))
    assert "[stopped]" in chat.err.getvalue()
    await chat.command("/set max_tokens 3")
    await chat.ask("next")
    assert len(chat.session.talk.turns) == 4


async def test_the_third_press_waits_for_nothing(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    going_on = asyncio.Event()

    async def stubborn(*_: object) -> AsyncIterator[Token]:
        yield Token(0, "!")
        while not going_on.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await going_on.wait()

    monkeypatch.setattr(chat.session.talk, "send", stubborn)
    interrupts = Interrupts()
    task = asyncio.create_task(chat.session.answer("hi", interrupts))
    while not chat.out.getvalue():  # noqa: ASYNC110
        await asyncio.sleep(0)
    interrupts._pass_on()
    interrupts._pass_on()
    assert "Ctrl-C again leaves" in chat.err.getvalue()
    assert not (await asyncio.wait({task}, timeout=0))[0]
    interrupts._pass_on()
    await task
    assert chat.session.leaving
    going_on.set()


async def test_cancelling_the_caller_is_no_stop(chat: Chat) -> None:
    task, _ = await begun(chat)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert chat.session.talk.turns


async def test_a_lost_peer_is_explained_once(
    chat: Chat, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = PeerLostError("pi:50051: connection lost")
    error.rank = 0
    monkeypatch.setattr(Engine, "broken", error)
    chat.session.complain(error)
    assert "error: pi:50051: connection lost\nNo answers without this peer" in chat.err.getvalue()
    chat.session.complain(error)
    assert chat.err.getvalue().endswith(
        "error: still without peer master; start it again, or /exit\n"
    )


async def test_base_model_continues_text(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", template=None)
    params = SamplingParams(max_tokens=4)
    async with Engine.connect(path, EngineOptions(store=tmp_path / "store")) as engine:
        chat = Chat(engine, system="ignored")
        wanted = (await engine.complete("Once", params)).text
        assert await chat.ask("Once") == wanted + "\n" * (not wanted.endswith("\n"))
        assert await chat.ask("Once") == wanted + "\n" * (not wanted.endswith("\n"))
        for line in ("/system x", f"/load {tmp_path / 'x'}"):
            with pytest.raises(RequestError, match="base model"):
                await chat.command(line)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_tokens", "7", 7),
        ("max_tokens", "none", None),
        ("temperature", "1e-1", 0.1),
        ("min-p", "0.05", 0.05),
        ("seed", "3", 3),
        ("seed", "none", None),
        ("stop", "END", ("END",)),
        ("stop", '["\\n", "a b"]', ("\n", "a b")),
        ("stop", "off", ()),
    ],
)
def test_change(name: str, text: str, value: object) -> None:
    changed = change(SamplingParams(seed=1, stop=("x",)), name, text)
    field = name.replace("-", "_")
    assert getattr(changed, field) == value
    assert change(changed, field, shown(changed, field)) == changed


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("temperature", text) for text in ("warm", "nan", "inf", "-0.1")),
        *(("stop", text) for text in ("[", "[1]", '[""]')),
        *(("max_tokens", text) for text in ("0", "1.5", "")),
        ("seed", "-1"),
        ("no_such", "1"),
    ],
)
def test_change_refuses(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=name):
        change(SamplingParams(), name, text)


def test_every_field_can_be_set() -> None:
    assert {field.name for field in fields(SamplingParams)} == set(NAMES)
    for name in NAMES:
        assert change(SamplingParams(), name, shown(SamplingParams(), name)) == SamplingParams()


async def test_what_is_displayed_is_in_the_journal(engine: Engine, tmp_path: Path) -> None:
    """Also the last piece before the terminal goes away."""

    class Gone(Console):
        shown = ""

        def stream(self, text: str) -> None:
            self.shown += text
            raise BrokenPipeError

    console = Gone(io.StringIO(), io.StringIO())
    journal = Journal(tmp_path / "talks", print)
    options = ChatOptions(SamplingParams(max_tokens=4), journal=journal)
    with contextlib.closing(journal), pytest.raises(BrokenPipeError):
        await Session(engine, options, console).answer("hi", Interrupts())
    (file,) = (tmp_path / "talks").iterdir()
    said = [json.loads(line) for line in file.read_text().splitlines()]
    pieces = [entry["content"] for entry in said if entry.get("role") == "assistant"]
    assert console.shown
    assert "".join(pieces) == console.shown
