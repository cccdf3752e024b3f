"""Time counted and spans recorded: exact, bounded, and nothing where nobody asked."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpirt.stopwatch import CAUSES, COMPUTE, DISK, LANES, NETWORK, Account, Lane, Recorder


def spans(lane: Lane) -> list[tuple[str, int, int, int, int]]:
    return [
        (lane.names[name], begin, end, amount, number)
        for begin, end, amount, name, number in Lane.RECORD.iter_unpack(lane.records)
    ]


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tpirt.stopwatch.perf_counter_ns", clock)
    return clock


@pytest.mark.parametrize("room", [0, 100])
def test_time_is_counted_for_its_cause(clock: Clock, room: int) -> None:
    recorder = Recorder(room)
    watches = [recorder.stopwatch(cause) for cause in CAUSES]
    for number, watch in enumerate(watches, start=1):
        clock.now += 5
        with watch.running("x"):
            clock.now += number
    assert recorder.account.last_ns == clock.now
    clock.now += 5
    assert recorder.account.read() == (1, 2, 3)
    assert recorder.account.last_ns == clock.now - 5


def test_each_block_is_recorded(clock: Clock) -> None:
    recorder = Recorder(100)
    watch = recorder.stopwatch(COMPUTE)
    for number in range(10):
        clock.now += 1
        with watch.running("even" if number % 2 == 0 else "odd", 7 * number, number):
            clock.now += number
    found = spans(recorder.lanes[COMPUTE])
    assert sum(end - begin for _, begin, end, _, _ in found) == recorder.account.read()[0] == 45
    assert all(earlier[2] <= later[1] for earlier, later in pairwise(found))
    assert [(name, amount, number) for name, _, _, amount, number in found] == [
        ("even" if number % 2 == 0 else "odd", 7 * number, number) for number in range(10)
    ]
    assert all(not lane.records for name, lane in recorder.lanes.items() if name != COMPUTE)


@pytest.mark.parametrize("room", [0, 100])
def test_time_counts_also_when_the_block_fails(clock: Clock, room: int) -> None:
    recorder = Recorder(room)

    def fail() -> None:
        with recorder.stopwatch(COMPUTE).running("x"):
            clock.now += 3
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now += 3
    assert recorder.account.read() == (3, 0, 0)


async def test_of_two_causes_at_once_the_first_is_charged(clock: Clock) -> None:
    """The sums of two micro-batches overlap, and one half computes during the other's sum."""
    recorder = Recorder(4)
    compute, network = recorder.stopwatch(COMPUTE), recorder.stopwatch(NETWORK)
    entered, computed = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        with network.running("first"):
            clock.now += 1
            entered.set()
            await computed.wait()
            clock.now += 2
        clock.now += 4

    async def second() -> None:
        await entered.wait()
        with compute.running("block"):
            clock.now += 10
        with network.running("second"):
            clock.now += 20
            computed.set()
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    await asyncio.gather(first(), second())
    assert recorder.account.read() == (10, 0, 1 + 20 + 2 + 4)
    lengths = {name: end - begin for name, begin, end, _, _ in spans(recorder.lanes[NETWORK])}
    assert lengths == {"first": 1 + 10 + 20 + 2, "second": 20 + 2 + 4}


_EVENT = st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(0, 3))


@given(st.lists(_EVENT, max_size=60))
def test_sums_are_the_time_in_which_anything_was_under_way(
    events: list[tuple[int, int, int]],
) -> None:
    """Whatever begins and ends when, and however often it is read meanwhile."""
    clock = Clock()
    with patch("tpirt.stopwatch.perf_counter_ns", clock):
        account = Account()
        under_way: list[int] = []
        expected = [0, 0, 0]
        for pause, cause, what in events:
            clock.now += pause
            if under_way:
                expected[min(under_way)] += pause
            if what == 0 and cause in under_way:
                under_way.remove(cause)
                account.leave(cause)
            elif what == 1:
                assert account.read() == tuple(expected)
                assert not under_way or account.last_ns == clock.now
            else:
                under_way.append(cause)
                account.enter(cause)
            assert account.last_ns <= clock.now
        assert account.read() == tuple(expected)
        assert sum(expected) <= clock.now - 1000


def test_reads_of_two_threads_are_tallied_apart(clock: Clock) -> None:
    recorder = Recorder(4)
    tally = recorder.tally(DISK)
    clock.now += 5
    tally.count("block", clock.now - 3, 100, 7)
    assert (tally.total_ns, tally.ended_ns) == (3, clock.now)
    assert spans(recorder.lanes[DISK]) == [("block", clock.now - 3, clock.now, 100, 7)]
    assert recorder.account.read() == (0, 0, 0)


def test_full_lane_keeps_the_first_and_counts_the_others() -> None:
    lane = Lane(3)
    for at in range(5):
        lane.record(f"name {at}", at, at + 1)
    assert [name for name, *_ in spans(lane)] == ["name 0", "name 1", "name 2"]
    assert lane.dropped == 2
    assert len(lane.names) == 3


def test_largest_values_fit() -> None:
    lane = Lane(1)
    lane.record("x", -(2**62), 2**62, 2**64 - 1, 2**32 - 1)
    assert spans(lane) == [("x", -(2**62), 2**62, 2**64 - 1, 2**32 - 1)]


def test_nothing_is_recorded_unless_asked_for(clock: Clock) -> None:
    recorder = Recorder()
    with recorder.stopwatch(COMPUTE).running("x"):
        clock.now += 2
    assert recorder.account.read() == (2, 0, 0)
    assert recorder.lanes == {}
    assert set(Recorder(1).lanes) == set(LANES)
