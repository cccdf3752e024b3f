"""The least time that links allow, worked out by hand."""

from __future__ import annotations

import pytest

from bench.net.floor import Hop, all_reduce_hops, finish_ms, latencies, messages, step_hops
from bench.net.spec import Link, parse_topology, uniform

KB = 1000  # 8 ms at 1 Mbit/s


@pytest.mark.parametrize(
    ("algorithm", "devices", "expected_ms"),
    [
        ("one-shot", 2, 5 + 8),
        ("star", 2, 2 * (5 + 8)),
        ("two-shot", 2, 2 * (5 + 4)),
        ("one-shot", 4, 5 + 3 * 8),
        ("star", 4, 2 * (5 + 3 * 8)),
        ("two-shot", 4, 2 * (5 + 3 * 2)),
    ],
)
def test_latency_and_the_busiest_link(algorithm: str, devices: int, expected_ms: float) -> None:
    topology = uniform(Link(5.0, rate_mbit=1.0), devices)
    hops = all_reduce_hops(algorithm, devices, KB)
    assert max(finish_ms(topology, hops)) == pytest.approx(expected_ms)


TO_ALL: Hop = [(0, 1, KB), (0, 2, KB)]
TO_ONE: Hop = [(1, 0, KB), (2, 0, KB)]


def test_who_is_ahead_stays_so() -> None:
    """Worker 1 has the sum 8 ms before worker 2, and so its next partial is there 8 ms before."""
    topology = uniform(Link(5.0, rate_mbit=1.0), 3)
    assert finish_ms(topology, [TO_ONE, TO_ALL]) == pytest.approx([21, 21 + 13, 21 + 21])
    assert finish_ms(topology, [TO_ONE, TO_ALL, TO_ONE])[0] == pytest.approx(21 + 21 + 5 + 8)


def token(algorithm: str, devices: int) -> list[Hop]:
    return step_hops(algorithm, devices, 16, hidden_bytes=KB, sum_bytes=KB, last_bytes=KB)


def test_a_step() -> None:
    hops = token("star", 2)
    assert latencies(2, hops) == 4 * 16
    hops = token("one-shot", 2)
    assert latencies(2, hops) == 2 * 16  # the worker is a latency behind, and never more
    assert messages(hops) == 1 + 31 * 2 + 1
    assert token("one-shot", 1) == []
    assert step_hops("star", 2, 16, hidden_bytes=8 * KB, sum_bytes=4 * KB, last_bytes=KB) == [
        [(0, 1, 8 * KB)],
        *[[(1, 0, 4 * KB)], [(0, 1, 4 * KB)]] * 30,
        *[[(1, 0, KB)], [(0, 1, KB)]],
        [(1, 0, KB)],
    ]


def test_hidden_states_are_passed_on() -> None:
    hops = step_hops(
        "one-shot", 3, 1, hidden_bytes=2 * KB, sum_bytes=KB, last_bytes=KB, spread=True
    )
    assert hops[:2] == [TO_ALL, [(1, 2, KB), (2, 1, KB)]]
    assert hops[2:] == [*all_reduce_hops("one-shot", 3, KB), TO_ONE]


def test_unequal_links_and_no_bound() -> None:
    topology = parse_topology("2ms;1:up=9ms/1mbit,down=1ms", 3)
    assert finish_ms(topology, [TO_ONE]) == pytest.approx([9 + 1 + 8, 0, 0])
    assert finish_ms(topology, [TO_ALL]) == pytest.approx([0, 2, 2])


def test_a_pair_with_a_link_of_its_own_does_not_share_it() -> None:
    topology = parse_topology("2ms/1mbit;0-1:3ms/2mbit", 3)
    assert finish_ms(topology, [TO_ALL]) == pytest.approx([0, 3 + 4, 2 + 8])


def test_nothing_to_send_takes_no_time() -> None:
    topology = uniform(Link(5.0), 1)
    for algorithm in ("star", "one-shot", "two-shot"):
        assert finish_ms(topology, all_reduce_hops(algorithm, 1, KB)) == [0]
