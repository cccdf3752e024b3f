"""Guesses from a small model with the same tokenizer, resident on the master."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence as Items
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING

import torch

from tpirt.engine.drafts.base import Guess
from tpirt.engine.sequence import Answer
from tpirt.errors import RequestError
from tpirt.types import SamplingParams

if TYPE_CHECKING:
    from tpirt.engine.engine import Engine

_PRIOR = 0.7
_SMOOTHING = 0.2  # weight of the latest time


class ModelDrafter:
    """Has a small model go on greedily.

    Its keys and values stay between calls, as those of any request: what was rejected is dropped,
    and only what is new is computed.

    Args:
        engine: of the small model; its owner closes it.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._guess_s = 0.0  # a guess takes

    def prospects(self, most: int) -> list[Guess]:
        """See :class:`Drafter`."""
        return [_guess(-1, depth) for depth in range(most)]

    def seconds(self, depth: int) -> float:
        """See :class:`Drafter`."""
        return self._guess_s * depth

    async def propose(self, answers: Items[Answer], most: int) -> list[list[Guess]]:
        """See :class:`Drafter`."""
        began_s = time.perf_counter()
        found = await asyncio.gather(*(self._continue(answer.ids, most) for answer in answers))
        longest = max(map(len, found))
        if longest:
            took_s = (time.perf_counter() - began_s) / longest
            change = took_s - self._guess_s
            self._guess_s += change * (_SMOOTHING if self._guess_s else 1)
        return found

    def learn(self, ids: Items[int], logits: torch.Tensor) -> None:
        """See :class:`Drafter`."""

    def forget(self, answer: Answer) -> None:
        """See :class:`Drafter`."""

    async def _continue(self, ids: Items[int], most: int) -> list[Guess]:
        if len(ids) + most > self._engine.context_length:
            return []
        params = SamplingParams(max_tokens=most)
        guesses: list[Guess] = []
        # Too many at once, or ids that the small model lacks: that answer goes without guesses.
        with suppress(RequestError):
            async with aclosing(self._engine.generate(list(ids), params)) as tokens:
                async for token in tokens:
                    guesses.append(_guess(token.id, len(guesses)))
        return guesses


def _guess(token: int, depth: int) -> Guess:
    return Guess(token, depth - 1, f"model {depth}", _PRIOR)
