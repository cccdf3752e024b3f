"""A drafter with a hit rate that is set."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from tpirt.engine.drafts.base import Drafter, Guess
from tpirt.engine.sequence import Answer

_KIND = "known"


class KnownAnswers:
    """Guesses from answers known beforehand; each guess is right with a set probability.

    Args:
        answers: ids by the prompt's ids.
        hit_rate: the probability.
        seed: of the guesses that are wrong.
        told: whether ``hit_rate`` is known before any guess; else it is learnt.
        costs: of this drafter, which is asked as often; its guesses are thrown away.
    """

    def __init__(
        self,
        answers: Mapping[tuple[int, ...], Sequence[int]],
        hit_rate: float,
        seed: int = 0,
        *,
        told: bool = False,
        costs: Drafter | None = None,
    ):
        self._answers = answers
        self._hit_rate = hit_rate
        self._prior = hit_rate if told else 0.5
        self._random = random.Random(seed)
        self._costs = costs

    @property
    def held_bytes(self) -> int:
        """See :class:`tpirt.engine.drafts.base.Drafter`."""
        return self._costs.held_bytes if self._costs else 0

    def prospects(self, most: int) -> list[Guess] | None:
        """See :class:`tpirt.engine.drafts.base.Drafter`."""
        if self._costs is None:
            return None
        return [Guess(0, depth - 1, _KIND, self._prior) for depth in range(most)]

    def seconds(self, depth: int) -> float:
        """See :class:`tpirt.engine.drafts.base.Drafter`."""
        return self._costs.seconds(depth) if self._costs else 0.0

    async def propose(self, answers: Sequence[Answer], most: int) -> list[list[Guess]]:
        """See :class:`tpirt.engine.drafts.base.Drafter`."""
        if self._costs is not None:
            await self._costs.propose(answers, most)
        return [self._guess(answer, most) for answer in answers]

    def learn(self, ids: Sequence[int], logits: torch.Tensor) -> None:
        """See :class:`tpirt.engine.drafts.base.Drafter`."""

    def forget(self, answer: Answer) -> None:
        """See :class:`tpirt.engine.drafts.base.Drafter`."""
        if self._costs is not None:
            self._costs.forget(answer)

    def reset(self) -> None:
        """See :class:`tpirt.engine.drafts.base.Drafter`."""
        if self._costs is not None:
            self._costs.reset()

    def _guess(self, answer: Answer, most: int) -> list[Guess]:
        known = self._answers.get(tuple(answer.ids[: answer.prompt]), ())
        following = known[answer.sampled : answer.sampled + most]
        right = (self._random.random() < self._hit_rate for _ in following)
        return [
            Guess(token if ok else token ^ 1, depth - 1, _KIND, self._prior)
            for depth, (token, ok) in enumerate(zip(following, right, strict=False))
        ]
