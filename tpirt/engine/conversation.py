"""A conversation of several turns, with keys and values cached between them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from tpirt.engine.engine import Engine
from tpirt.errors import LogitsError
from tpirt.text import continue_chat
from tpirt.types import (
    Message,
    ProgressCallback,
    SamplingParams,
    Token,
    ignore_progress,
)


class Conversation:
    """The messages, and their ids in the KV cache.

    Args:
        engine: answers.
        system: the system message; None for none.
        parse_special: encode control tokens within messages as control tokens, not as text; see
            :meth:`tpirt.text.Tokenizer.encode_chat`.
    """

    def __init__(self, engine: Engine, system: str | None = None, *, parse_special: bool = False):
        self.system = system
        self._parse_special = parse_special
        self.turns: list[Message] = []
        self._engine = engine
        self._ids: list[int] = []
        self._text = ""

    @property
    def messages(self) -> list[Message]:
        """All messages, the system message first."""
        head = [Message("system", self.system)] if self.system else []
        return head + self.turns

    @property
    def used_tokens(self) -> int:
        """Tokens of context used so far."""
        return len(self._ids)

    def reset(self) -> None:
        """Start a new conversation; the system message stays."""
        self.turns.clear()
        self._ids, self._text = [], ""

    async def send(
        self,
        text: str,
        params: SamplingParams | None = None,
        progress: ProgressCallback = ignore_progress,
    ) -> AsyncGenerator[Token, None]:
        """Add a user's message and yield the answer's tokens.

        If cancelled or closed early, the partial answer is kept. One that fails or is cancelled
        before its first token, or fails by a LogitsError, does not change the conversation.

        Raises: as :meth:`Engine.generate` and :meth:`Tokenizer.render_chat`.
        """
        asked = [*self.messages, Message("user", text)]
        prompt_ids, prompt_text = continue_chat(
            self._engine.tokenizer,
            self._ids,
            self._text,
            asked,
            parse_special=self._parse_special,
        )
        ids: list[int] = []
        answer = ""
        try:
            answering = self._engine.generate(prompt_ids, params, progress)
            async with aclosing(answering) as tokens:
                async for token in tokens:
                    ids.append(token.id)
                    answer += token.text
                    yield token
        except LogitsError:  # with the partial answer, every later one would fail, too
            ids.clear()
            raise
        finally:
            if ids:
                self.turns += [Message("user", text), Message("assistant", answer)]
                self._ids = prompt_ids + ids
                self._text = prompt_text + self._engine.tokenizer.decode(ids)
