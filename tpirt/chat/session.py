"""One chat: the conversation, the settings and the current answer."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import dataclass

from tpirt.chat.base_model import Continuation
from tpirt.chat.console import Console
from tpirt.chat.interrupts import Interrupts
from tpirt.chat.journal import Journal
from tpirt.chat.progress import ConsoleProgress
from tpirt.chat.saved import SavedConversation
from tpirt.chat.status import Timing
from tpirt.engine import Conversation, Engine
from tpirt.errors import LogitsError, MemoryLimitError, PeerLostError, RequestError, TpirtError
from tpirt.terminal import is_terminal
from tpirt.types import Progress, SamplingParams

_ANEW = "/reset begins a new conversation"
_MAKE_ROOM = f"{_ANEW}; /save FILE keeps this one."

Around = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class ChatOptions:
    """How to chat.

    Attributes:
        params: how tokens are chosen.
        system: the system message.
        prompt: a single prompt to answer instead of a chat.
        each_line: whether piped input has one message or command per line; else it is one message.
        parse_special: read control tokens within messages as control tokens.
        model_name: for the banner; by default the model's type.
        progress: for prefills; by default a new one. Its ``quiet`` applies to the chat, too.
        journal: has the conversation written down as it goes; None for none, and no history of what
            was typed.
        resumed: the conversation to go on with.
    """

    params: SamplingParams
    system: str | None = None
    prompt: str | None = None
    each_line: bool = False
    parse_special: bool = False
    model_name: str | None = None
    progress: ConsoleProgress | None = None
    journal: Journal | None = None
    resumed: SavedConversation | None = None


class Session:
    """The state of a chat, shared with commands."""

    def __init__(self, engine: Engine, options: ChatOptions, console: Console):
        self.engine = engine
        self.options = options
        self.console = console
        self.progress = options.progress or ConsoleProgress()
        self.progress.before = console.end_line_on_terminal
        self.params = options.params
        self.is_base = not engine.tokenizer.has_chat_template
        self.talk: Conversation | Continuation
        self.talk = (
            Continuation(engine)
            if self.is_base
            else Conversation(engine, options.system, parse_special=options.parse_special)
        )
        self.journal = None if self.is_base else options.journal
        if options.resumed is not None and not self.is_base:
            self.talk.turns.extend(options.resumed.messages)
        self.timing: Timing | None = None  # of the last answer
        self.leaving = False
        self._told_broken = False
        self._kept = False  # of an answer that failed, the text so far

    async def answer(
        self,
        text: str,
        interrupts: Interrupts,
        around: Around = nullcontext,
    ) -> None:
        """Answer a message; Ctrl-C stops the answer and keeps its text so far.

        Args:
            text: the message.
            interrupts: source of Ctrl-C.
            around: context manager entered during the answer.

        Raises:
            TpirtError: the request failed.
            CancelledError: the caller was cancelled (not the answer by Ctrl-C).
        """
        self.timing = Timing()
        stop = _Stop(asyncio.ensure_future(self._stream(text)), self)
        with interrupts.to(stop), around():
            await stop.end()
        self._told_broken = False
        if not self.leaving:
            self._show_status(stop.pressed > 0)

    def begin(self) -> None:
        """Begin a new conversation; the system message stays."""
        self.talk.reset()
        if self.journal is not None:
            self.journal.close()

    def complain(self, error: TpirtError) -> None:
        """Show an error of an answer with advice, and what of the answer is kept."""
        if self._kept:
            self._kept = False
            self.console.note("[the answer so far is kept: your next message follows it]")
        if error is not self.engine.broken:
            self.console.complain(error)
        elif self._told_broken:
            self.console.complain(f"still without {self._lost}; start it again, or /exit")
        else:
            self._told_broken = True
            self.console.complain(error)
            self.console.note(
                "No answers without this peer. Each message tries to reach it again: start it "
                "first (local ones start with tpirt: /exit). "
                + (
                    "`tpirt chat --resume` takes this conversation up."
                    if self.journal is not None
                    else "/save FILE keeps the conversation for /load FILE."
                )
            )

    @property
    def lost_rank(self) -> int | None:
        """The rank whose peer is lost; None if all are connected."""
        broken = self.engine.broken
        return broken.rank if isinstance(broken, PeerLostError) else None

    @property
    def _lost(self) -> str:
        rank = self.lost_rank
        return "a peer" if rank is None else f"peer {self.engine.peers[rank].peer_id}"

    async def _stream(self, text: str) -> None:
        assert self.timing is not None
        self.progress(Progress("waiting for the first token", 0, 0))
        ids: list[int] = []
        turns = len(self.talk.turns)
        if self.journal is not None:
            self.journal.ask(self.talk.system, self.talk.turns, text)
        try:
            async with aclosing(self.talk.send(text, self.params, self.progress)) as tokens:
                async for token in tokens:
                    if self.timing.tokens == 0:
                        self.progress.close()
                    self.timing.count()
                    ids.append(token.id)
                    if self.journal is not None:  # first: all that was displayed is on disk
                        self.journal.say(token.text)
                    self.console.stream(token.text)
                    self.timing.finish_reason = token.finish_reason
        except (RequestError, MemoryLimitError) as exc:
            if not self.talk.turns:
                raise
            raise type(exc)(f"{exc}. {_MAKE_ROOM}") from exc
        except TpirtError as exc:
            self._kept = bool(ids) and not self.is_base and not isinstance(exc, LogitsError)
            raise
        finally:
            if self.journal is not None:
                self.journal.end(kept=len(self.talk.turns) > turns)
            self.progress.close()
            self.console.end_line()
            if unknown := self.engine.tokenizer.unknown(ids):
                self.console.note(f"[{unknown}]")

    def _show_status(self, stopped: bool) -> None:
        assert self.timing is not None
        if stopped:
            begun = self.timing.tokens > 0
            self.console.note("[stopped]" if begun else "[stopped] the message is not kept")
        elif self.timing.finish_reason == "length":
            self.console.note(self._why_cut())
        if self.timing.tokens and not self.progress.quiet:
            used = self.talk.used_tokens
            usable = max(used, self.engine.deployment.usable_context)  # token by token, more fit
            self.console.status(f"{self.timing}, context {used}/{usable}")

    @property
    def _is_typed(self) -> bool:
        """Whether somebody types the messages, and can type commands."""
        return self.options.prompt is None and is_terminal(sys.stdin)

    def _why_cut(self) -> str:
        if self.talk.used_tokens >= self.engine.context_length:
            return "[the context is full" + (f": {_ANEW}]" if self._is_typed else "]")
        assert self.timing is not None
        typed = self._is_typed
        more = "/set max_tokens allows more" if typed else "--max-tokens N for more"
        return f"[cut at {self.timing.tokens} tokens: {more}]"


class _Stop:
    """Stops an answer at the first press; stops waiting for it at the third."""

    def __init__(self, task: asyncio.Task[None], session: Session):
        self.pressed = 0
        self._task = task
        self._session = session
        self._given_up = asyncio.Event()

    def __call__(self) -> None:
        self.pressed += 1
        if self.pressed == 1:
            self._task.cancel()
        elif self.pressed == 2:
            self._session.progress.close()
            self._session.console.note(
                "still stopping, the peers finish the current block; Ctrl-C again leaves tpirt"
            )
        else:
            self._session.leaving = True
            self._given_up.set()

    async def end(self) -> None:
        """Wait for the end of the answer; raises its error, unless it was stopped.

        If cancelled, cancels the answer and waits for its end.
        """
        giving_up = asyncio.ensure_future(self._given_up.wait())
        try:
            await asyncio.wait({self._task, giving_up}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._task.cancel()
            await asyncio.wait({self._task})
            raise
        finally:
            giving_up.cancel()
            self._task.add_done_callback(_look_at)
        if self._task.done() and not (self._task.cancelled() and self.pressed):
            self._task.result()


def _look_at(task: asyncio.Task[None]) -> None:
    """Retrieve the result of a task that may not be awaited, so that asyncio is silent."""
    if not task.cancelled():
        task.exception()
