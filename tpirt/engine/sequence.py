"""Sequences: what a request has computed so far, and what its reader has not taken yet."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Ids
from typing import Generic, TypeVar

import torch

from tpirt.engine.sampler import Sampler
from tpirt.engine.writer import Writer
from tpirt.types import Progress, ProgressCallback, Token

_T = TypeVar("_T")


class Sequence(ABC, Generic[_T]):
    """One request. The driver computes its ids; an asynchronous iterator yields its results.

    A sequence whose reader lags ``ahead`` results behind pauses, and no other does.

    Attributes:
        ids: those known so far.
        prompt: number of those known at first.
        computed: number of leading ids whose keys and values every rank holds, or copies from
            another slot in the sequence's first step.
        slot: where they are; None until it is admitted.
        keep: of the last step's tree of guesses, those that are the last computed ids, where others
            lie between them: see :class:`tpirt.batch.Segment`.
        user: on whose behalf it runs; users take turns.
        priority: higher ones are admitted first, and their prompts are computed first.
        arrived_s: when it was made, by ``time.perf_counter``.
        turn: number of the latest step that it was in.
        steps: whether it computed ids known on admission, by the number of each of those steps.
        begun: whether it has had a slot.
        again: whether what is computed next is computed once more, as it was given up or lost.
        forget: whether nothing of it is kept when it ends.
        progress: told about its prompt.
    """

    def __init__(
        self,
        ids: Ids[int],
        progress: ProgressCallback,
        *,
        ahead: int,
        user: str = "",
        priority: int = 0,
    ):
        self.ids = list(ids)
        self.prompt = len(self.ids)
        self.computed = 0
        self.slot: int | None = None
        self.keep: tuple[int, ...] = ()
        self.user = user
        self.priority = priority
        self.arrived_s = time.perf_counter()
        self.turn = 0
        self.steps: dict[int, bool] = {}
        self.begun = self.again = self.forget = False
        self.progress = progress
        self._ahead = ahead
        self._begin = self._target = 0  # computed and known ids at admission
        self._unread: deque[_T] = deque()
        self._ended = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._on_read: Callable[[], None] = lambda: None

    @property
    @abstractmethod
    def first_wanted(self) -> int:
        """Index of the first id whose hidden state is wanted."""

    @property
    def unanswered(self) -> bool:
        """Whether the first token of an answer is still to come."""
        return False

    @property
    def prefilling(self) -> bool:
        """Whether the next id is one of those known on admission."""
        return self.computed < self._target

    @property
    def todo(self) -> int:
        """Number of ids to compute."""
        return len(self.ids) - self.computed

    @property
    def paused(self) -> bool:
        """Whether its reader has to read first."""
        return len(self._unread) >= self._ahead

    @property
    def fed(self) -> bool:
        """Whether its reader has enough to read for now: it need not begin again before."""
        return len(self._unread) > self._ahead // 2

    @property
    def ended(self) -> bool:
        """Whether nothing more is to be computed."""
        return self._ended

    def admit(self, slot: int, shared: int) -> None:
        """Begin in a slot, with the first ``shared`` ids computed."""
        self.slot, self.begun = slot, True
        self.computed = self._begin = shared
        self._target = len(self.ids)

    def advance(self, tokens: int, step: int) -> None:
        """Account for a step that computed some ids."""
        self.steps[step] = self.prefilling
        self.computed += tokens
        self.keep = ()
        self.turn = step

    def prompt_progress(self) -> Progress:
        """How much of the prompt is computed."""
        stage = "computing again" if self.again else "prefill"
        done, total = self.computed - self._begin, self._target - self._begin
        self.again = self.again and done < total
        return Progress(stage, done, total, "tokens")

    def restart(self) -> None:
        """Begin again: its keys and values are not in memory any more."""
        self.again = self.again or self.computed > 0
        self.keep = ()
        self.computed, self.slot, self.turn = 0, None, 0

    def fail_step(self) -> None:
        """Account for a step that failed: some ranks may have moved what it was to keep."""
        self.computed -= len(self.keep)
        self.keep = ()

    def put(self, result: _T) -> None:
        """Hand a result to the reader."""
        self._unread.append(result)
        self._changed.set()

    def end(self, error: Exception | None = None) -> None:
        """End: the reader gets what was put, then the error, if there is one."""
        if not self._ended:
            self._ended, self._error = True, error
            self._changed.set()

    def on_read(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called when the reader has read and more may be wanted soon."""
        self._on_read = callback

    def __aiter__(self) -> Sequence[_T]:
        return self

    async def __anext__(self) -> _T:
        while not self._unread:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        fed = self.fed
        result = self._unread.popleft()
        if fed:
            self._on_read()
        return result


class Answer(Sequence[Token]):
    """A prompt and its answer. Results are tokens.

    Attributes:
        guesses, right_guesses: that were verified, and that were right.
    """

    def __init__(
        self,
        ids: Ids[int],
        sampler: Sampler,
        writer: Writer,
        progress: ProgressCallback,
        *,
        user: str = "",
        priority: int = 0,
    ):
        super().__init__(ids, progress, ahead=16, user=user, priority=priority)
        self._sampler = sampler
        self._writer = writer
        self.guesses = self.right_guesses = 0
        self._first_s = self._last_s = 0.0

    @property
    def first_wanted(self) -> int:
        return len(self.ids) - 1

    @property
    def unanswered(self) -> bool:
        return not self.sampled

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token, once it is there."""
        return self._first_s - self.arrived_s

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first, on average."""
        return (self._last_s - self._first_s) / max(1, self.sampled - 1)

    @property
    def sampled(self) -> int:
        """Number of tokens of the answer."""
        return len(self.ids) - self.prompt

    @property
    def most_guesses(self) -> int:
        """How many guesses can be of use."""
        return max(0, self._writer.left - 1)

    def draw(
        self, logits: torch.Tensor, guesses: Ids[int] = (), parents: Ids[int] = ()
    ) -> list[int]:
        """Draw the next token, and one more after each guess that it equals.

        Each is drawn from the model's logits as without guesses: these change no token.

        Args:
            logits: (1 + guesses, V) float32, after the last id and each guess; overwritten.
            guesses: ids whose keys and values are computed, too.
            parents: the guess that each of them follows, by index; -1: the last id.

        Returns:
            The ids drawn, at least one; all but the last equal guesses.

        Raises:
            LogitsError: the model computed NaN or infinity.
        """
        following = {pair: guess for guess, pair in enumerate(zip(parents, guesses, strict=True))}
        drawn: list[int] = []
        self._last_s = time.perf_counter()
        if self.unanswered:
            self._first_s = self._last_s
        path: list[int] = []
        right: int | None = -1
        while right is not None:
            token = self._writer.push(self._sampler.next(logits[right + 1], self.ids))
            self.ids.append(token.id)
            drawn.append(token.id)
            self.put(token)
            if token.finish_reason is not None:
                self.end()
                break
            right = following.get((right, token.id))
            if right is not None:
                path.append(right)
        in_place = sum(at == guess for at, guess in enumerate(path))
        self.keep = tuple(guess - in_place for guess in path[in_place:])
        self.computed += len(path)
        self.guesses += len(guesses)
        self.right_guesses += len(path)
        return drawn


class Scoring(Sequence[torch.Tensor]):
    """A text whose hidden states are wanted, all but those of the first ids, ``delivered`` before.

    Results are (T, H) float32, in order of ids.
    """

    def __init__(self, ids: Ids[int], progress: ProgressCallback, *, delivered: int = 0):
        super().__init__(ids, progress, ahead=1)
        self._delivered = delivered

    @property
    def first_wanted(self) -> int:
        return self._delivered

    def take(self, hidden: torch.Tensor) -> None:
        """Hand on the next hidden states, (T, H)."""
        self._delivered += len(hidden)
        self.put(hidden)
        if self._delivered == len(self.ids):
            self.end()
