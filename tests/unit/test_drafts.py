"""Guesses from a text's own past, and how many of them a step verifies."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.nightly import nightly_but
from tpirt.engine.drafts.base import Drafter, Guess
from tpirt.engine.drafts.controller import DraftController, DraftStats
from tpirt.engine.drafts.model import ModelDrafter
from tpirt.engine.drafts.suffix import SuffixDrafter, SuffixIndex
from tpirt.engine.sampler import Sampler
from tpirt.engine.scheduler import Piece
from tpirt.engine.sequence import Answer, Scoring
from tpirt.engine.step_costs import StepCosts
from tpirt.errors import MemoryLimitError, StoreError, TpirtError
from tpirt.testing.cluster import memory_engine
from tpirt.testing.drafters import KnownAnswers
from tpirt.testing.models import make_model
from tpirt.types import SamplingParams, Token, ignore_progress


class Words:
    """A writer that never stops."""

    left = 1000

    def push(self, token_id: int) -> Token:
        return Token(token_id, "")


def answer(ids: list[int]) -> Answer:
    made = Answer(ids, Sampler(SamplingParams()), Words(), ignore_progress)  # type: ignore[arg-type]
    made.admit(0, len(ids) - 1)
    return made


def costs(flat: bool) -> StepCosts:
    """A row more costs nothing, or as much as the first."""
    return known_costs({rows: 1.0 if flat else float(rows) for rows in (*range(1, 9), 17)})


def known_costs(seconds: dict[int, float]) -> StepCosts:
    """Costs by rows, measured often enough to be sure of."""
    known = StepCosts()
    for rows, each in seconds.items():
        for _ in range(3):
            known.learn(rows, each)
    return known


def controlled(
    drafter: Drafter,
    costs: StepCosts,
    vocab_size: int = 1000,
    output_costs: StepCosts | None = None,
) -> DraftController:
    """A controller of steps of up to 64 rows, 8 of which have the bits of one."""
    return DraftController(drafter, costs, output_costs or StepCosts(), vocab_size, 8)


async def go_without(controller: DraftController, asked: Answer, seconds: float) -> None:
    """Take a step without guesses."""
    await controller.extend([Piece(asked, 1)], 64)
    controller.learn_step([Piece(asked, 1)], 1, seconds)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_the_longest_match_is_found(ids: list[int]) -> None:
    """Against a search over all places, but for matches of which there are very many."""
    index = SuffixIndex()
    index.extend(ids)
    length, place = next(iter(index.find()), (0, 0))

    def matched(at: int) -> int:
        common = 0
        while common < at and ids[at - 1 - common] == ids[len(ids) - 1 - common]:
            common += 1
        return common

    assert length == (matched(place) if place else 0)
    recent = [at for at in range(1, len(ids)) if ids[at - 1] == ids[-1]]
    if len(recent) <= 16:
        assert length == max(map(matched, recent), default=0)


async def test_guesses_are_what_followed() -> None:
    drafter = SuffixDrafter(20)
    asked = answer([1, 2, 3, 4, 5, 6, 9, 2, 3, 4])
    (found,) = await drafter.propose([asked], 4)
    assert [guess.token for guess in found] == [5, 6, 9, 2]
    assert [guess.kind for guess in found] == ["suffix 3", "suffix 4", "suffix 4", "suffix 6"]
    asked.ids += [5, 6]
    (found,) = await drafter.propose([asked], 1)
    assert [guess.token for guess in found] == [9]
    (nothing,) = await drafter.propose([answer([1, 2, 3])], 4)
    assert nothing == []


@pytest.mark.parametrize(("hit_rate", "flat", "verified"), [(0.9, True, 7), (0.9, False, 0)])
async def test_guesses_are_verified_where_they_pay(
    hit_rate: float, flat: bool, verified: int
) -> None:
    prompt = [1, 2, 3]
    drafter = KnownAnswers({tuple(prompt): list(range(100))}, hit_rate, told=True)
    controller = controlled(drafter, costs(flat))
    await go_without(controller, answer(prompt), 1000.0)
    (piece,) = await controller.extend([Piece(answer(prompt), 1)], 64)
    assert len(piece.guesses) == verified
    assert piece.segment().tokens == piece.segment().num_logits == 1 + verified
    assert ("off" in controller.explain()) == (verified == 0)


@pytest.mark.parametrize(("saved_s", "said"), [(1.26, "1.3 s saved"), (-0.04, "0.0 s lost")])
def test_time_that_guesses_cost_is_called_lost(saved_s: float, said: str) -> None:
    controller = controlled(Fixed({}), costs(flat=True))
    controller.stats = DraftStats(steps=2, tokens=2, saved_s=saved_s)
    assert controller.explain().endswith(f"1.00 tokens a step, {said}")


async def test_rows_are_dealt_to_the_likeliest_guesses_within_the_steps_rows() -> None:
    sure, unsure = answer([1]), answer([2])
    drafter = Fixed({sure: 0.95, unsure: 0.3})
    controller = controlled(drafter, costs(flat=True))
    first, second = await controller.extend([Piece(sure, 1), Piece(unsure, 1)], 64)
    assert len(first.guesses) > len(second.guesses)
    assert 2 + len(first.guesses) + len(second.guesses) == 8


async def test_beside_prompts_guesses_leave_room_for_all_answers_of_the_step() -> None:
    """Also for one that its caller has just left: more than 8 rows have other bits."""
    sure, left = answer([1]), answer([2])
    prompt, scored = Answer([3] * 20, *(None,) * 3), Scoring([4] * 5, ignore_progress)  # type: ignore[arg-type]
    left.end()
    scored.admit(0, 4)
    pieces = [Piece.of(each, 20 if each is prompt else 1) for each in (sure, left, scored, prompt)]
    costs_of_all = known_costs(dict.fromkeys((*range(1, 9), 23, 64), 1.0))
    controller = controlled(Fixed({sure: 0.95}), costs_of_all)
    extended = await controller.extend(pieces, 64)
    segments = [piece.segment() for piece in extended if piece.sequence.slot is not None]
    assert [segment.prompt for segment in segments] == [False, False, True]
    assert sum(segment.tokens for segment in segments if not segment.prompt) == 8


async def test_wrong_guesses_turn_themselves_off_and_right_ones_on_again() -> None:
    """A first guess is compared even while none is verified, so that nothing is lost by that."""
    asked = answer([1])
    controller = controlled(Fixed({asked: 0.9}), costs_of_a_disk())
    for right in (False, True):
        for _ in range(60):
            (piece,) = await controller.extend([Piece(asked, 1)], 64)
            drawn = [*piece.guessed, 7] if right else [99]
            controller.learn(piece, drawn)
            controller.learn_step([piece], len(drawn), 1.0 + 0.06 * piece.segment().tokens)
        assert (len(piece.guesses) > 3) == right


def costs_of_a_disk() -> StepCosts:
    return known_costs({rows: 1.0 + 0.06 * rows for rows in (1, 2, 4, 8)})


class Fixed:
    """Guesses the token 7, with a given prior for each answer."""

    def __init__(self, priors: dict[Answer, float]):
        self._priors = priors

    def prospects(self, most: int) -> Any:
        pass

    def seconds(self, depth: int) -> float:
        return 0.0

    async def propose(self, answers: list[Answer], most: int) -> list[list[Guess]]:
        return [
            [
                Guess(7, depth - 1, f"{self._priors[answer]}", self._priors[answer])
                for depth in range(most)
            ]
            for answer in answers
        ]

    def learn(self, ids: list[int], logits: torch.Tensor) -> None:
        pass

    def forget(self, answer: Answer) -> None:
        pass

    def reset(self) -> None:
        pass


async def test_a_drafter_that_fails_or_knows_no_bounds_harms_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = answer([1])
    controller = controlled(Fixed({asked: 0.9}), costs(flat=True), 7)
    (piece,) = await controller.extend([Piece(asked, 1)], 64)
    assert piece.guesses == ()  # 7 is no token of 7
    failing = controlled(Fixed({}), costs(flat=True))
    for _ in range(2):
        assert await failing.extend([Piece(asked, 1)], 64) == [Piece(asked, 1)]
    assert "the drafter failed" in failing.explain()
    assert len(caplog.records) == 1


class Failing(Fixed):
    """Its method ``fails`` raises."""

    def __init__(self, asked: Answer, fails: str):
        super().__init__({asked: 0.9})

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        setattr(self, fails, fail)

    def prospects(self, most: int) -> Any:
        return [Guess(0, depth - 1, "likely", 0.9) for depth in range(most)]


@pytest.mark.parametrize("fails", ["prospects", "seconds", "propose", "learn", "forget"])
async def test_whatever_fails_in_a_drafter_ends_nothing_but_guesses(
    caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    asked = answer([1])
    controller = controlled(Failing(asked, fails), costs(flat=True))
    for _ in range(2):
        (piece,) = await controller.extend([Piece(asked, 1)], 64)
        controller.see(piece, torch.zeros(1 + len(piece.guesses), 8))
        controller.forget(asked)
    (piece,) = await controller.extend([Piece(asked, 1)], 64)
    assert piece.guesses == ()
    assert "the drafter failed" in controller.explain()
    assert len(caplog.records) == 1


async def test_a_drafter_that_leaves_an_answer_out_has_failed() -> None:
    class Short(Fixed):
        async def propose(self, answers: list[Answer], most: int) -> list[list[Guess]]:
            return []

    asked = answer([1])
    controller = controlled(Short({asked: 0.9}), costs(flat=True))
    assert await controller.extend([Piece(asked, 1)], 64) == [Piece(asked, 1)]
    assert "the drafter failed" in controller.explain()


async def test_an_answer_that_is_left_while_it_is_guessed_is_forgotten() -> None:
    class Slow(SuffixDrafter):
        async def propose(self, answers: Items[Answer], most: int) -> list[list[Guess]]:
            for answer in answers:
                answer.end()
                controller.forget(answer)
            return await super().propose(answers, most)

    drafter = Slow(1000)
    controller = controlled(drafter, costs(flat=True))
    await controller.extend([Piece(answer([1]), 1)], 64)
    assert drafter._texts == {}


async def test_no_guess_is_verified_before_a_step_without_is_known() -> None:
    """What a prompt's step took says nothing of a token's, and a group's first steps are slow."""
    asked = answer([1])
    known = known_costs({64: 5.0})
    controller = controlled(Fixed({asked: 0.9}), known)
    sizes = []
    for _ in range(20):
        (piece,) = await controller.extend([Piece(asked, 1)], 64)
        rows = piece.segment().tokens
        sizes.append(rows)
        known.learn(rows, seconds := 4.0 if len(sizes) == 1 else 1.0 + 0.01 * rows)
        controller.learn(piece, [*piece.guessed, 1])
        controller.learn_step([piece], rows, seconds)
    # Then as many as were tried, and as many again, when that may be lost.
    assert sizes[:4] == [1, 1, 1, 2]
    assert [size for size in sizes if size > 1][:3] == [2, 4, 8]


async def test_logits_of_a_row_are_not_free() -> None:
    asked = answer([1])
    outputs = known_costs({rows: float(rows) for rows in (1, 2, 4, 8)})
    controller = controlled(Fixed({asked: 0.8}), costs(flat=True), output_costs=outputs)
    await go_without(controller, asked, 1000.0)
    (piece,) = await controller.extend([Piece(asked, 1)], 64)
    assert len(piece.guesses) == 2  # of 7 if they were free


COSTS: dict[str, Callable[[int], float]] = {
    "flat": lambda rows: 1.0,
    "6 % a row": lambda rows: 1 + 0.06 * (rows - 1),
    "30 % a row": lambda rows: 1 + 0.3 * (rows - 1),
    "linear": float,
    "twice from 2 rows on": lambda rows: 1.0 + (rows > 1),
    "again for each 4 rows": lambda rows: (rows + 3) // 4,
}


@pytest.mark.parametrize("cost", nightly_but(["6 % a row", "twice from 2 rows on"], COSTS))
async def test_guesses_cost_3_percent_at_most_and_bring_most_of_what_they_can(
    monkeypatch: pytest.MonkeyPatch, cost: str
) -> None:
    """Over thousands of tokens, however often guesses are right and whatever a row costs."""
    best = min(COSTS[cost](rows) / (1 - 0.9**rows) * 0.1 for rows in range(1, 17))
    for hit_rate in (0.0, 0.3, 0.9):
        for look_s, noise in ((0.1, 0.0), (0.0, 0.1)):
            simulation = Simulation(COSTS[cost], hit_rate, look_s, noise)
            monkeypatch.setattr("tpirt.engine.drafts.controller.time", simulation)
            share = await simulation.run(2000)
            assert share <= 1.03
            assert hit_rate < 0.9 or share <= 1.2 * best + 0.1


async def test_what_it_takes_to_learn_from_a_step_is_part_of_what_guesses_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without, they would bring a fifth; so they are looked for only now and then."""
    simulation = Simulation(COSTS["6 % a row"], 0.3, look_s=0.1, noise=0.0, learn_s=0.2)
    monkeypatch.setattr("tpirt.engine.drafts.controller.time", simulation)
    assert await simulation.run(2000) <= 1.03
    assert simulation.looks < 2000 / 128 / 0.3 + 50


async def test_a_machine_that_stood_still_does_not_end_guesses() -> None:
    asked = answer([1])
    known = known_costs({1: 1.0})
    controller = controlled(Fixed({asked: 0.9}), known)
    verified = []
    for _ in range(600):
        (piece,) = await controller.extend([Piece(asked, 1)], 64)
        seconds = 1.0 if any(verified) or not piece.guesses else 1000.0
        known.learn(piece.segment().tokens, seconds)
        controller.learn(piece, [*piece.guessed, 7])
        controller.learn_step([piece], 1 + len(piece.guesses), seconds)
        verified.append(len(piece.guesses))
    assert max(verified) == 7


class Simulation:
    """An answer, and its times: a clock that steps and looking for guesses move on.

    Args:
        cost: of a step, by rows.
        hit_rate: how often a guess is right, if those before it are.
        look_s: what looking for guesses takes.
        noise: of the times; a few steps take three times as long, too.
        learn_s: what it takes to learn from a step.

    Attributes:
        looks: how often guesses were looked for.
    """

    def __init__(
        self,
        cost: Callable[[int], float],
        hit_rate: float,
        look_s: float,
        noise: float,
        learn_s: float = 0.0,
    ):
        self._cost, self._hit_rate, self._noise = cost, hit_rate, noise
        self._look_s, self._learn_s = look_s, learn_s
        self.looks = 0
        self._now_s = 0.0
        self._random = random.Random(3)

    def perf_counter(self) -> float:
        return self._now_s

    async def run(self, tokens: int) -> float:
        """Returns the time of so many tokens, in times of the same steps without guesses."""
        asked = answer([1])
        costs, made = StepCosts(), 0
        controller = DraftController(self, costs, StepCosts(), 1000, 16)
        while made < tokens:
            (piece,) = await controller.extend([Piece(asked, 1)], 64)
            rows, drawn = piece.segment().tokens, self._draw(piece)
            seconds = self._cost(rows) * self._slower()
            self._now_s += seconds
            costs.learn(rows, seconds)
            controller.see(piece, torch.zeros(rows, 8))
            controller.learn(piece, drawn)
            controller.learn_step([piece], len(drawn), seconds + controller.learning_s)
            made += len(drawn)
        self._random = random.Random(4)
        return self._now_s / sum(self._cost(1) * self._slower() for _ in range(made))

    def _draw(self, piece: Piece) -> list[int]:
        drawn: list[int] = []
        while True:
            right = self._random.random() < self._hit_rate
            drawn.append(7 if right else 9)
            if not right or len(drawn) > len(piece.guesses):
                return drawn

    def _slower(self) -> float:
        if not self._noise:
            return 1.0
        slow = 3.0 if self._random.random() < 0.03 else 1.0
        return slow * self._random.lognormvariate(0, self._noise)

    def prospects(self, most: int) -> Any:
        pass

    def seconds(self, depth: int) -> float:
        return 0.0

    async def propose(self, answers: list[Answer], most: int) -> list[list[Guess]]:
        self.looks += 1
        self._now_s += self._look_s
        return [[Guess(7, depth - 1, f"{depth}", 0.5) for depth in range(most)] for _ in answers]

    def learn(self, ids: list[int], logits: torch.Tensor) -> None:
        self._now_s += self._learn_s

    def forget(self, answer: Answer) -> None:
        pass


async def test_matches_that_went_on_otherwise_are_branches() -> None:
    asked = answer([1, 2, 3, 8, 9, 1, 2, 3, 5, 6, 1, 2, 3])
    (found,) = await SuffixDrafter(20).propose([asked], 2)
    assert [(guess.token, guess.parent) for guess in found] == [(5, -1), (6, 0), (8, -1), (9, 2)]
    assert found[2].kind == "suffix 3 else"


async def test_the_likeliest_successors_are_guessed_where_nothing_matches() -> None:
    drafter = SuffixDrafter(8)
    logits = torch.zeros(2, 8)
    logits[0, [4, 5, 6]] = torch.tensor([3.0, 2.0, 1.0])  # after 3
    logits[1, [7, 1, 2]] = torch.tensor([3.0, 2.0, 1.0])  # after 4
    drafter.learn([3, 4], logits)
    (found,) = await drafter.propose([answer([1, 2, 3])], 2)
    assert [(guess.token, guess.parent) for guess in found] == [
        *((4, -1), (5, -1), (6, -1)),
        *((7, 0), (1, 0)),
    ]
    (found,) = await drafter.propose([answer([3, 4, 1, 2, 3])], 1)
    assert [guess.kind for guess in found] == [
        *("suffix 1", "successor 1, rank 2", "successor 1, rank 3"),
    ]


async def test_time_for_a_prompts_rows_is_no_loss_of_guesses() -> None:
    """A step with a guess and a prompt takes 3 s: 1 s of them is the answer's, 2 s the prompt's."""
    asked, prompt = answer([1]), Scoring([5] * 40, ignore_progress)
    prompt.admit(1, 0)
    known = known_costs({1: 1.0, 2: 1.0, 24: 3.0, 48: 3.0})
    controller = controlled(Fixed({asked: 1.0}), known)
    pieces = await controller.extend([Piece(asked, 1), Piece(prompt, 30, prompt=True)], 64, 1)
    assert [len(piece.guesses) for piece in pieces] == [1, 0]
    controller.learn_step(pieces, 2, 3.0)
    assert controller.stats.saved_s == pytest.approx(1.0, abs=0.01)
    assert controller.stats.predicted_saved_s == pytest.approx(1.0, abs=0.3)


async def test_guesses_of_a_tree_are_counted_along_the_path_that_was_drawn() -> None:
    asked = answer([1])
    controller = controlled(Tree(), costs(flat=True))
    (piece,) = await controller.extend([Piece(asked, 1)], 64)
    assert [(guess.token, guess.parent) for guess in piece.guesses] == Tree.NODES
    assert piece.segment().parents == (1, 2, 1, 3)
    controller.learn(piece, [5, 6, 9])
    assert controller.stats.right == 2
    assert controller.stats.tested == {"4": 1, "5": 1, "6": 1}
    assert controller.stats.hit == {"4": 0, "5": 1, "6": 1}


class Tree(Fixed):
    """Four guesses: 4 or 5, then 6 after 5 and 7 after 4."""

    NODES: ClassVar = [(4, -1), (5, -1), (6, 1), (7, 0)]

    def __init__(self) -> None:
        super().__init__({})

    async def propose(self, answers: list[Answer], most: int) -> list[list[Guess]]:
        return [[Guess(token, parent, str(token), 0.5) for token, parent in self.NODES]]


class Small:
    """A small model of four tokens: after each token, the next one is likely."""

    context_length = 100

    async def draw(self, ids: list[int], sampler: Sampler, most: int) -> None:
        token = ids[-1]
        for _ in range(most):
            logits = torch.zeros(4)
            logits[(token + 1) % 4] = 2.0
            logits[(token + 2) % 4] = 1.0
            logits[(token + 3) % 4] = 0.5
            token = sampler.next(logits, [])


async def test_a_small_models_likely_tokens_are_branches_of_its_own_choice() -> None:
    drafter = ModelDrafter(Small(), 1000)  # type: ignore[arg-type]
    (found,) = await drafter.propose([answer([3])], 2)
    assert [(guess.token, guess.parent) for guess in found] == [
        *((0, -1), (1, -1), (2, -1)),
        *((1, 0), (2, 0), (3, 0)),
    ]
    assert [guess.kind for guess in found[:2]] == ["model 50%", "model 20%"]
    # What is to be expected before it is asked again.
    assert [guess.kind for guess in drafter.prospects(3)] == ["model 50%"] * 3
    assert drafter.seconds(2) > 0
    (nothing,) = await drafter.propose([answer([3] * 99)], 2)
    assert nothing == []


async def test_a_small_model_guesses_for_as_many_answers_as_it_has_memory_for() -> None:
    drafter = ModelDrafter(Small(), 100)  # type: ignore[arg-type]
    answers = [answer([3] * length) for length in (40, 60, 40)]
    assert list(map(bool, await drafter.propose(answers, 2))) == [True, False, True]


async def test_a_small_models_failure_is_that_of_one_answer_or_ends_all() -> None:
    class Failing(Small):
        error: TpirtError = MemoryLimitError("the system refused memory")
        running = 0

        async def draw(self, ids: list[int], sampler: Sampler, most: int) -> None:
            self.running += 1
            try:
                await asyncio.sleep(0)
                if ids == [2]:
                    raise self.error
                await super().draw(ids, sampler, most)
                if isinstance(self.error, StoreError):
                    await asyncio.Event().wait()
            finally:
                self.running -= 1

    small = Failing()
    drafter = ModelDrafter(small, 1000)  # type: ignore[arg-type]
    answers = [answer([1]), answer([2]), answer([3])]
    assert list(map(bool, await drafter.propose(answers, 2))) == [True, False, True]
    small.error = StoreError("disk on fire")
    with pytest.raises(StoreError, match="disk on fire"):
        await drafter.propose(answers, 2)
    assert small.running == 0


async def test_a_small_models_prompt_is_no_part_of_what_a_guess_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Slow(Small):
        def __init__(self) -> None:
            self.now_s, self._computed = 0.0, 0

        def perf_counter(self) -> float:
            return self.now_s

        async def draw(self, ids: list[int], sampler: Sampler, most: int) -> None:
            self.now_s += len(ids) - self._computed - 1
            self._computed = len(ids)
            for _ in range(most):
                self.now_s += 1
                sampler.next(torch.zeros(4), [])

        def reset(self) -> None:
            self._computed = 0

    small = Slow()
    monkeypatch.setattr("tpirt.engine.drafts.model.time", small)
    drafter, asked = ModelDrafter(small, 1000), answer([3] * 50)  # type: ignore[arg-type]
    await drafter.propose([asked], 1)
    assert drafter.seconds(1) == 1
    asked.ids.append(3)
    await drafter.propose([asked], 1)
    await drafter.propose([answer([3] * 50)], 4)
    drafter.reset()
    await drafter.propose([asked], 1)
    assert drafter.seconds(1) == 1


async def test_nor_is_the_prompt_of_another_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are in the same steps: one with them takes 10 s, others 1 s."""

    class Joint(Small):
        def __init__(self) -> None:
            self.now_s = 0.0
            self.known: set[int] = set()
            self.active: list[tuple[Sampler, int]] = []

        def perf_counter(self) -> float:
            return self.now_s

        async def draw(self, ids: list[int], sampler: Sampler, most: int) -> None:
            self.active.append((sampler, most))
            await asyncio.sleep(0)  # all have come
            if self.active and self.active[0][0] is sampler:
                new = set(map(id, both)) - self.known
                self.known |= new
                for step in range(max(most for _, most in self.active)):
                    self.now_s += 10 if new and not step else 1
                    for other, left in self.active:
                        if step < left:
                            other.next(torch.zeros(4), [])
                self.active.clear()

    small = Joint()
    monkeypatch.setattr("tpirt.engine.drafts.model.time", small)
    drafter, asked = ModelDrafter(small, 10_000), answer([3] * 4)  # type: ignore[arg-type]
    both = [asked]
    for _ in range(12):
        await drafter.propose(both, 1)
        asked.ids.append(3)
        both = [asked, answer([4] * 50)]
    assert drafter.seconds(1) == 1


async def test_one_slow_guess_of_a_small_model_is_no_reason_to_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Pausing(Small):
        now_s, token_s = 0.0, 1.0

        def perf_counter(self) -> float:
            return self.now_s

        async def draw(self, ids: list[int], sampler: Sampler, most: int) -> None:
            self.now_s += most * self.token_s
            await super().draw(ids, sampler, most)

    small = Pausing()
    monkeypatch.setattr("tpirt.engine.drafts.model.time", small)
    drafter, asked = ModelDrafter(small, 1000), answer([3])  # type: ignore[arg-type]
    seconds = []
    for token_s in (1.0, 1.0, 1.0, 900.0, 1.0, *(2.0 for _ in range(9))):
        small.token_s = token_s
        await drafter.propose([asked], 1)
        seconds.append(drafter.seconds(1))
    assert max(seconds) <= 2
    assert seconds[-1] == 2


async def test_a_small_model_that_is_never_right_is_asked_again_when_that_can_be_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing tells how often it would be right while it is not asked."""

    class Wrong(Fixed):
        asked, now_s = 0, 0.0

        def perf_counter(self) -> float:
            return self.now_s

        def prospects(self, most: int) -> list[Guess]:
            return [Guess(0, depth - 1, "likely", 0.9) for depth in range(most)]

        def seconds(self, depth: int) -> float:
            return 0.2 * depth

        async def propose(self, answers: list[Answer], most: int) -> list[list[Guess]]:
            self.asked, self.now_s = self.asked + 1, self.now_s + 0.2
            return [[Guess(7, -1, "likely", 0.9)] for _ in answers]

    asked = answer([1])
    drafter = Wrong({})
    monkeypatch.setattr("tpirt.engine.drafts.controller.time", drafter)
    controller = controlled(drafter, costs(flat=True))
    for steps in (100, 3000):
        drafter.asked = 0
        for _ in range(steps):
            (piece,) = await controller.extend([Piece(asked, 1)], 64)
            controller.learn(piece, [9])
            controller.learn_step([piece], 1, 1.0)
    assert 2 <= drafter.asked <= 3000 / 64 / 0.2


async def test_known_answers_have_the_costs_of_a_small_model_and_not_its_guesses(
    tmp_path: Path,
) -> None:
    class Small(Fixed):
        held_bytes = 12345

        def seconds(self, depth: int) -> float:
            return 0.1 * depth

    asked = answer([5, 6])
    small: Any = Small({asked: 1.0})
    drafter = KnownAnswers({(5, 6): [1, 2, 3]}, 1.0, costs=small)
    ((first, second),) = await drafter.propose([asked], 2)
    assert [first.token, second.token] == [1, 2]
    assert drafter.seconds(3) == small.seconds(3)
    async with memory_engine(make_model(tmp_path / "model"), 2, draft=drafter) as engine:
        assert [peer.reserved_bytes for peer in engine.peers] == [small.held_bytes, 0]
