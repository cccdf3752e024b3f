"""Clocks of other machines: whatever they show and however the link is, the bound holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tpirt.cluster.tracing import ClockMap, ClockReading

SECOND = 10**9
OFFSETS = st.integers(-(10**17), 10**17)
# Asked and answered so long before and after the peer looked at its clock.
WAYS = st.tuples(st.integers(1, 10**8), st.integers(1, 10**8))


def reading(master_ns: int, offset_ns: int, ways: tuple[int, int]) -> ClockReading:
    there, back = ways
    low, high = offset_ns - back, offset_ns + there  # t - t2, t - t0
    return ClockReading(master_ns, (low + high) // 2, (high - low + 1) // 2)


@given(offset=OFFSETS, ways=st.lists(WAYS, min_size=1, max_size=3))
def test_steady_clock_is_mapped_within_its_bound(offset: int, ways: list[tuple[int, int]]) -> None:
    clock = ClockMap.fit([reading(at * SECOND, offset, way) for at, way in enumerate(ways)])
    assert clock.drift == 0
    for at in (0, SECOND // 2, 10 * SECOND):
        assert abs(clock.to_master(at + offset) - at) <= clock.error_ns + 1
    assert clock.error_ns <= 2 * max(sum(way) for way in ways) + 2


@given(offset=OFFSETS, ppm=st.sampled_from([-200, -20, 20, 200]), ways=st.tuples(WAYS, WAYS))
def test_drifting_clock_is_mapped_within_its_bound(
    offset: int, ppm: int, ways: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    end = 3600 * SECOND

    def shown(at: int) -> int:
        return offset + at * ppm // 1_000_000

    clock = ClockMap.fit([reading(at, shown(at), w) for at, w in zip((0, end), ways, strict=True)])
    for at in (0, end // 3, end):
        assert abs(clock.to_master(at + shown(at)) - at) <= 1.001 * clock.error_ns + 10


def test_drift_is_followed_where_it_shows() -> None:
    clock = ClockMap.fit([reading(0, 0, (500, 500)), reading(SECOND, 50_000, (500, 500))])
    assert clock.error_ns <= 501
    assert abs(clock.to_master(SECOND // 2 + 25_000) - SECOND // 2) <= 2


def test_clocks_that_can_be_the_same_are_taken_for_it() -> None:
    clock = ClockMap.fit([reading(0, 0, (40, 90)), reading(SECOND, 0, (70, 50))])
    assert (clock.offset_ns, clock.drift) == (0, 0)
    assert clock.to_master(12345) == 12345
    assert ClockMap().to_master(7) == 7
