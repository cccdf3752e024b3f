"""Chat with a model without a chat template: it continues each text independently."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from tpirt.engine import Engine
from tpirt.types import Message, ProgressCallback, SamplingParams, Token, ignore_progress


class Continuation:
    """Replaces a :class:`tpirt.engine.Conversation`; ``system`` has no effect."""

    def __init__(self, engine: Engine):
        self.system: str | None = None
        self.turns: list[Message] = []
        self._engine = engine

    @property
    def used_tokens(self) -> int:
        """Tokens of the last text and its continuation."""
        return self._engine.cached_tokens

    def reset(self) -> None:
        """Forget the last text."""
        self.turns.clear()

    async def send(
        self,
        text: str,
        params: SamplingParams | None = None,
        progress: ProgressCallback = ignore_progress,
    ) -> AsyncGenerator[Token, None]:
        """Yield the text's continuation; see :meth:`tpirt.engine.Conversation.send`."""
        answer = ""
        continuing = self._engine.generate(text, params, progress)
        async with aclosing(continuing) as tokens:
            try:
                async for token in tokens:
                    answer += token.text
                    yield token
            finally:
                self.turns += [Message("user", text), Message("assistant", answer)]
