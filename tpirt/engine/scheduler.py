"""Which rows the next step computes: pure decisions, no I/O.

Answers under way come first, one row each, then as much of waiting prompts as the step may take
(stall-free mixed batches, as in Sarathi-Serve).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

from tpirt.batch import Segment
from tpirt.engine.drafts.base import Guess
from tpirt.engine.sequence import Sequence
from tpirt.engine.step_costs import StepCosts

# While answers run, a step with a prompt's rows takes at most so many times as long as without.
_STRETCH = 2.0


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a sequence that a step computes.

    Attributes:
        sequence: the sequence.
        tokens: number of ids from ``computed`` on.
        guesses: those that are verified: what may follow the ids.
        first_guesses: those for the next token, verified or not.
    """

    sequence: Sequence[Any]
    tokens: int
    guesses: tuple[Guess, ...] = ()
    first_guesses: tuple[Guess, ...] = ()

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
    def prefill(self) -> bool:
        """Whether these are ids of a prompt, for statistics."""
        return self.tokens > 1 or self.sequence.prefilling

    def segment(self) -> Segment:
        """The rows in the step's batch."""
        sequence = self.sequence
        assert sequence.slot is not None
        end = sequence.computed + self.tokens
        wanted = min(self.tokens, max(0, end - sequence.first_wanted))
        backs = tuple(index - parent for index, parent in enumerate(self.parents))
        return Segment(
            slot=sequence.slot,
            position=sequence.computed,
            tokens=self.tokens + len(self.guesses),
            num_logits=wanted + len(self.guesses),
            rope_length=len(sequence.ids) + len(self.guesses),
            source=sequence.source,
            parents=backs if any(back > 1 for back in backs) else (),
            keep=sequence.keep,
        )


class Scheduler:
    """Chooses from sequences; changes none.

    Args:
        chunk_tokens: most rows of a step.
        costs: how long steps take.
        stall_free: whether a prompt may only slow answers down by a factor of 2 a step; else it is
            computed as fast as it can be.
    """

    def __init__(self, chunk_tokens: int, costs: StepCosts, *, stall_free: bool = True):
        self._chunk_tokens = chunk_tokens
        self._costs = costs
        self._stall_free = stall_free

    def order(
        self, waiting: Iterable[Sequence[Any]], running: Iterable[Sequence[Any]]
    ) -> list[Sequence[Any]]:
        """The order in which waiting sequences are admitted.

        Those that had begun first, then by priority; users take turns, each user's own in order of
        arrival.
        """
        places = Counter(sequence.user for sequence in running)
        keys = {}
        ordered = list(waiting)
        for arrival, sequence in enumerate(ordered):
            keys[sequence] = (
                not sequence.again,
                -sequence.priority,
                places[sequence.user],
                arrival,
            )
            places[sequence.user] += 1
        return sorted(ordered, key=keys.__getitem__)

    def plan(self, running: Items[Sequence[Any]]) -> list[Piece]:
        """The next step; empty if all sequences wait for their readers."""
        ready = [sequence for sequence in running if not sequence.paused]
        prompts = [sequence for sequence in ready if sequence.todo > 1]  # in order of admission
        answers = [sequence for sequence in ready if sequence.todo == 1]
        answers.sort(key=lambda sequence: sequence.turn)  # if not all fit, the others are next
        most = max(1, self._chunk_tokens - bool(prompts))
        pieces = [Piece(sequence, 1) for sequence in answers[:most]]
        room = self._room(len(pieces))
        for sequence in prompts:
            tokens = min(sequence.todo, room)
            if tokens:
                pieces.append(Piece(sequence, tokens))
            room -= tokens
        return pieces

    def _room(self, answers: int) -> int:
        """How many rows of prompts go with those of ``answers`` answers; at least 1 if any fits."""
        most = self._chunk_tokens - answers
        if not answers or not most or not self._stall_free:
            return most
        alone_s = self._costs.seconds(answers)
        if alone_s is None:
            return most
        within = self._costs.rows_within(_STRETCH * alone_s, self._chunk_tokens)
        return max(1, within - answers)
