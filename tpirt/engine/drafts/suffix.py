"""Guesses from the conversation itself: what followed when its last tokens occurred before.

This is prompt lookup decoding, with the longest match found at any length, and with the last
token's latest successor where nothing longer matches (as in token recycling).
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import islice

from tpirt.engine.drafts.base import Guess
from tpirt.engine.sequence import Answer

_PLACES = 16  # latest ones that are compared
_LONGEST = 24  # tokens that are compared
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

    def find(self) -> tuple[int, int]:
        """The longest match of the text's end: its length, and the place that follows it.

        The latest of several. (0, 0) if even the last token is new.
        """
        best = (0, 0)
        end = len(self.ids)
        for length in (2, 1):
            for place in reversed(self._after.get(tuple(self.ids[end - length :]), ())):
                if place < end and (common := self._common(place)) > best[0]:
                    best = (common, place)
            if best[0]:
                break
        return best

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

    def __init__(self) -> None:
        self._texts: dict[Answer, SuffixIndex] = {}

    def prospects(self, most: int) -> None:
        """See :class:`tpirt.engine.drafts.base.Drafter`."""

    def seconds(self, depth: int) -> float:
        """See :class:`tpirt.engine.drafts.base.Drafter`."""
        return 0.0

    async def propose(self, answers: Items[Answer], most: int) -> list[list[Guess]]:
        """See :class:`Drafter`."""
        return [self._guess(answer, most) for answer in answers]

    def forget(self, answer: Answer) -> None:
        """See :class:`Drafter`."""
        self._texts.pop(answer, None)

    def _guess(self, answer: Answer, most: int) -> list[Guess]:
        text = self._texts.setdefault(answer, SuffixIndex())
        text.extend(answer.ids[len(text.ids) :])
        length, place = text.find()
        if not length:
            return []
        following = list(islice(text.ids, place, place + most))
        return [_guess(token, index - 1, length + index) for index, token in enumerate(following)]


def _guess(token: int, parent: int, matched: int) -> Guess:
    """A guess after ``matched`` tokens: if the guesses before were right, the match is longer."""
    level = max(known for known in _PRIORS if known <= matched)
    return Guess(token, parent, f"suffix {level}", _PRIORS[level])
