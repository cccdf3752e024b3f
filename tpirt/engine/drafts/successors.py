"""Guesses from the model's own logits: what was likely after each token (token recycling)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items

import torch

from tpirt.engine.drafts.base import Guess

_WIDTHS = (3, 2, 1)  # successors of each guess, by depth
_PRIORS = (0.4, 0.1, 0.05)  # by rank
_KINDS = [
    [f"successor {depth}, rank {rank + 1}" for rank in range(width)]
    for depth, width in enumerate(_WIDTHS, 1)
]


class Successors:
    """A table of the likeliest successors of each token, the latest time that it was computed."""

    def __init__(self, vocab_size: int):
        self._table = array("i", [-1]) * (_WIDTHS[0] * vocab_size)  # not a tensor: read one by one

    def learn(self, ids: Items[int], logits: torch.Tensor) -> None:
        """Take the likeliest of ``logits`` (T, V) after each of ``ids``."""
        likeliest = logits.topk(min(_WIDTHS[0], logits.shape[1])).indices.tolist()
        for token, successors in zip(ids, likeliest, strict=True):
            first = _WIDTHS[0] * token
            self._table[first : first + len(successors)] = array("i", successors)

    def extend(self, guesses: list[Guess], last: int, most: int) -> None:
        """Add a tree of up to ``most`` levels that follows ``last``, but for what is there."""
        numbers = {(guess.parent, guess.token): number for number, guess in enumerate(guesses)}
        level = [(-1, last)]
        for depth, width in enumerate(_WIDTHS[:most]):
            following = []
            for parent, token in level:
                first = _WIDTHS[0] * token
                for rank, successor in enumerate(self._table[first : first + width]):
                    if successor < 0:
                        break
                    number = numbers.get((parent, successor))
                    if number is None:
                        number = len(guesses)
                        guesses.append(Guess(successor, parent, _KINDS[depth][rank], _PRIORS[rank]))
                    following.append((number, successor))
            level = following
