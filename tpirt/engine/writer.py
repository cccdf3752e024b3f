"""From generated ids to tokens with text, and when an answer ends."""

from __future__ import annotations

from collections.abc import Sequence

from tpirt.text import StopMatcher, Tokenizer
from tpirt.types import SamplingParams, Token


class Writer:
    """Turns generated ids into tokens with printable text, and decides when to stop."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        eos_ids: frozenset[int],
        limit: int,
    ):
        self._detokenizer = tokenizer.detokenizer(prompt_ids)
        self._stops = StopMatcher(params.stop)
        self._end_ids = eos_ids | tokenizer.added_ids_of(params.stop)
        self._left = limit

    @property
    def left(self) -> int:
        """How many more tokens there may be."""
        return self._left

    def push(self, token_id: int) -> Token:
        """Account for one more token."""
        self._left -= 1
        if token_id in self._end_ids:
            return Token(token_id, self._rest(), "stop")
        text, stopped = self._stops.push(self._detokenizer.push(token_id))
        if stopped:
            return Token(token_id, text, "stop")
        if self._left == 0:
            return Token(token_id, text + self._rest(), "length")
        return Token(token_id, text)

    def _rest(self) -> str:
        text, stopped = self._stops.push(self._detokenizer.flush())
        return text if stopped else text + self._stops.flush()
