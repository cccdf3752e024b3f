"""Which collective is chosen over which links, and what the choice learns."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpirt.cluster.sums import SumOptions
from tpirt.collectives.base import Algorithm
from tpirt.collectives.choosing import Chooser, Topology, predict_s
from tpirt.errors import ConfigError


def even(world: int, latency_s: float, mbit: float, complete: bool = True) -> Topology:
    """Links of one kind between all ranks, or of the master's only."""
    pairs = combinations(range(world), 2) if complete else ((0, r) for r in range(1, world))
    found = list(pairs)
    return Topology(
        world, dict.fromkeys(found, latency_s), dict.fromkeys(found, mbit * 1e6 / 8), complete
    )


def test_two_ranks_exchange_directly_whatever_the_size() -> None:
    chooser = Chooser(even(2, 0.001, 300))
    assert {chooser.choose(size) for size in (1, 1 << 14, 1 << 26)} == {Algorithm.DIRECT}


def test_latency_makes_for_one_hop_and_bytes_for_two() -> None:
    chooser = Chooser(even(8, 0.005, 300))
    assert chooser.choose(8 << 10) is Algorithm.DIRECT
    assert chooser.choose(4 << 20) is Algorithm.TWO_SHOT


def test_a_master_with_better_links_than_the_rest_gathers() -> None:
    topology = even(4, 0.020, 10)
    latency = {pair: 0.001 if 0 in pair else at for pair, at in topology.latency_s.items()}
    chooser = Chooser(Topology(4, latency, topology.bytes_per_s, True))
    assert chooser.choose(1 << 10) is Algorithm.STAR


def test_without_links_among_workers_there_is_the_star() -> None:
    chooser = Chooser(even(4, 0.005, 300, complete=False))
    assert chooser.choose(1) is Algorithm.STAR
    assert predict_s(Algorithm.STAR, chooser.topology, 1 << 20) > 2 * 0.005


def test_what_is_measured_corrects_the_choice_and_one_stall_does_not() -> None:
    chooser = Chooser(even(3, 0.002, 1000))
    size = 16 << 10
    assert chooser.choose(size) is Algorithm.DIRECT
    chooser.learn(Algorithm.DIRECT, size, 10.0)
    assert chooser.choose(size) is Algorithm.DIRECT
    for _ in range(20):
        chooser.learn(Algorithm.DIRECT, size, 0.008)
    assert chooser.choose(size) is not Algorithm.DIRECT


@given(
    world=st.integers(2, 9),
    latency=st.floats(1e-5, 1.0),
    mbit=st.floats(0.1, 1e5),
    size=st.integers(1, 1 << 30),
)
def test_the_choice_is_the_least_of_what_is_expected(
    world: int, latency: float, mbit: float, size: int
) -> None:
    chooser = Chooser(even(world, latency, mbit))
    chosen = chooser.choose(size)
    times = {a: chooser.expected_s(a, size) for a in chooser.candidates}
    assert times[chosen] == min(times.values())
    assert all(time > 0 for time in times.values())
    assert len(chooser.explain({"size": size})) == world * (world - 1) // 2 + 1


@pytest.mark.parametrize(
    ("collective", "wire", "names"),
    [("ring", "auto", "two-shot"), ("auto", "float16", "bfloat16"), ("", "auto", "star")],
)
def test_unknown_options_are_refused_with_what_there_is(
    collective: str, wire: str, names: str
) -> None:
    with pytest.raises(ConfigError, match=names):
        SumOptions.parse(collective, wire)
