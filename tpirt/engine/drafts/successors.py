"""Guesses from the model's own logits: what was likely after each token (token recycling)."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

from tpirt.engine.drafts.base import Guess

_WIDTHS = (3, 2, 1)  # successors of each guess, by depth
_PRIORS = (0.4, 0.1, 0.05)  # by rank


class Successors:
    """A table of the likeliest successors of each token, the latest time that it was computed."""

    def __init__(self, vocab_size: int):
        self._table = torch.full((vocab_size, _WIDTHS[0]), -1, dtype=torch.int32)

    def learn(self, ids: Items[int], logits: torch.Tensor) -> None:
        """Take the likeliest of ``logits`` (T, V) after each of ``ids``."""
        width = min(_WIDTHS[0], logits.shape[1])
        self._table[list(ids), :width] = logits.topk(width).indices.int()

    def extend(self, guesses: list[Guess], last: int, most: int) -> None:
        """Add a tree of up to ``most`` levels that follows ``last``, but for what is there."""
        numbers = {(guess.parent, guess.token): number for number, guess in enumerate(guesses)}
        level = [(-1, last)]
        for depth, width in enumerate(_WIDTHS[:most]):
            following = []
            for parent, token in level:
                for rank, successor in enumerate(self._table[token, :width].tolist()):
                    if successor < 0:
                        break
                    number = numbers.get((parent, successor))
                    if number is None:
                        number = len(guesses)
                        kind = f"successor {depth + 1}, rank {rank + 1}"
                        guesses.append(Guess(successor, parent, kind, _PRIORS[rank]))
                    following.append((number, successor))
            level = following
