"""Time counted and spans recorded: exact, bounded, and nothing where nobody asked."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from tpirt.stopwatch import COMPUTE, DISK, LANES, Lane, Recorder, Stopwatch


def spans(lane: Lane) -> list[tuple[str, int, int, int, int]]:
    return [
        (lane.names[name], begin, end, amount, number)
        for begin, end, amount, name, number in Lane.RECORD.iter_unpack(lane.records)
    ]


def test_total_is_the_sum_of_the_spans() -> None:
    recorder = Recorder(100)
    watch = recorder.stopwatch(COMPUTE)
    for number in range(10):
        with watch.running("even" if number % 2 == 0 else "odd", 7 * number, number):
            sum(range(100))
    found = spans(recorder.lanes[COMPUTE])
    assert sum(end - begin for _, begin, end, _, _ in found) == watch.total_ns > 0
    assert found[-1][2] == watch.ended_ns
    assert all(earlier[2] <= later[1] for earlier, later in pairwise(found))
    assert [(name, amount, number) for name, _, _, amount, number in found] == [
        ("even" if number % 2 == 0 else "odd", 7 * number, number) for number in range(10)
    ]
    assert all(not lane.records for name, lane in recorder.lanes.items() if name != COMPUTE)


def test_time_counts_also_when_the_block_fails() -> None:
    watch = Stopwatch()
    with pytest.raises(KeyError), watch.running("x"):
        raise KeyError
    assert watch.total_ns > 0


async def test_two_blocks_at_once_are_both_counted() -> None:
    recorder = Recorder(4)
    watch = recorder.stopwatch(DISK)
    inside = asyncio.Event()

    async def first() -> None:
        with watch.running("first"):
            await inside.wait()

    async def second() -> None:
        with watch.running("second"):
            inside.set()

    await asyncio.gather(first(), second())
    assert {name for name, *_ in spans(recorder.lanes[DISK])} == {"first", "second"}
    assert watch.total_ns == sum(e - b for _, b, e, _, _ in spans(recorder.lanes[DISK]))


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


def test_nothing_is_recorded_unless_asked_for() -> None:
    recorder = Recorder()
    watch = recorder.stopwatch(COMPUTE)
    with watch.running("x"):
        pass
    assert watch.total_ns > 0
    assert recorder.lanes == {}
    assert set(Recorder(1).lanes) == set(LANES)
