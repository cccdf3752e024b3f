"""What a drafter is."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple, Protocol

from tpirt.engine.sequence import Answer


class Guess(NamedTuple):
    """A guessed token.

    Attributes:
        token: its id.
        kind: guesses of one kind are right about equally often; how often is learnt.
        prior: how often, before anything is known.
    """

    token: int
    kind: str
    prior: float


class Drafter(Protocol):
    """Guesses how answers go on. It runs on the master: only there are token ids."""

    free: bool  # whether guessing costs next to nothing

    async def propose(self, answers: Items[Answer], most: int) -> list[list[Guess]]:
        """Guess up to ``most`` tokens that follow each answer's ids, each given the ones before."""
        ...

    def forget(self, answer: Answer) -> None:
        """An answer has ended."""
        ...
