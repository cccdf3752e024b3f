"""What the next step computes, from states alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpirt.engine.scheduler import Scheduler
from tpirt.engine.sequence import Scoring
from tpirt.engine.step_costs import StepCosts
from tpirt.types import ignore_progress


def sequence(length: int, computed: int = 0, *, user: str = "", priority: int = 0) -> Scoring:
    made = Scoring(range(length), ignore_progress)
    made.user, made.priority = user, priority
    made.admit(id(made), computed, None)
    return made


def costs(**seconds: float) -> StepCosts:
    """Costs of steps by rows: ``costs(r1=1.0, r8=2.0)``."""
    known = StepCosts()
    for rows, second in seconds.items():
        known.learn(int(rows[1:]), second)
    return known


def test_answers_come_first_and_prompts_fill_the_rest() -> None:
    answers = [sequence(10, 9), sequence(5, 4)]
    prompts = [sequence(20), sequence(30, 10)]
    plan = Scheduler(32, StepCosts()).plan([prompts[0], *answers, prompts[1]])
    assert [(piece.sequence, piece.tokens) for piece in plan] == [
        (answers[0], 1),
        (answers[1], 1),
        (prompts[0], 20),
        (prompts[1], 10),
    ]


def test_a_prompt_does_not_hold_answers_up() -> None:
    """A step with answers takes at most twice as long as without the prompt."""
    known = costs(r1=0.010, r4=0.012, r8=0.016, r12=0.022, r512=1.0)
    answers, prompt = [sequence(9, 8) for _ in range(3)], sequence(2000)
    plan = Scheduler(512, known).plan([*answers, prompt])
    rows = sum(piece.tokens for piece in plan)
    assert rows > 4
    assert (known.seconds(rows) or 0) <= 2 * (known.seconds(3) or 0)
    assert (
        sum(p.tokens for p in Scheduler(512, known, stall_free=False).plan([*answers, prompt]))
        == 512
    )
    assert sum(p.tokens for p in Scheduler(512, known).plan([prompt])) == 512


def test_a_prompt_goes_on_even_if_a_row_takes_too_long() -> None:
    plan = Scheduler(64, costs(r1=0.01, r2=0.05, r64=2.0)).plan([sequence(9, 8), sequence(50)])
    assert [piece.tokens for piece in plan] == [1, 1]


def test_more_answers_than_rows_take_turns() -> None:
    answers = [sequence(5, 4) for _ in range(5)]
    scheduler = Scheduler(2, StepCosts())
    served = []
    for step in range(1, 4):
        for piece in scheduler.plan(answers):
            served.append(answers.index(piece.sequence))  # type: ignore[arg-type]
            piece.sequence.turn = step
    assert served == [0, 1, 2, 3, 4, 0]


def test_answers_leave_a_row_for_a_prompt() -> None:
    prompt = sequence(10)
    plan = Scheduler(4, StepCosts()).plan([*(sequence(5, 4) for _ in range(6)), prompt])
    assert [piece.tokens for piece in plan] == [1] * 4
    assert plan[-1].sequence is prompt


def test_paused_sequences_are_left_out() -> None:
    paused, other = sequence(9, 8), sequence(7)
    paused.put(None)  # type: ignore[arg-type]
    assert paused.paused
    assert [p.sequence for p in Scheduler(16, StepCosts()).plan([paused, other])] == [other]
    assert Scheduler(16, StepCosts()).plan([paused]) == []


def test_users_take_turns_in_order_of_priority() -> None:
    a = [sequence(3, user="a") for _ in range(3)]
    b = [sequence(3, user="b") for _ in range(2)]
    urgent = sequence(3, user="a", priority=1)
    again = sequence(3, user="a")
    again.again = True
    ordered = Scheduler(16, StepCosts()).order([*a, *b, urgent, again], [])
    assert ordered[:2] == [again, urgent]
    assert ordered[2:] == [b[0], b[1], *a] or ordered[2:4] == [a[0], b[0]]
    running = [sequence(3, user="a") for _ in range(2)]
    assert Scheduler(16, StepCosts()).order([*a, *b], running) == [b[0], b[1], *a]


@given(
    st.integers(1, 64),
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 99)), max_size=20),
    st.lists(st.tuples(st.integers(1, 600), st.floats(1e-4, 10)), max_size=12),
    st.booleans(),
)
def test_a_step_is_within_its_bounds(
    chunk: int, states: list[tuple[int, int]], steps: list[tuple[int, float]], stall_free: bool
) -> None:
    known = StepCosts()
    for rows, seconds in steps:
        known.learn(rows, seconds)
    running = [sequence(length, min(done, length - 1)) for length, done in states]
    plan = Scheduler(chunk, known, stall_free=stall_free).plan(running)
    assert sum(piece.tokens for piece in plan) <= chunk
    assert all(1 <= piece.tokens <= piece.sequence.todo for piece in plan)
    assert len({id(piece.sequence) for piece in plan}) == len(plan)
    assert bool(plan) == bool(running)
    answers = sum(s.todo == 1 for s in running)
    most = max(1, chunk - (answers < len(running)))
    assert sum(piece.sequence.todo == 1 for piece in plan) == min(answers, most)


def test_costs_between_and_beyond_what_is_known() -> None:
    known = costs(r1=1.0, r5=3.0)
    assert [known.seconds(rows) for rows in (1, 3, 5, 9, 32)] == [1.0, 2.0, 3.0, 5.0, 17.0]
    assert StepCosts().seconds(1) is None
    assert known.rows_within(2.0, 64) == 3
    assert known.rows_within(0.5, 64) == 0
    for _ in range(5):
        known.learn(1, 2.0)  # the latest count
    assert known.seconds(1) == 2.0


def test_costs_of_few_steps_are_the_least_seen_and_grow_with_rows() -> None:
    known = StepCosts()
    for seconds in (9.0, 1.0):
        known.learn(1, seconds)
    assert known.seconds(1) == 1.0  # the first was slow
    assert known.seconds(9) == 1.5
    assert not known.is_sure(1)
    known.learn(1, 1.2)
    assert known.is_sure(1)
    assert known.seconds(1) == 1.2
    known.learn(4, 0.8)
    assert known.seconds(4) == known.seconds(1) == pytest.approx(1.1)  # three steps and one
    assert (known.most_tried(3), known.most_tried(16)) == (1, 4)
