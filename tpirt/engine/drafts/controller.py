"""How many guesses a step verifies: as many as make the most tokens per second.

A guess is a row of a step. What a step of so many rows takes is learnt from steps
(:class:`~tpirt.engine.step_costs.StepCosts`), and how often guesses are right from what was drawn.
What both may be wrong by is bounded by an :class:`~tpirt.engine.drafts.allowance.Allowance`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import NamedTuple

import torch

from tpirt.engine.drafts.allowance import Allowance
from tpirt.engine.drafts.base import Drafter, Guess
from tpirt.engine.scheduler import Piece
from tpirt.engine.sequence import Answer
from tpirt.engine.step_costs import StepCosts

_log = logging.getLogger(__name__)

MOST_GUESSES = 16  # for an answer; more are hardly ever all right
_LEAST_GAIN = 1.05  # expected tokens per second with guesses to those without
# A step without guesses is measured now and then, as it is what they are compared with: as often as
# this costs a hundredth of the time; at first after so many steps, then after twice as many each
# time, since the first steps of a group are slow.
_COMPARE_STEPS, _COMPARE_SHARE = 8, 1 / 100
# Guesses lose at most this share of the time: those of a step are verified if the loss is within it
# even if all are wrong. What is kept for that, in times of a token, also bounds what is lost when
# guesses that were often right no longer are.
_LOSS_SHARE, _MOST_LOST = 1 / 64, 16
# To look for guesses, choose among them and learn from a step takes 0.2 ms, a sixth of a small
# model's step. While this is more than what they save, on average over the latest steps with
# guesses, it takes at most this share of the time.
_LOOK_SHARE, _MOST_LOOKING, _LOOKED_STEPS = 1 / 128, 2, 8
_PRIOR_WEIGHT, _KEPT = 2.0, 0.98  # of a kind's prior, in guesses; of earlier guesses, a guess


@dataclass
class _Rate:
    """How often guesses of a kind are right; later ones count more."""

    right: float
    all: float

    def learn(self, right: bool) -> None:
        self.right = self.right * _KEPT + right
        self.all = self.all * _KEPT + 1


@dataclass
class DraftStats:
    """What guesses brought.

    Attributes:
        steps: those with guesses.
        tokens: that answers under way got in these steps.
        guesses, right: that were verified, and that were right.
        seconds: that these steps took, and making the guesses.
        saved_s: time that their tokens would have taken one by one, minus what they took.
        predicted_s, predicted_saved_s: what was expected of the two when guesses were chosen.
        tested, hit: number of guesses whose answer is known, and of right ones, by kind.
    """

    steps: int = 0
    tokens: int = 0
    guesses: int = 0
    right: int = 0
    seconds: float = 0.0
    saved_s: float = 0.0
    predicted_s: float = 0.0
    predicted_saved_s: float = 0.0
    tested: dict[str, int] = field(default_factory=dict)
    hit: dict[str, int] = field(default_factory=dict)


class _Base(NamedTuple):
    """A step without guesses.

    Attributes:
        rows, outputs: those of the step, and those whose logits are computed.
        room: how many guesses may be added.
        most: how many of each answer.
        seconds: that it takes.
        token_s: that the tokens of its answers would take in a step by themselves.
    """

    rows: int
    outputs: int
    room: int
    most: list[int]
    seconds: float
    token_s: float


class DraftController:
    """Adds guesses to the pieces of a step, where they pay.

    Args:
        drafter: makes guesses.
        costs: how long steps take.
        output_costs: how long logits and sampling take, by rows whose logits are computed.
        vocab_size: of the model.
        exact_rows: of answers, up to which a row's bits do not depend on the others; guesses add
            no more than that, unless there are more anyway.

    Attributes:
        stats: what guesses brought.
        learning_s: what it took to learn from the latest step; part of the step's time.
    """

    def __init__(
        self,
        drafter: Drafter,
        costs: StepCosts,
        output_costs: StepCosts,
        vocab_size: int,
        exact_rows: int,
    ):
        self.stats = DraftStats()
        self.learning_s = 0.0
        self._drafter = drafter
        self._costs = costs
        self._output_costs = output_costs
        self._vocab_size = vocab_size
        self._failure: Exception | None = None  # of the drafter, which is asked no more
        self._exact_rows = exact_rows
        self._rates: dict[str, _Rate] = {}
        self._losses = Allowance(_LOSS_SHARE, _MOST_LOST)
        self._looks = Allowance(_LOOK_SHARE, _MOST_LOOKING)
        self._base: _Base | None = None  # of the latest step; None if it had no use
        self._drafting_s = 0.0  # of the latest step
        self._looking_s = 0.0  # and to choose, but for what a drafter does once for an answer
        self._worth_s = 0.0  # what a step with guesses saves on average, looking included
        self._busy_steps = 0  # since a step had no guesses
        self._compare_steps = _COMPARE_STEPS
        self._looking = False  # for guesses, in the latest step
        self._gain: float | None = None  # expected of the latest step
        self._predicted = (0.0, 0.0)  # its tokens and seconds

    async def extend(
        self, pieces: Items[Piece], most_rows: int, most_guesses: int = MOST_GUESSES
    ) -> list[Piece]:
        """The pieces, those of answers under way with guesses where these pay.

        Args:
            pieces: of the step.
            most_rows: of a step.
            most_guesses: for one answer.
        """
        self._base, self._looking = None, False
        self._drafting_s = self._looking_s = self.learning_s = 0.0
        if self._failure is not None or (self._worth_s <= 0 and self._looks.left_s < 0):
            self._busy_steps = 0
            return list(pieces)
        drafted = {
            index: answer
            for index, piece in enumerate(pieces)
            if (answer := _drafted(piece)) is not None
        }
        answers = list(drafted.values())
        self._base = base = self._base_of(pieces, answers, most_rows, most_guesses)
        self._looking = base is not None and self._can_guess(base)
        if base is None or not self._looking:
            self._busy_steps = 0
            return list(pieces)
        guesses = await self._guess(answers, base)
        began_s, spent_s = time.perf_counter(), self._drafting_s
        chosen = self._choose(guesses, base, lambda _: spent_s)
        self._busy_steps = self._busy_steps + 1 if any(chosen) else 0
        extended = list(pieces)
        for index, found, picked in zip(drafted, guesses, chosen, strict=True):
            first = tuple(guess for guess in found if guess.parent < 0)
            verified = _subtree(found, picked)
            extended[index] = replace(pieces[index], guesses=verified, first_guesses=first)
        self._looking_s += time.perf_counter() - began_s
        return extended

    def _base_of(
        self, pieces: Items[Piece], answers: Items[Answer], most_rows: int, most_guesses: int
    ) -> _Base | None:
        """The step without guesses; None if no answer goes on in it, or its time is not known."""
        rows = sum(piece.tokens for piece in pieces)
        outputs = sum(piece.num_logits for piece in pieces)
        step_s = self._seconds(rows, outputs)
        alone_s = self._seconds(len(answers), len(answers))
        if not answers or step_s is None or alone_s is None:
            return None
        going = sum(not piece.prompt for piece in pieces)  # some may have ended since
        room = self._room(rows, going, most_rows)
        most = [min(most_guesses, room, answer.most_guesses) for answer in answers]
        return _Base(rows, outputs, room, most, step_s, min(step_s, alone_s) / len(answers))

    def _can_guess(self, base: _Base) -> bool:
        """Whether guesses can be of use, and there is something to compare with."""
        known = base.rows > self._exact_rows or self._costs.is_sure(base.rows)
        return known and max(base.most) > 0

    def _room(self, rows: int, answers: int, most_rows: int) -> int:
        """How many guesses a step of ``rows`` rows, ``answers`` of them of answers, may verify.

        Sizes that were not measured are tried in steps of twice as many: what they are expected to
        take is a guess, too.
        """
        if answers > self._exact_rows:
            return most_rows - rows
        if rows > self._exact_rows:
            return min(self._exact_rows - answers, most_rows - rows)
        most = min(self._exact_rows, most_rows)
        return min(most, 2 * self._costs.most_tried(most)) - rows

    async def _guess(self, answers: Items[Answer], base: _Base) -> list[tuple[Guess, ...]]:
        """What the drafter guesses; nothing if it fails, for no answer depends on it."""
        nothing: list[tuple[Guess, ...]] = [() for _ in answers]
        try:
            most = max(base.most)
            prospects = self._drafter.prospects(most)
            if prospects is not None:
                likely = self._choose([prospects] * len(answers), base, self._drafter.seconds)
                most = max(map(len, likely))
            if most <= 0:
                return nothing
            began_s = time.perf_counter()
            proposed = await self._drafter.propose(answers, most)
            guesses = [self._known(each) for _, each in zip(answers, proposed, strict=True)]
        except Exception as exc:
            self._give_up(exc)
            return nothing
        finally:
            for answer in answers:
                if answer.ended:  # and was forgotten before the drafter had seen it
                    self.forget(answer)
        self._drafting_s = self._looking_s = time.perf_counter() - began_s
        if prospects is not None:
            self._looking_s = min(self._looking_s, self._drafter.seconds(most))
        return guesses

    def _give_up(self, exc: Exception) -> None:
        if self._failure is not None:
            return
        _log.warning("no more drafts: the drafter failed", exc_info=exc)
        self._failure = exc

    def _known(self, guesses: Items[Guess]) -> tuple[Guess, ...]:
        """Those of the vocabulary, as long as their parents are."""
        if all(0 <= guess.token < self._vocab_size for guess in guesses):
            return tuple(guesses)
        known: list[int] = []
        for index, guess in enumerate(guesses):
            if 0 <= guess.token < self._vocab_size and (guess.parent < 0 or guess.parent in known):
                known.append(index)
        return _subtree(guesses, known)

    def see(self, piece: Piece, logits: torch.Tensor) -> None:
        """Show the drafter the logits (T, V) after a piece's last id and each guess."""
        if self._failure is None and self._looking:
            began_s = time.perf_counter()
            try:
                self._drafter.learn([piece.sequence.ids[-1], *piece.guessed], logits)
            except Exception as exc:
                self._give_up(exc)
            self.learning_s += time.perf_counter() - began_s

    def learn(self, piece: Piece, drawn: Items[int]) -> None:
        """Account for the tokens that were drawn for a piece, one after each right guess.

        Guesses of the next token are compared even if none was verified: that costs little.
        """
        if not self._looking:
            return
        began_s, stats = time.perf_counter(), self.stats
        tested, parent = piece.guesses or piece.first_guesses, -1
        for token in drawn:
            before, parent = parent, len(tested)
            for index, guess in enumerate(tested):
                if guess.parent != before:
                    continue
                right = guess.token == token
                parent = index if right else parent
                self._rate(guess).learn(right)
                stats.tested[guess.kind] = stats.tested.get(guess.kind, 0) + 1
                stats.hit[guess.kind] = stats.hit.get(guess.kind, 0) + right
        if piece.guesses:
            stats.guesses += len(piece.guesses)
            stats.right += len(drawn) - 1
        self.learning_s += time.perf_counter() - began_s

    def learn_step(self, pieces: Items[Piece], tokens: int, seconds: float) -> None:
        """Account for a step whose time is known to the costs.

        Args:
            pieces: of the step.
            tokens: that answers under way got.
            seconds: that it took.
        """
        base, guesses = self._base, sum(len(piece.guesses) for piece in pieces)
        token_s = (self._costs.seconds(1) or 0.0) if base is None else base.token_s
        self._looks.earn(seconds, token_s)
        self._losses.earn(seconds, token_s)
        if base is None or not self._looking:
            return
        looking_s = self._looking_s + self.learning_s
        if self._worth_s <= 0:
            self._looks.save(-looking_s, token_s)
        if not guesses:
            self._worth_s -= (looking_s + self._worth_s) / _LOOKED_STEPS
            return
        # What such a step takes where others do not disturb it: this one is no reason to stop.
        more_s = self._extended_s(base, guesses) + looking_s - base.seconds
        saved_s = token_s * (tokens - len(base.most)) - more_s
        self._worth_s += (saved_s - self._worth_s) / _LOOKED_STEPS
        self._losses.save(saved_s, token_s)
        stats = self.stats
        stats.steps += 1
        seconds += self._drafting_s
        stats.seconds += seconds
        stats.tokens += tokens
        predicted, predicted_s = self._predicted
        # Without guesses each of these tokens takes a step's share, without the rows of prompts.
        rest_s = base.seconds - base.token_s * len(base.most)
        stats.saved_s += rest_s + base.token_s * tokens - seconds
        stats.predicted_s += predicted_s
        stats.predicted_saved_s += rest_s + base.token_s * predicted - predicted_s

    def forget(self, answer: Answer) -> None:
        """An answer has ended."""
        try:
            self._drafter.forget(answer)
        except Exception as exc:
            self._give_up(exc)

    def reset(self) -> None:
        """Keep nothing of answers that have ended."""
        try:
            self._drafter.reset()
        except Exception as exc:
            self._give_up(exc)

    def explain(self) -> str:
        """Say what guesses bring, and why there are none if there are none."""
        stats = self.stats
        if not stats.steps:
            if self._failure is not None:
                return f"drafts: off; the drafter failed: {self._failure}"
            if self._gain is None or self._gain >= _LEAST_GAIN:
                return "drafts: none yet"
            return f"drafts: off, {self._gain:.2f} x expected (at least {_LEAST_GAIN} is asked)"
        failed = "" if self._failure is None else f"; off: the drafter failed: {self._failure}"
        time = f"{abs(stats.saved_s):.1f} s {'saved' if stats.saved_s >= 0 else 'lost'}"
        return (
            f"drafts: {stats.right} of {stats.guesses} guesses right in {stats.steps} steps, "
            f"{stats.tokens / stats.steps:.2f} tokens a step, {time}{failed}"
        )

    # -- the choice --------------------------------------------------------------------------

    def _choose(
        self, guesses: Items[Items[Guess]], base: _Base, drafting_s: Callable[[int], float]
    ) -> list[list[int]]:
        """Which guesses of each answer are verified, in addition to the rows of ``base``.

        The likeliest guesses of all answers are added one by one, none before its parent; those
        with the most expected tokens per second are taken. To guess down to a depth takes
        ``drafting_s``.
        """
        chosen: list[list[int]] = [[] for _ in guesses]
        left = list(base.most)
        expected = float(len(base.most))
        base_s = base.seconds + drafting_s(0)
        best_rate = base_rate = expected / base_s
        best_gain = 1.0
        predicted = [(expected, base.seconds)]
        order: list[tuple[int, int]] = []
        best = deepest = 0
        for likely, answer, index, depth in self._likeliest(guesses):
            if len(order) == base.room:
                break
            if not left[answer]:
                continue
            left[answer] -= 1
            order.append((answer, index))
            expected += likely
            deepest = max(deepest, depth)
            guessing_s = drafting_s(deepest)
            step_s = self._extended_s(base, len(order)) + guessing_s
            rate = expected / (self._hoped_s(base, len(order)) + guessing_s)
            best_gain = max(best_gain, rate / base_rate)
            if rate > best_rate and self._losses.left_s >= step_s - base_s:
                best, best_rate = len(order), rate
            predicted.append((expected, step_s))
        if order:  # else what prospects promise stands
            self._gain = best_gain
        gain = best_rate / base_rate
        if gain < _LEAST_GAIN:
            # There may be so much to lose that one can be tried.
            best = int(self._losses.is_full and bool(order))
        elif self._busy_steps >= min(self._compare_steps, (1 - 1 / gain) / _COMPARE_SHARE):
            self._compare_steps *= 2
            return chosen
        self._predicted = predicted[best]
        for answer, index in order[:best]:
            chosen[answer].append(index)
        return chosen

    def _likeliest(self, guesses: Items[Items[Guess]]) -> Iterator[tuple[float, int, int, int]]:
        """How likely each guess is, with its answer, index and depth; the likeliest first."""
        heap: list[tuple[float, int, int, int]] = []
        children: dict[tuple[int, int], list[int]] = {}
        for answer, tree in enumerate(guesses):
            for index, guess in enumerate(tree):
                children.setdefault((answer, guess.parent), []).append(index)

        def add(answer: int, parent: int, likely: float, depth: int) -> None:
            for index in children.get((answer, parent), ()):
                share = self._share(guesses[answer][index])
                heappush(heap, (-likely * share, answer, index, depth))

        for answer in range(len(guesses)):
            add(answer, -1, 1.0, 1)
        while heap:
            unlikely, answer, index, depth = heappop(heap)
            yield -unlikely, answer, index, depth
            add(answer, index, -unlikely, depth + 1)

    def _extended_s(self, base: _Base, guesses: int) -> float:
        """What a step is expected to take with so many guesses: not longer than one by one."""
        rows = base.rows + guesses
        seconds = self._seconds(rows, base.outputs + guesses)
        assert seconds is not None
        return min(seconds, base.seconds * rows / base.rows)

    def _hoped_s(self, base: _Base, guesses: int) -> float:
        """What it takes at best: sizes that were hardly tried are to be."""
        rows, outputs = base.rows + guesses, base.outputs + guesses
        seconds = self._costs.hoped_seconds(rows)
        assert seconds is not None
        return seconds + (self._output_costs.seconds(outputs) or 0.0)

    def _seconds(self, rows: int, outputs: int) -> float | None:
        step_s = self._costs.seconds(rows)
        return None if step_s is None else step_s + (self._output_costs.seconds(outputs) or 0.0)

    def _share(self, guess: Guess) -> float:
        rate = self._rate(guess)
        return rate.right / rate.all

    def _rate(self, guess: Guess) -> _Rate:
        found = self._rates.get(guess.kind)
        if found is None:
            found = _Rate(guess.prior * _PRIOR_WEIGHT, _PRIOR_WEIGHT)
            self._rates[guess.kind] = found
        return found


def _drafted(piece: Piece) -> Answer | None:
    """The answer that a piece draws a token for, if it computes nothing else."""
    sequence = piece.sequence
    if isinstance(sequence, Answer) and sequence.todo == 1 and not sequence.ended:
        return sequence
    return None


def _subtree(guesses: Items[Guess], chosen: Items[int]) -> tuple[Guess, ...]:
    """The chosen guesses, which include their parents, in the order of all."""
    numbers = {-1: -1} | {index: number for number, index in enumerate(sorted(chosen))}
    return tuple(
        guesses[index]._replace(parent=numbers[guesses[index].parent]) for index in sorted(chosen)
    )
