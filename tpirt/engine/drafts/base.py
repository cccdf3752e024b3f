"""What a drafter is."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple, Protocol

import torch

from tpirt.engine.sequence import Answer


class Guess(NamedTuple):
    """A guessed token.

    Attributes:
        token: its id.
        parent: index of an earlier guess, which it follows; -1: it follows the answer.
        kind: guesses of one kind are right about equally often; how often is learnt.
        prior: how often, before anything is known.
    """

    token: int
    parent: int
    kind: str
    prior: float


class Drafter(Protocol):
    """Guesses how answers go on. It runs on the master: only there are token ids."""

    @property
    def held_bytes(self) -> int:
        """Memory of the master that it takes at most; the plan leaves it free."""
        ...

    def prospects(self, most: int) -> list[Guess] | None:
        """Guesses as they can be expected, without their tokens; None if guessing costs nothing."""
        ...

    def seconds(self, depth: int) -> float:
        """What it takes to guess ``depth`` tokens of each answer."""
        ...

    async def propose(self, answers: Items[Answer], most: int) -> list[list[Guess]]:
        """Guess what follows each answer's ids: trees up to ``most`` deep, parents before children.

        A guess's prior is that of it being right if its parent is.
        """
        ...

    def learn(self, ids: Items[int], logits: torch.Tensor) -> None:
        """Take notice of the model's logits (T, V) after some ids of an answer, or guesses."""
        ...

    def forget(self, answer: Answer) -> None:
        """An answer has ended."""
        ...

    def reset(self) -> None:
        """Give back the memory of what is kept of answers that have ended."""
        ...
