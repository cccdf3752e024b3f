"""Which collective is chosen over which links, and what the choice learns."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpirt.batch import Algorithm
from tpirt.collectives.cost_model import Chooser, Topology, predict_s
from tpirt.errors import ConfigError
from tpirt.planning import CollectiveOptions


def even(world: int, latency_s: float, mbit: float, complete: bool = True) -> Topology:
    """Links of one kind between all ranks, or of the master's only."""
    pairs = combinations(range(world), 2) if complete else ((0, r) for r in range(1, world))
    found = list(pairs)
    return Topology(
        world, dict.fromkeys(found, latency_s), dict.fromkeys(found, mbit * 1e6 / 8), complete
    )


def test_two_ranks_exchange_directly_whatever_the_size() -> None:
    chooser = Chooser(even(2, 0.001, 300))
    assert {chooser.choose(size) for size in (1, 1 << 14, 1 << 26)} == {Algorithm.ONE_SHOT}


def test_latency_makes_for_one_hop_and_bytes_for_two() -> None:
    chooser = Chooser(even(8, 0.005, 300))
    assert chooser.choose(8 << 10) is Algorithm.ONE_SHOT
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


def decode(chooser: Chooser, size: int, took_s: dict[Algorithm, float], tokens: int) -> Algorithm:
    """Decode tokens whose sums take what ``took_s`` says; returns the last one's algorithm."""
    for _ in range(tokens):
        chosen = chooser.choose_to_learn(size)
        chooser.learn(chosen, size, took_s[chosen])
    return chosen


def test_what_is_measured_corrects_the_choice_and_one_stall_does_not() -> None:
    chooser = Chooser(even(3, 0.002, 1000))
    size = 16 << 10
    took_s = {Algorithm.ONE_SHOT: 0.003, Algorithm.STAR: 0.005, Algorithm.TWO_SHOT: 0.006}
    assert decode(chooser, size, took_s, 20) is Algorithm.ONE_SHOT
    chooser.learn(Algorithm.ONE_SHOT, size, 10.0)
    assert decode(chooser, size, took_s, 1) is Algorithm.ONE_SHOT
    assert decode(chooser, size, took_s | {Algorithm.ONE_SHOT: 0.008}, 10) is Algorithm.STAR


def test_a_wait_that_comes_with_every_algorithm_changes_nothing() -> None:
    chooser = Chooser(even(4, 0.001, 300))
    size = 4 << 10
    best = chooser.choose(size)
    took_s = {a: predict_s(a, chooser.topology, size) + 0.004 for a in Algorithm}
    assert decode(chooser, size, took_s, 30) is best


def test_what_may_be_the_quickest_is_tried_and_kept() -> None:
    """The model is wrong about this machine; measurements of a few tokens tell."""
    chooser = Chooser(even(4, 0.0002, 300))
    size = 4 << 10
    assert chooser.choose(size) is Algorithm.ONE_SHOT
    took_s = {Algorithm.ONE_SHOT: 0.004, Algorithm.STAR: 0.003, Algorithm.TWO_SHOT: 0.009}
    assert decode(chooser, size, took_s, 12) is Algorithm.STAR


def test_less_than_noise_does_not_change_the_choice() -> None:
    chooser = Chooser(even(4, 0.001, 300))
    took_s = {Algorithm.ONE_SHOT: 0.00300, Algorithm.STAR: 0.00302, Algorithm.TWO_SHOT: 0.00302}
    used = decode(chooser, 4 << 10, took_s, 20)
    swapped = {**took_s, used: 0.00303}
    assert decode(chooser, 4 << 10, swapped, 20) is used


@given(
    world=st.integers(2, 9),
    latency=st.floats(1e-5, 1.0),
    mbit=st.floats(0.1, 1e5),
    size=st.integers(1, 1 << 30),
)
def test_the_choice_is_the_quickest_of_the_model_on_even_links(
    world: int, latency: float, mbit: float, size: int
) -> None:
    chooser = Chooser(even(world, latency, mbit))
    wire_s = size / (mbit * 1e6 / 8)  # of a whole partial
    others, message_s = world - 1, 45e-6
    times = {  # worked out by hand; the last term is the messages beyond those of a hop
        Algorithm.STAR: 2 * (latency + others * wire_s) + message_s * max(0, 2 * others - 4),
        Algorithm.ONE_SHOT: latency + others * wire_s + message_s * (2 * others - 2),
        Algorithm.TWO_SHOT: 2 * (latency + others / world * wire_s) + message_s * 4 * (others - 1),
    }
    assert times[chooser.choose(size)] <= min(times.values()) * (1 + 1e-9)
    for algorithm, seconds in times.items():
        assert predict_s(algorithm, chooser.topology, size) == pytest.approx(seconds)
    assert len(chooser.explain({"size": size})) == world * (world - 1) // 2 + 1


@pytest.mark.parametrize(
    ("collective", "comm_dtype", "names"),
    [("ring", "auto", "two-shot"), ("auto", "float16", "bfloat16"), ("", "auto", "star")],
)
def test_unknown_options_are_refused_with_what_there_is(
    collective: str, comm_dtype: str, names: str
) -> None:
    with pytest.raises(ConfigError, match=names):
        CollectiveOptions.parse(collective, comm_dtype)
