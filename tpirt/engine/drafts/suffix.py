"""Guesses from the conversation itself: what followed when its last tokens occurred before.

This is prompt lookup decoding, with the longest matches found at any length. Where these say
nothing, or are unlikely, there are the likeliest successors of the last token (token recycling).
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

from tpirt.engine.drafts.base import Guess
from tpirt.engine.drafts.successors import Successors
from tpirt.engine.sequence import Answer

_PLACES = 16  # latest ones that are compared
_LONGEST = 24  # tokens that are compared
_BRANCHES = 2  # places whose continuations are guessed
# How often a guess after a match of so many tokens is right, until it is known.
_PRIORS = {1: 0.2, 2: 0.4, 3: 0.55, 4: 0.65, 6: 0.75, 8: 0.8, 12: 0.85, 16: 0.9, _LONGEST: 0.9}


class SuffixIndex:
    """Finds earlier places of the end of a text."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._after: dict[tuple[int, ...], list[int]] = {}

    def extend(self, ids: Items[int]) -> None:
        """Append to the text."""
        for token in ids:
            self.ids.append(token)
            end = len(self.ids)
            for length in (1, 2):
                if end >= length:
                    places = self._after.setdefault(tuple(self.ids[end - length :]), [])
                    places.append(end)
                    del places[: -_PLACES - 1]

    def find(self) -> list[tuple[int, int]]:
        """Matches of the text's end: their length, and the place that follows each.

        The longest first, of equal ones the latest. Empty if even the last token is new.
        """
        end = len(self.ids)
        for length in (2, 1):
            places = reversed(self._after.get(tuple(self.ids[end - length :]), []))
            found = [(self._common(place), place) for place in places if place < end]
            if found:
                return sorted(found, key=lambda match: -match[0])
        return []

    def _common(self, place: int) -> int:
        """How many ids before ``place`` are the text's last ones."""
        end, ids = len(self.ids), self.ids
        common = 0
        most = min(_LONGEST, place)
        while common < most and ids[place - 1 - common] == ids[end - 1 - common]:
            common += 1
        return common


class SuffixDrafter:
    """Guesses from each answer's own prompt and text; needs no second model."""

    held_bytes = 0

    def __init__(self, vocab_size: int) -> None:
        self._successors = Successors(vocab_size)
        self._texts: dict[Answer, SuffixIndex] = {}

    def prospects(self, most: int) -> None:
        """See :class:`tpirt.engine.drafts.base.Drafter`."""

    def seconds(self, depth: int) -> float:
        """See :class:`tpirt.engine.drafts.base.Drafter`."""
        return 0.0

    async def propose(self, answers: Items[Answer], most: int) -> list[list[Guess]]:
        """See :class:`Drafter`."""
        return [self._guess(answer, most) for answer in answers]

    def learn(self, ids: Items[int], logits: torch.Tensor) -> None:
        """See :class:`Drafter`."""
        self._successors.learn(ids, logits)

    def forget(self, answer: Answer) -> None:
        """See :class:`Drafter`."""
        self._texts.pop(answer, None)

    def reset(self) -> None:
        """See :class:`Drafter`: nothing is kept."""

    def _guess(self, answer: Answer, most: int) -> list[Guess]:
        text = self._texts.setdefault(answer, SuffixIndex())
        text.extend(answer.ids[len(text.ids) :])
        guesses: list[Guess] = []
        numbers: dict[tuple[int, int], int] = {}  # by parent and token
        for branch, (length, place) in enumerate(text.find()[:_BRANCHES]):
            parent = -1
            for matched, token in enumerate(text.ids[place : place + most], length):
                known = numbers.get((parent, token))
                if known is None:
                    known = numbers[parent, token] = len(guesses)
                    guesses.append(_guess(token, parent, matched, branch > 0))
                parent = known
        self._successors.extend(guesses, answer.ids[-1], most)
        return guesses


def _guess(token: int, parent: int, matched: int, other: bool) -> Guess:
    """A guess after ``matched`` tokens: if the guesses before were right, the match is longer.

    ``other`` ones differ from what a better match suggests, or follow such a guess.
    """
    level = max(known for known in _PRIORS if known <= matched)
    if other:
        return Guess(token, parent, f"suffix {level} else", _PRIORS[level] / 2)
    return Guess(token, parent, f"suffix {level}", _PRIORS[level])
