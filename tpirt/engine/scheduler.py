"""Which rows the next step computes: pure decisions, no I/O.

Answers under way come first, one row each, then as much of waiting prompts as the step may take
(stall-free mixed batches, as in Sarathi-Serve): up to the target for the time per token, if there
is one. Of prompts with one priority, those whose first token can still be in time come before those
that are late.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

from tpirt.batch import Segment
from tpirt.engine.drafts.base import Guess
from tpirt.engine.sequence import Answer, Sequence
from tpirt.engine.step_costs import StepCosts
from tpirt.engine.targets import NO_TARGETS, Targets

# While answers run, a step with a prompt's rows takes at most so many times as long as without.
_STRETCH = 2.0
# After so many times its target, a late prompt takes its turn again: it is not put off for ever.
_PATIENCE = 4.0


def _nothing(_: Sequence[Any]) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a sequence that a step computes.

    Attributes:
        sequence: the sequence.
        tokens: number of ids from ``computed`` on.
        guesses: those that are verified: what may follow the ids.
        first_guesses: those for the next token, verified or not.
        prefill: whether the ids are a prompt's, for statistics.
        prompt: whether they are not the next rows of an answer: see :class:`Segment`. The sequence
            itself says so of the ids after them as soon as these are computed.
    """

    sequence: Sequence[Any]
    tokens: int
    guesses: tuple[Guess, ...] = ()
    first_guesses: tuple[Guess, ...] = ()
    prefill: bool = False
    prompt: bool = False

    @classmethod
    def of(cls, sequence: Sequence[Any], tokens: int) -> Piece:
        """The next ``tokens`` ids of a sequence."""
        return cls(
            sequence,
            tokens,
            prefill=sequence.prefilling,
            prompt=sequence.todo > 1 or not isinstance(sequence, Answer),
        )

    @property
    def ids(self) -> list[int]:
        """The ids, without guesses."""
        start = self.sequence.computed
        return self.sequence.ids[start : start + self.tokens]

    @property
    def guessed(self) -> list[int]:
        """The ids of the guesses."""
        return [guess.token for guess in self.guesses]

    @property
    def parents(self) -> list[int]:
        """The guess that each guess follows, by index; -1: the last id."""
        return [guess.parent for guess in self.guesses]

    @property
    def num_logits(self) -> int:
        """Number of rows whose results are wanted."""
        end = self.sequence.computed + self.tokens
        wanted = min(self.tokens, max(0, end - self.sequence.first_wanted))
        return wanted + len(self.guesses)

    def segment(self, source: int | None = None) -> Segment:
        """The rows in the step's batch; the ids before them are copied from ``source`` first."""
        sequence = self.sequence
        assert sequence.slot is not None
        backs = tuple(index - parent for index, parent in enumerate(self.parents))
        return Segment(
            slot=sequence.slot,
            position=sequence.computed,
            tokens=self.tokens + len(self.guesses),
            num_logits=self.num_logits,
            rope_length=sequence.prompt,
            source=source,
            parents=backs if any(back > 1 for back in backs) else (),
            keep=sequence.keep,
            prompt=self.prompt,
        )


class Scheduler:
    """Chooses from sequences; changes none.

    Args:
        costs: how long the layers take, by rows.
        output_costs: how long logits and sampling take, by rows; an answer has one.
        sequences: the most in one step.
        stall_free: whether a prompt may only slow answers down by a factor of 2 a step; else it is
            computed as fast as it can be.
        targets: for answers; that for the time per token replaces the factor.
    """

    def __init__(
        self,
        costs: StepCosts,
        output_costs: StepCosts | None = None,
        *,
        sequences: int = 16,
        stall_free: bool = True,
        targets: Targets = NO_TARGETS,
    ):
        self._costs = costs
        self._output_costs = output_costs or StepCosts()
        self._sequences = sequences
        self._stall_free = stall_free
        self._targets = targets

    def order(
        self,
        waiting: Iterable[Sequence[Any]],
        running: Iterable[Sequence[Any]],
        chunk_tokens: int,
        now_s: float = 0.0,
        shared: Callable[[Sequence[Any]], int] = _nothing,
    ) -> list[Sequence[Any]]:
        """The order in which waiting sequences are admitted.

        Those that had begun first, then by priority; then those whose first token can be in time;
        users take turns, each user's own in order of arrival.

        Args:
            waiting, running: the sequences, in order of arrival.
            chunk_tokens: the most rows of a step.
            now_s: by ``time.perf_counter``.
            shared: how many ids of a waiting one need not be computed.
        """
        places = Counter(sequence.user for sequence in running)
        keys = {}
        ordered = sorted(waiting, key=lambda s: (not s.begun, -s.priority))
        for arrival, sequence in enumerate(ordered):
            keys[sequence] = (
                not sequence.begun,
                self.urgency(sequence, chunk_tokens, now_s, shared),
                places[sequence.user],
                arrival,
            )
            places[sequence.user] += 1
        return sorted(ordered, key=keys.__getitem__)

    def urgency(
        self,
        sequence: Sequence[Any],
        chunk_tokens: int,
        now_s: float = 0.0,
        shared: Callable[[Sequence[Any]], int] = _nothing,
    ) -> tuple[int, bool]:
        """Where a prompt is among others: those with the smallest value are computed first.

        See :meth:`order` for the arguments.
        """
        return -sequence.priority, self._late(sequence, chunk_tokens, now_s, shared)

    def admits(self, running: int) -> bool:
        """Whether so many answers stay within their time per token with one more.

        Where even one does not, the target is no reason to wait.
        """
        target_s = self._targets.tpot_s
        alone_s, joint_s = self._seconds(1), self._seconds(running + 1)
        if target_s is None or alone_s is None or joint_s is None or alone_s > target_s:
            return True
        return joint_s <= target_s

    def plan(
        self, running: Items[Sequence[Any]], chunk_tokens: int, now_s: float = 0.0
    ) -> list[Piece]:
        """The next step of at most ``chunk_tokens``; empty if all sequences wait for readers.

        More can be ready than a step takes, as readers that stopped can go on all at once.
        """
        ready = [s for s in running if not s.paused and not s.ended]
        prompts = [sequence for sequence in ready if sequence.todo > 1]  # in order of admission
        prompts.sort(key=lambda s: self.urgency(s, chunk_tokens, now_s))
        answers = [sequence for sequence in ready if sequence.todo == 1]
        answers.sort(key=lambda sequence: sequence.turn)  # if not all fit, the others are next
        places = min(chunk_tokens, self._sequences)
        if places == 1 and prompts and answers:  # they take turns
            if prompts[0].turn < answers[0].turn:
                answers = []
            else:
                prompts = []
        most = max(1, places - bool(prompts))
        pieces = [Piece.of(sequence, 1) for sequence in answers[:most]]
        room = self._room(len(pieces), chunk_tokens)
        for sequence in prompts[: self._sequences - len(pieces)]:
            tokens = min(sequence.todo, room)
            if tokens:
                pieces.append(Piece.of(sequence, tokens))
            room -= tokens
        return pieces

    def _room(self, answers: int, chunk_tokens: int) -> int:
        """How many rows of prompts go with those of ``answers`` answers; at least 1 if any fits."""
        most = chunk_tokens - answers
        alone_s = self._seconds(answers)
        if not answers or not most or alone_s is None:
            return most
        longest_s = self._longest_s(alone_s)
        if longest_s is None:
            return most
        within = self._costs.rows_within(longest_s - self._output_s(answers), chunk_tokens)
        return max(1, within - answers)

    def _seconds(self, answers: int) -> float | None:
        """What a step of so many answers is expected to take; None before the first one."""
        layers_s = self._costs.seconds(answers)
        return None if layers_s is None else layers_s + self._output_s(answers)

    def _output_s(self, answers: int) -> float:
        return self._output_costs.seconds(answers) or 0.0

    def _longest_s(self, alone_s: float) -> float | None:
        """The most that a step may take whose answers take ``alone_s``; None for no bound."""
        target_s = self._targets.tpot_s
        if target_s is not None and alone_s <= target_s:
            return target_s
        return _STRETCH * alone_s if self._stall_free else None

    def _late(
        self,
        sequence: Sequence[Any],
        chunk_tokens: int,
        now_s: float,
        shared: Callable[[Sequence[Any]], int],
    ) -> bool:
        """Whether its first token cannot be in time any more."""
        target_s = self._targets.ttft_s
        if target_s is None or not sequence.unanswered:
            return False
        waited_s = now_s - sequence.arrived_s
        if waited_s > _PATIENCE * target_s:
            return False
        left_s = target_s - waited_s

        def too_long(ids: int) -> bool:
            return (self._costs.prompt_seconds(ids, chunk_tokens) or 0.0) > left_s

        return too_long(sequence.todo) and too_long(sequence.todo - shared(sequence))
