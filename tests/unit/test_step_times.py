"""Every millisecond belongs to one step, and every token's to one cause."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest

from tpirt.cluster.stats import MAX_STEPS, Counters, StepLog
from tpirt.engine.token_times import token_times
from tpirt.protocol.messages import decode, encode
from tpirt.stopwatch import CAUSES, STEPS, Recorder
from tpirt.testing.cluster import memory_engine
from tpirt.testing.models import make_model
from tpirt.types import RankStats, SamplingParams, StepTimes


class Work:
    """A rank's clocks and counters, and a log that reads them.

    Attributes:
        log: the log.
        recorder: what its spans go to.
    """

    def __init__(self) -> None:
        self.recorder = Recorder(10_000)
        self._watches = [self.recorder.stopwatch(cause) for cause in CAUSES]
        self._bytes = 0
        self.log = StepLog(self.counters, self._last_ns, self.recorder)

    def counters(self) -> Counters:
        """What was counted so far."""
        compute, io, comm = self.recorder.account.read()
        return Counters(compute, io, comm, bytes_sent=self._bytes, bytes_received=2 * self._bytes)

    def load(self) -> None:
        """What is done before the first step."""
        self.compute("block")

    def compute(self, name: str) -> None:
        """Some work that is computation."""
        with self._watches[0].running(name):
            sum(range(500))

    def step(self, number: int, prefill: bool = False) -> None:
        """One step of some work, and some work after it."""
        _, io, comm = self._watches
        self.log.begin(number, 5 if prefill else 1, prefill)
        for _ in range(3):
            with io.running("wait disk"):
                sum(range(50))
            self.compute("block")
            with comm.running("all_reduce"):
                sum(range(100))
            self._bytes += 8
        self.log.end_layers()
        self.compute("lm_head.0")

    def _last_ns(self) -> int:
        return self.recorder.account.last_ns


@pytest.fixture
def work() -> Work:
    return Work()


def sums_ms(steps: list[StepTimes]) -> tuple[float, ...]:
    return tuple(sum(getattr(s, f"{c}_ms") for s in steps) for c in ("compute", "io", "comm"))


def totals_ms(counted: Counters) -> tuple[float, ...]:
    return counted.compute_ns / 1e6, counted.io_ns / 1e6, counted.comm_ns / 1e6


def test_steps_add_up_to_what_was_counted(work: Work) -> None:
    work.load()
    for number in range(1, 8):
        work.step(number, prefill=number < 3)
    counted, steps = work.log.since(1)
    assert [(s.step, s.tokens, s.prefill) for s in steps] == [
        *((number, 5, True) for number in (1, 2)),
        *((number, 1, False) for number in range(3, 8)),
    ]
    assert sums_ms(steps) == pytest.approx(totals_ms(counted))
    for s in steps:
        assert s.compute_ms + s.io_ms + s.comm_ms <= s.total_ms
        assert 0 < s.head_compute_ms < s.compute_ms
        assert s.head_io_ms == 0


def test_differences_add_up(work: Work) -> None:
    """What was counted until a step and from it on is all that was counted."""
    work.load()
    before = work.counters()
    for number in range(1, 8):
        work.step(number)
    whole, _ = work.log.since(0)
    assert whole == work.counters()  # what loading took included
    assert work.log.since(1)[0] == whole.since(before)
    for number in range(2, 8):
        counted, steps = work.log.since(number)
        assert [s.step for s in steps] == list(range(number, 8))
        earlier = work.log.since(1)[0].since(counted)
        assert earlier.bytes_sent == 3 * 8 * (number - 1)
        _, all_steps = work.log.since(1)
        assert sums_ms(all_steps[: number - 1]) == pytest.approx(totals_ms(earlier))


def test_reading_changes_nothing(work: Work) -> None:
    work.step(1)
    work.step(2)
    first, again = work.log.since(1), work.log.since(1)
    assert first == again
    work.step(3)
    assert work.log.since(1)[1][:1] == first[1][:1]  # the second lasted until the third began
    assert work.log.since(4) == (Counters(), [])


def test_the_trace_has_every_step(work: Work) -> None:
    for number in (1, 2, 3):
        work.step(number)
    for _ in range(2):
        work.log.flush()
    lane = work.recorder.lanes[STEPS]
    records = list(lane.RECORD.iter_unpack(lane.records))
    assert [number for *_, number in records] == [1, 2, 3]
    assert lane.names == ["decode"]


def test_a_step_that_failed_is_counted_too(work: Work) -> None:
    work.log.begin(1, 1, False)
    work.compute("block")
    work.step(2)  # the first one's layers never ended
    counted, (first, second) = work.log.since(1)
    assert first.compute_ms > 0
    assert first.head_compute_ms == 0
    assert first.compute_ms + second.compute_ms == pytest.approx(totals_ms(counted)[0])


def test_only_the_latest_steps_are_kept(work: Work) -> None:
    for number in range(1, MAX_STEPS + 11):
        work.log.begin(number, 1, False)
    _, steps = work.log.since(0)
    assert len(steps) == MAX_STEPS
    assert steps[-1].step == MAX_STEPS + 10


def test_figures_survive_the_wire() -> None:
    steps = [StepTimes(3, 1, False, 9.5, 4.25, 3.0, 2.0, 1.0, 0.5), step(4, prefill=True)]
    stats = RankStats(2, "", 1, 2, 3, 4, 5.5, 6.5, 7.5, 8, 9.5, steps)
    assert decode(encode(stats), "pi") == stats


# -- of requests -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


PARAMS = SamplingParams(max_tokens=4)


async def test_an_answer_has_the_figures_of_its_own_steps(model: Path, tmp_path: Path) -> None:
    """Whatever went before: the same request takes the same steps and the same traffic."""
    async with memory_engine(model, 3, store=tmp_path, collective="star") as engine:
        prompts = ([65] * 9, [66] * 30, [65] * 9)
        answers = []
        for prompt in prompts:
            engine.reset()
            answers.append(await engine.complete(prompt, PARAMS))
    numbers = [[s.step for s in answer.ranks[0].steps] for answer in answers]
    assert numbers == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    for answer, prompt, expected in zip(answers, prompts, numbers, strict=True):
        assert [r.rank for r in answer.ranks] == [0, 1, 2]
        for rank in answer.ranks:
            assert [s.step for s in rank.steps] == expected
            assert [s.tokens for s in rank.steps] == [len(prompt), 1, 1, 1]
            assert sums_ms(rank.steps) == pytest.approx((rank.compute_ms, rank.io_ms, rank.comm_ms))
    # Between two steps a worker answers the request for statistics, and the link is kept alive.
    for rank, again in zip(answers[0].ranks, answers[2].ranks, strict=True):
        assert again.bytes_sent == pytest.approx(rank.bytes_sent, abs=1024)
        assert again.bytes_received == pytest.approx(rank.bytes_received, abs=1024)


async def test_readers_do_not_disturb_each_other(model: Path, tmp_path: Path) -> None:
    """Figures never shrink during a request, for any of several readers at once."""
    async with memory_engine(model, 2, store=tmp_path) as engine:

        async def watch() -> list[list[RankStats]]:
            seen = [await engine.stats()]
            while not answer.done():
                seen.append(await engine.stats())
            return seen

        answer = asyncio.create_task(engine.complete([65] * 9, SamplingParams(max_tokens=30)))
        readers = await asyncio.gather(watch(), watch())
        last = (await answer).ranks
    assert [s.step for s in last[0].steps] == list(range(1, 31))
    for seen in readers:
        assert len(seen) > 2
        for rank in (0, 1):
            mine = [stats[rank] for stats in seen]
            for name in ("compute_ms", "comm_ms", "bytes_sent", "bytes_received"):
                figures = [getattr(stats, name) for stats in mine]
                assert figures == sorted(figures)
            for stats in mine:
                steps = [s.step for s in stats.steps]
                assert steps == [s.step for s in last[rank].steps][: len(steps)]
                assert sum(s.compute_ms for s in stats.steps) == pytest.approx(
                    stats.compute_ms, abs=1e-6
                )


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
