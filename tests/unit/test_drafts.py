"""Guesses from a text's own past, and how many of them a step verifies."""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpirt.engine import Engine, EngineOptions
from tpirt.engine.drafts.base import Drafter, Guess
from tpirt.engine.drafts.controller import DraftController
from tpirt.engine.drafts.model import ModelDrafter
from tpirt.engine.drafts.suffix import SuffixDrafter, SuffixIndex
from tpirt.engine.sampler import Sampler
from tpirt.engine.scheduler import Piece
from tpirt.engine.sequence import Answer
from tpirt.engine.step_costs import StepCosts
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
    made.admit(0, len(ids) - 1, None)
    return made


def costs(flat: bool) -> StepCosts:
    """A row more costs nothing, or as much as the first."""
    return known_costs({rows: 1.0 if flat else float(rows) for rows in (1, 2, 4, 8, 17)})


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
    (piece,) = await controller.extend([Piece(answer(prompt), 1)], 64)
    assert len(piece.guesses) == verified
    assert piece.segment().tokens == piece.segment().num_logits == 1 + verified
    assert ("off" in controller.explain()) == (verified == 0)


async def test_rows_are_dealt_to_the_likeliest_guesses_within_the_steps_rows() -> None:
    sure, unsure = answer([1]), answer([2])
    drafter = Fixed({sure: 0.95, unsure: 0.3})
    controller = controlled(drafter, costs(flat=True))
    first, second = await controller.extend([Piece(sure, 1), Piece(unsure, 1)], 64)
    assert len(first.guesses) > len(second.guesses)
    assert 2 + len(first.guesses) + len(second.guesses) == 8


async def test_wrong_guesses_turn_themselves_off_and_right_ones_on_again() -> None:
    """A first guess is compared even while none is verified, so that nothing is lost by that."""
    asked = answer([1])
    controller = controlled(Fixed({asked: 0.9}), costs_of_a_disk())
    for _ in range(60):
        (piece,) = await controller.extend([Piece(asked, 1)], 64)
        controller.learn(piece, [99])
    assert piece.guesses == ()
    for _ in range(60):
        (piece,) = await controller.extend([Piece(asked, 1)], 64)
        controller.learn(piece, [*piece.guessed, 1] if piece.guesses else [7])
    assert len(piece.guesses) > 3


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


@pytest.mark.parametrize(
    ("draft", "rows", "is_told"), [("suffix", 1, True), ("suffix", 8, False), ("auto", 1, False)]
)
async def test_drafts_that_were_asked_for_and_cannot_be_are_told_at_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, draft: str, rows: int, is_told: bool
) -> None:
    monkeypatch.setattr("tpirt.cluster.rank.same_kernel_rows", lambda *_: rows)
    options = EngineOptions(dtype="float32", threads=1, store=tmp_path / "store", draft=draft)
    async with Engine.connect(make_model(tmp_path / "model"), options) as engine:
        assert ["drafts: off; for these weights" in notice for notice in engine.notices] == (
            [True] if is_told else []
        )


async def test_no_guess_is_verified_before_a_step_without_is_known() -> None:
    """What a prompt's step took says nothing of a token's, and a group's first steps are slow."""
    asked = answer([1])
    known = known_costs({64: 5.0})
    controller = controlled(Fixed({asked: 0.9}), known)
    sizes = []
    for _ in range(9):
        (piece,) = await controller.extend([Piece(asked, 1)], 64)
        rows = piece.segment().tokens
        sizes.append(rows)
        known.learn(rows, 4.0 if len(sizes) == 1 else 1.0 + 0.01 * rows)
    # Then as many as were tried, and as many again.
    assert sizes[:4] == [1, 1, 1, 2]
    assert sizes[4:6] == [4, 8]


async def test_logits_of_a_row_are_not_free() -> None:
    asked = answer([1])
    outputs = known_costs({rows: float(rows) for rows in (1, 2, 4, 8)})
    controller = controlled(Fixed({asked: 0.8}), costs(flat=True), output_costs=outputs)
    (piece,) = await controller.extend([Piece(asked, 1)], 64)
    assert len(piece.guesses) == 2  # of 7 if they were free


async def test_where_nothing_pays_guesses_are_looked_for_in_each_eighth_step() -> None:
    asked = answer([1])
    controller = controlled(Fixed({asked: 0.0}), costs(flat=False))
    looked = []
    for _ in range(56):
        (piece,) = await controller.extend([Piece(asked, 1)], 64)
        looked.append(bool(piece.first_guesses))
    assert looked == [*[True] * 33, *([False] * 7 + [True]) * 2, *[False] * 7]


async def test_a_step_without_guesses_is_measured_again() -> None:
    asked = answer([1])
    controller = controlled(Fixed({asked: 0.9}), costs(flat=True))
    sizes = [len((await controller.extend([Piece(asked, 1)], 64))[0].guesses) for _ in range(60)]
    assert sizes == [*[7] * 8, 0, *[7] * 16, 0, *[7] * 32, 0, 7]


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
    drafter = ModelDrafter(Small())  # type: ignore[arg-type]
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
