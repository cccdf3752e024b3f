"""Guesses from a small model with the same tokenizer, resident on the master."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence as Items
from contextlib import suppress
from itertools import pairwise
from statistics import mean, median
from typing import TYPE_CHECKING

import torch

from tpirt.engine.drafts.base import Guess
from tpirt.engine.options import NO_DRAFT, EngineOptions
from tpirt.engine.sampler import Sampler, check_finite
from tpirt.engine.sequence import Answer
from tpirt.errors import ConfigError, MemoryLimitError, RequestError
from tpirt.model.kv_store import most_capacity
from tpirt.ops.quant_linear import FEW_ROWS
from tpirt.planning import ADVISED_CONTEXT
from tpirt.types import SamplingParams

if TYPE_CHECKING:
    from tpirt.engine.engine import Engine
    from tpirt.text.tokenizer import Tokenizer

_PRIOR = 0.7  # of its likeliest token
_SMOOTHING = 0.2  # weight of the latest probability
_TIMES = 9  # latest ones, of which the median is taken: one slow guess is no reason to stop
_BRANCHES = 3  # tokens that are guessed at each position
_LEVELS = (0.95, 0.85, 0.7, 0.5, 0.35, 0.2, 0.1, 0.05, 0.0)  # probabilities that are told apart

_Position = list[tuple[int, float]]  # the likeliest tokens, with their probabilities


def draft_kv_tokens(options: EngineOptions) -> int:
    """How many tokens' keys and values a small model has memory for: those of a conversation."""
    return options.context or ADVISED_CONTEXT


def draft_options(options: EngineOptions) -> EngineOptions:
    """How a small model is run beside one with ``options``: whole, in this process."""
    return EngineOptions(
        quantize=options.quantize,
        dtype=options.dtype,
        kv=options.kv,
        kv_tokens=draft_kv_tokens(options),
        threads=options.threads,
        store=options.store,
        sequences=options.sequences,
        spill_bytes=0,
        draft=NO_DRAFT,
    )


class ModelDrafter:
    """Has a small model go on greedily; the next likely tokens at each position are branches.

    How often a guess is right is learnt by its probability. Keys and values stay between calls, as
    those of any request: what was rejected is dropped, and only what is new is computed.

    Where memory is too short for all answers, the first ones get guesses.

    Args:
        engine: of the small model; its owner closes it.
        kv_tokens: of all answers together that it has memory for.
    """

    def __init__(self, engine: Engine, kv_tokens: int):
        self._engine = engine
        self._kv_tokens = kv_tokens
        self._times_s: deque[float] = deque(maxlen=_TIMES)  # that a token took
        self._guess_s = 0.0  # that one takes
        self._likely: list[float] = []  # the likeliest token, by depth
        self._lengths: dict[Answer, int] = {}  # when it was last asked

    def check(self, tokenizer: Tokenizer, model: str) -> None:
        """Raise ConfigError if the small model's tokenizer is not that of the large one."""
        if not self._engine.tokenizer.has_ids_of(tokenizer):
            raise ConfigError(
                f"draft {self._engine.name}: its tokenizer is not that of {model}; expected a "
                "smaller model of the same family"
            )

    @property
    def held_bytes(self) -> int:
        """See :class:`Drafter`."""
        budget = self._engine.deployment.ranks[0].budget
        return budget.resident_bytes - budget.process_bytes

    def prospects(self, most: int) -> list[Guess]:
        """See :class:`Drafter`."""
        likely = self._likely or [_PRIOR]
        return [_guess(-1, depth - 1, likely[min(depth, len(likely) - 1)]) for depth in range(most)]

    def seconds(self, depth: int) -> float:
        """See :class:`Drafter`."""
        return self._guess_s * depth

    async def propose(self, answers: Items[Answer], most: int) -> list[list[Guess]]:
        """See :class:`Drafter`."""
        watchers = await self._continue_all(answers, self._fitting(answers, most), most)
        found = [watcher.positions[:most] for watcher in watchers]
        if (took_s := _guess_s(watchers)) is not None:
            self._times_s.append(took_s)
            self._guess_s = median(self._times_s)
        for positions in found:
            self._learn([position[0][1] for position in positions])
        return list(map(_tree, found))

    def learn(self, ids: Items[int], logits: torch.Tensor) -> None:
        """See :class:`Drafter`."""

    def forget(self, answer: Answer) -> None:
        """See :class:`Drafter`."""
        self._lengths.pop(answer, None)

    def reset(self) -> None:
        """See :class:`Drafter`."""
        self._lengths.clear()
        self._engine.reset()

    def _fitting(self, answers: Items[Answer], most: int) -> list[bool]:
        """Which answers there is room for."""
        room = most_capacity(self._kv_tokens)
        fitting = []
        for answer in answers:
            tokens = len(answer.ids) + most
            needed = most_capacity(tokens)
            fitting.append(needed <= room and tokens <= self._engine.context_length)
            room -= needed * fitting[-1]
        return fitting

    async def _continue_all(
        self, answers: Items[Answer], fitting: Items[bool], most: int
    ) -> list[_Watcher]:
        """Continue those answers that fit; if one cannot be, the others end."""
        watchers = [self._watcher(answer) for answer in answers]
        try:
            async with asyncio.TaskGroup() as group:
                for answer, watcher, fits in zip(answers, watchers, fitting, strict=True):
                    if fits:
                        group.create_task(self._continue(answer, watcher, most))
        except BaseExceptionGroup as exc:
            raise exc.exceptions[0] from None
        return watchers

    def _watcher(self, answer: Answer) -> _Watcher:
        return _Watcher(len(answer.ids) - self._lengths.get(answer, 0) > FEW_ROWS)

    async def _continue(self, answer: Answer, watcher: _Watcher, most: int) -> None:
        self._lengths[answer] = len(answer.ids)
        # Too many at once, ids that it lacks, or memory is short now: that answer goes without
        # guesses, or with those that there are.
        with suppress(RequestError, MemoryLimitError):
            await self._engine.draw(answer.ids, watcher, max(most, watcher.least))

    def _learn(self, likely: list[float]) -> None:
        for depth, probability in enumerate(likely):
            if depth < len(self._likely):
                self._likely[depth] = _smoothed(self._likely[depth], probability)
            else:
                self._likely.append(probability)


class _Watcher(Sampler):
    """Takes the likeliest token, and remembers the next ones.

    Args:
        behind: whether a prompt is computed before the first token.
    """

    def __init__(self, behind: bool) -> None:
        super().__init__(SamplingParams(temperature=0))
        self.positions: list[_Position] = []
        self.behind = behind
        self.least = 2 if behind else 1  # tokens, to know what one takes
        self._at_s = [] if behind else [time.perf_counter()]

    @property
    def times_s(self) -> list[float]:
        """What each token took, without the first one after a prompt."""
        return [after - before for before, after in pairwise(self._at_s)]

    def next(self, logits: torch.Tensor, history: Items[int]) -> int:
        """See :class:`Sampler`."""
        check_finite(logits)
        found = logits.softmax(-1).topk(min(_BRANCHES, len(logits)))
        tokens = found.indices.tolist()
        self.positions.append(list(zip(tokens, found.values.tolist(), strict=True)))
        self._at_s.append(time.perf_counter())
        return int(tokens[0])


def _guess_s(watchers: Items[_Watcher]) -> float | None:
    """What a token of all of them took; None if that is not known."""
    times = [watcher.times_s for watcher in watchers if watcher.times_s]
    if not times:
        return None
    if any(watcher.behind for watcher in watchers):
        return min(map(min, times))  # other tokens came from steps that had a prompt's rows, too
    return max(map(mean, times))


def _tree(positions: Items[_Position]) -> list[Guess]:
    guesses: list[Guess] = []
    parent = -1
    for position in positions:
        first = len(guesses)
        guesses += [_guess(token, parent, probability) for token, probability in position]
        parent = first
    return guesses


def _guess(token: int, parent: int, probability: float) -> Guess:
    level = next(level for level in _LEVELS if probability >= level)
    return Guess(token, parent, f"model {level:.0%}", probability)


def _smoothed(before: float, latest: float) -> float:
    return before + _SMOOTHING * (latest - before)
