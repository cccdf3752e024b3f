"""Every millisecond belongs to one step, and every token's to one cause."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tpirt.transport.pb import tpirt_pb2 as pb

from tpirt.cluster.stats import MAX_STEPS, StepLog, read_stats, stats_message
from tpirt.engine.token_times import token_times
from tpirt.stopwatch import COMPUTE, NETWORK, STEPS, Recorder
from tpirt.types import RankStats, StepTimes


def work(recorder: Recorder, log: StepLog, step: int, prefill: bool = False) -> None:
    """One step of some work, and some work after it."""
    compute, io, comm = log._watches
    log.begin(step, 5 if prefill else 1, prefill)
    for _ in range(3):
        with io.running("wait disk"):
            sum(range(50))
        with compute.running("block"):
            sum(range(500))
        with comm.running("all_reduce"):
            sum(range(100))
    log.end_layers()
    with compute.running("lm_head.0"):
        sum(range(300))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder(10_000)


@pytest.fixture
def log(recorder: Recorder) -> StepLog:
    watches = (COMPUTE, COMPUTE, NETWORK)
    return StepLog(*(recorder.stopwatch(lane) for lane in watches), recorder)


def test_steps_add_up_to_the_totals(recorder: Recorder, log: StepLog) -> None:
    for step in range(1, 8):
        work(recorder, log, step, prefill=step < 3)
    steps = log.steps()
    assert [(s.step, s.tokens, s.prefill) for s in steps] == [
        *((step, 5, True) for step in (1, 2)),
        *((step, 1, False) for step in range(3, 8)),
    ]
    sums = [sum(getattr(s, f"{cause}_ms") for s in steps) for cause in ("compute", "io", "comm")]
    assert sums == pytest.approx(log.totals_ms())
    for s in steps:
        assert s.compute_ms + s.io_ms + s.comm_ms <= s.total_ms
        assert 0 < s.head_compute_ms < s.compute_ms
        assert s.head_io_ms == 0


def test_reset_forgets_and_the_trace_has_every_step(recorder: Recorder, log: StepLog) -> None:
    work(recorder, log, 1)
    work(recorder, log, 2)
    log.reset()
    assert log.steps() == []
    assert log.totals_ms() == (0, 0, 0)
    work(recorder, log, 3)
    assert [s.step for s in log.steps()] == [3]
    log.flush()
    assert [s.step for s in log.steps()] == [3]
    lane = recorder.lanes[STEPS]
    records = list(lane.RECORD.iter_unpack(lane.records))
    assert [number for *_, number in records] == [1, 2, 3]
    assert lane.names == ["decode"]


def test_a_step_that_failed_is_counted_too(recorder: Recorder, log: StepLog) -> None:
    log.begin(1, 1, False)
    with log._watches[0].running("block"):
        pass
    work(recorder, log, 2)  # its layers never ended
    first, second = log.steps()
    assert first.compute_ms > 0
    assert first.head_compute_ms == 0
    assert first.compute_ms + second.compute_ms == pytest.approx(log.totals_ms()[0])


def test_only_the_latest_steps_are_kept(log: StepLog) -> None:
    for step in range(MAX_STEPS + 10):
        log.begin(step, 1, False)
    steps = log.steps()
    assert len(steps) == MAX_STEPS
    assert steps[-1].step == MAX_STEPS + 9


def test_figures_survive_the_wire() -> None:
    steps = [StepTimes(3, 1, False, 9.5, 4.25, 3.0, 2.0, 1.0, 0.5), step(4, prefill=True)]
    stats = RankStats(2, "pi", 1, 2, 3, 4, 5.5, 6.5, 7.5, 8, 9.5, steps)
    message = pb.Stats.FromString(stats_message(stats).SerializeToString())
    assert read_stats(message, "pi") == stats


# -- what a token waited for -----------------------------------------------------------------


def step(
    number: int = 1,
    *,
    total: float = 20.0,
    compute: float = 0.0,
    io: float = 0.0,
    comm: float = 0.0,
    head: tuple[float, float] = (0.0, 0.0),
    prefill: bool = False,
) -> StepTimes:
    return StepTimes(number, 1, prefill, total, compute, io, comm, *head)


def ranks(*steps: StepTimes) -> list[RankStats]:
    return [RankStats(rank, steps=[s]) for rank, s in enumerate(steps)]


def test_a_workers_stall_is_its_disks_not_the_networks() -> None:
    # The master computed 4 in the layers and 2 after them, and waited 12: 7 of it for rank 1.
    master = step(compute=6, comm=12, head=(2, 0))
    worker = step(compute=3, io=8, comm=3)
    (token,) = token_times(ranks(master, worker))
    assert (token.slowest_rank, token.gated_by) == (1, "disk")
    assert (token.compute_ms, token.io_ms, token.comm_ms) == (3 + 2, 8, 12 - (11 - 4))
    assert token.other_ms == 20 - 5 - 8 - 5
    assert token.total_ms == 20


def test_a_master_that_is_slowest_keeps_its_own_figures() -> None:
    master = step(compute=9, io=3, comm=6, head=(2, 1))
    (token,) = token_times(ranks(master, step(compute=4, comm=9), step(compute=5, comm=8)))
    assert (token.slowest_rank, token.gated_by) == (0, "compute")
    assert (token.compute_ms, token.io_ms, token.comm_ms, token.other_ms) == (9, 3, 6, 2)


def test_one_rank_has_no_network() -> None:
    (token,) = token_times(ranks(step(total=10, compute=3, io=6)))
    assert (token.comm_ms, token.other_ms, token.gated_by) == (0, 1, "disk")


def test_causes_add_up_and_are_never_negative_however_ranks_differ() -> None:
    choice = random.Random(5)
    for _ in range(200):
        figures = [step(compute=choice.random(), io=choice.random(), comm=3) for _ in range(4)]
        (token,) = token_times(ranks(*figures))
        parts = (token.compute_ms, token.io_ms, token.comm_ms)
        assert min(parts) >= 0
        assert sum(parts) + token.other_ms == pytest.approx(token.total_ms)


def test_only_decoded_tokens_that_all_ranks_remember_are_told_of() -> None:
    master = [step(n, prefill=n < 3) for n in range(1, 8)]
    worker = [replace(s, total_ms=1) for s in master[4:]]
    found = token_times([RankStats(steps=master), RankStats(rank=1, steps=worker)])
    assert [token.step for token in found] == [5, 6, 7]
    assert token_times([RankStats(steps=master[:2])]) == []
