"""What the next step computes, from states alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpirt.engine.scheduler import Scheduler
from tpirt.engine.sequence import Scoring
from tpirt.engine.step_costs import StepCosts
from tpirt.engine.targets import Goodput, Targets
from tpirt.types import ignore_progress


class Unanswered(Scoring):
    """A prompt whose first token is to come in time."""

    unanswered = True


def sequence(
    length: int, computed: int = 0, *, user: str = "", priority: int = 0, arrived_s: float = 0.0
) -> Scoring:
    made = Unanswered(range(length), ignore_progress)
    made.user, made.priority, made.arrived_s = user, priority, arrived_s
    made.admit(id(made), computed)
    made.begun = False
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
    plan = Scheduler(StepCosts()).plan([prompts[0], *answers, prompts[1]], 32)
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
    plan = Scheduler(known).plan([*answers, prompt], 512)
    rows = sum(piece.tokens for piece in plan)
    assert rows > 4
    assert (known.seconds(rows) or 0) <= 2 * (known.seconds(3) or 0)
    assert (
        sum(p.tokens for p in Scheduler(known, stall_free=False).plan([*answers, prompt], 512))
        == 512
    )
    assert sum(p.tokens for p in Scheduler(known).plan([prompt], 512)) == 512


def test_a_prompt_goes_on_even_if_a_row_takes_too_long() -> None:
    plan = Scheduler(costs(r1=0.01, r2=0.05, r64=2.0)).plan([sequence(9, 8), sequence(50)], 64)
    assert [piece.tokens for piece in plan] == [1, 1]


def test_more_answers_than_rows_take_turns() -> None:
    answers = [sequence(5, 4) for _ in range(5)]
    scheduler = Scheduler(StepCosts())
    served = []
    for step in range(1, 4):
        for piece in scheduler.plan(answers, 2):
            served.append(answers.index(piece.sequence))  # type: ignore[arg-type]
            piece.sequence.turn = step
    assert served == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize(("sequences", "chunk"), [(1, 8), (16, 1)])
def test_where_one_fits_an_answer_and_a_prompt_take_turns(sequences: int, chunk: int) -> None:
    running = [sequence(5, 4), sequence(40)]
    scheduler = Scheduler(StepCosts(), sequences=sequences)
    served = []
    for step in range(1, 5):
        (piece,) = scheduler.plan(running, chunk)
        served.append(running.index(piece.sequence))  # type: ignore[arg-type]
        piece.sequence.turn = step
    assert served == [0, 1, 0, 1]


def test_answers_leave_a_row_for_a_prompt() -> None:
    prompt = sequence(10)
    plan = Scheduler(StepCosts()).plan([*(sequence(5, 4) for _ in range(6)), prompt], 4)
    assert [piece.tokens for piece in plan] == [1] * 4
    assert plan[-1].sequence is prompt


def test_no_more_sequences_than_may_run_are_in_a_step() -> None:
    """Those that went on when others had taken their places: all take turns."""
    answers, prompt = [sequence(5, 4) for _ in range(5)], sequence(10)
    scheduler = Scheduler(StepCosts(), sequences=4)
    served = []
    for step in range(1, 4):
        plan = scheduler.plan([*answers, prompt], 64)
        assert [piece.tokens for piece in plan] == [1, 1, 1, 10]
        for piece in plan[:3]:
            served.append(answers.index(piece.sequence))  # type: ignore[arg-type]
            piece.sequence.turn = step
    assert served == [0, 1, 2, 3, 4, 0, 1, 2, 0]
    assert len(scheduler.plan([sequence(10) for _ in range(6)], 64)) == 4
    assert len(Scheduler(StepCosts(), sequences=1).plan([*answers, prompt], 64)) == 1


def test_paused_sequences_are_left_out() -> None:
    paused, other = sequence(9, 8), sequence(7)
    paused.put(None)  # type: ignore[arg-type]
    assert paused.paused
    assert [p.sequence for p in Scheduler(StepCosts()).plan([paused, other], 16)] == [other]
    assert Scheduler(StepCosts()).plan([paused], 16) == []


def test_the_last_id_of_a_prompt_is_a_prompts_also_once_it_is_computed() -> None:
    prompt = sequence(5, 4)
    (piece,) = Scheduler(StepCosts()).plan([prompt], 16)
    prompt.advance(1, 1)
    assert piece.prefill
    prompt.ids.append(7)
    (piece,) = Scheduler(StepCosts()).plan([prompt], 16)
    assert not piece.prefill


def test_sequences_that_have_ended_are_left_out() -> None:
    ended, other = sequence(9, 8), sequence(7)
    ended.end()
    assert [p.sequence for p in Scheduler(StepCosts()).plan([ended, other], 16)] == [other]


def test_users_take_turns_in_order_of_priority() -> None:
    a = [sequence(3, user="a") for _ in range(3)]
    b = [sequence(3, user="b") for _ in range(2)]
    urgent = sequence(3, user="a", priority=1)
    again = sequence(3, user="a")
    again.begun = True
    ordered = Scheduler(StepCosts()).order([*a, *b, urgent, again], [], 16)
    assert ordered[:2] == [again, urgent]
    assert ordered[2:] == [b[0], b[1], *a] or ordered[2:4] == [a[0], b[0]]
    running = [sequence(3, user="a") for _ in range(2)]
    assert Scheduler(StepCosts()).order([*a, *b], running, 16) == [b[0], b[1], *a]


def test_a_kept_conversation_is_not_late() -> None:
    """Its next message is short, however long all of it is."""
    scheduler = Scheduler(costs(r1=0.01, r100=1.0), targets=Targets(ttft_s=2.0))
    kept, fresh = sequence(3000), sequence(100)
    order = scheduler.order([kept, fresh], [], 100, shared={kept: 2990, fresh: 0}.__getitem__)
    assert order == [kept, fresh]
    assert scheduler.order([kept, fresh], [], 100) == [fresh, kept]


def test_what_waits_with_a_lower_priority_takes_nobodys_turn() -> None:
    low = [sequence(3, user="a", priority=-1) for _ in range(3)]
    first, second = sequence(3, user="a"), sequence(3, user="b")
    ordered = Scheduler(StepCosts()).order([*low, first, second], [], 16)
    assert ordered == [first, second, *low]


def test_prompts_are_computed_by_priority() -> None:
    prompts = [sequence(30, priority=priority) for priority in (0, 1, 0)]
    plan = Scheduler(StepCosts()).plan(prompts, 64)
    assert [piece.sequence for piece in plan] == [prompts[1], prompts[0], prompts[2]]


def test_a_target_per_token_takes_the_place_of_the_factor() -> None:
    known = costs(r1=0.010, r16=0.030, r64=0.080, r512=0.500)
    running = [*(sequence(9, 8) for _ in range(3)), sequence(2000)]

    def seconds(target_s: float, *, stall_free: bool = True) -> float:
        scheduler = Scheduler(known, stall_free=stall_free, targets=Targets(tpot_s=target_s))
        rows = sum(piece.tokens for piece in scheduler.plan(running, 512))
        return known.seconds(rows) or 0

    assert 0.06 < seconds(0.1) <= 0.1
    assert 0.06 < seconds(0.1, stall_free=False) <= 0.1
    assert 0.010 < seconds(0.015) <= 0.015
    alone_s = known.seconds(3) or 0
    assert alone_s < seconds(0.001) <= 2 * alone_s  # missed in any case: as without


def test_logits_and_sampling_count_towards_the_target() -> None:
    known = costs(r1=0.010, r16=0.030, r64=0.080, r512=0.500)
    outputs = costs(r1=0.040, r16=0.040)
    running = [*(sequence(9, 8) for _ in range(3)), sequence(2000)]

    def rows(target_s: float, output_costs: StepCosts | None = None) -> int:
        scheduler = Scheduler(known, output_costs, targets=Targets(tpot_s=target_s))
        return sum(piece.tokens for piece in scheduler.plan(running, 512))

    assert rows(0.125, outputs) == rows(0.085) < rows(0.125)
    target = Targets(tpot_s=0.055)
    assert Scheduler(known, targets=target).admits(7)
    assert not Scheduler(known, outputs, targets=target).admits(7)


def test_no_more_answers_are_admitted_than_stay_within_the_target() -> None:
    known = costs(r1=0.010, r4=0.020, r8=0.050)
    scheduler = Scheduler(known, targets=Targets(tpot_s=0.030))
    assert [scheduler.admits(running) for running in (0, 3, 4, 5, 7)] == [
        *(True, True, True),
        *(False, False),
    ]
    unmet = Scheduler(known, targets=Targets(tpot_s=0.005))
    assert unmet.admits(7)  # one alone is too slow: waiting is of no use
    assert Scheduler(known).admits(7)
    assert Scheduler(StepCosts(), targets=Targets(tpot_s=0.001)).admits(7)


def test_prompts_that_can_be_in_time_come_before_those_that_are_late() -> None:
    scheduler = Scheduler(costs(r1=0.01, r100=1.0), targets=Targets(ttft_s=2.0))
    late, long = sequence(100, arrived_s=8.5), sequence(250, arrived_s=10.0)
    timely, answered = sequence(100, arrived_s=9.5), sequence(50)
    assert scheduler.order([late, long, timely], [], 100, now_s=10.0) == [timely, late, long]
    plan = scheduler.plan([late, timely], 100, now_s=10.0)
    assert [piece.sequence for piece in plan] == [timely]
    urgent = sequence(100, arrived_s=8.5, priority=1)
    assert scheduler.order([timely, urgent], [], 100, now_s=10.0) == [urgent, timely]
    answered.unanswered = False  # type: ignore[misc]
    assert scheduler.order([answered, timely], [], 100, now_s=10.0) == [answered, timely]


def test_a_late_prompt_is_not_put_off_for_ever() -> None:
    scheduler = Scheduler(costs(r1=0.01, r100=1.0), targets=Targets(ttft_s=2.0))
    late, timely = sequence(100, arrived_s=0.0), sequence(100, arrived_s=7.9)
    assert scheduler.order([late, timely], [], 100, now_s=7.9) == [timely, late]
    assert scheduler.order([late, timely], [], 100, now_s=8.1) == [late, timely]


def test_goodput_is_the_share_within_both_targets() -> None:
    goodput = Goodput(Targets(0.5, 0.05))
    assert goodput.share == 1.0
    for ttft_s, tpot_s in ((0.5, 0.05), (0.6, 0.01), (0.1, 0.06), (0.1, 0.0)):
        goodput.count(ttft_s, tpot_s)
    assert (goodput.answers, goodput.ttft_met, goodput.tpot_met, goodput.met) == (4, 3, 3, 2)
    assert goodput.explain() == (
        "targets: TTFT 500 ms met by 3 of 4, TPOT 50 ms met by 3 of 4; goodput 50.0%"
    )
    assert not Targets()
    assert Targets().met(1e9, 1e9)


@given(
    st.integers(1, 64),
    st.integers(1, 24),
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 99)), max_size=20),
    st.lists(st.tuples(st.integers(1, 600), st.floats(1e-4, 10)), max_size=12),
    st.booleans(),
    st.none() | st.floats(1e-4, 10),
)
def test_a_step_is_within_its_bounds(
    chunk: int,
    most: int,
    states: list[tuple[int, int]],
    steps: list[tuple[int, float]],
    stall_free: bool,
    target_s: float | None,
) -> None:
    known = StepCosts()
    for rows, seconds in steps:
        known.learn(rows, seconds)
    running = [sequence(length, min(done, length - 1)) for length, done in states]
    targets = Targets(target_s, target_s)
    scheduler = Scheduler(known, sequences=most, stall_free=stall_free, targets=targets)
    plan = scheduler.plan(running, chunk)
    assert len(plan) <= most
    assert sum(piece.tokens for piece in plan) <= chunk
    assert all(1 <= piece.tokens <= piece.sequence.todo for piece in plan)
    assert len({id(piece.sequence) for piece in plan}) == len(plan)
    assert bool(plan) == bool(running)
    answers = sum(s.todo == 1 for s in running)
    most = max(1, min(chunk, most) - (answers < len(running)))
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
