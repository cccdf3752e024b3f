"""The forwarder's model of a link, and what stands around it, without any network."""

from __future__ import annotations

import math

import pytest

from bench.links import split_commands
from bench.net.forwarder import LinkClock
from bench.net.netem import check_supported, netem
from bench.net.probe import Measured, check
from bench.net.spec import Link, LinkError, parse_link, parse_topology


def test_packets_queue_for_a_link() -> None:
    link = LinkClock(delay_s=1.0, jitter_s=0.0, s_per_byte=0.01, loss=0.0, reorder=False)
    assert link.cross(100, 0.0, 0.0) == (1.0, 2.0)
    assert link.cross(100, 0.0, 0.0) == (2.0, 3.0)
    assert link.cross(100, 5.0, 5.0) == (6.0, 7.0)


def test_a_second_link_sends_while_the_first_still_does() -> None:
    slow = LinkClock(1.0, 0.0, 0.02, 0.0, False)
    fast = LinkClock(1.0, 0.0, 0.01, 0.0, False)
    assert fast.cross(100, *slow.cross(100, 0.0, 0.0)) == (2.0, 4.0)  # the slow one's 2 s
    slow, fast = LinkClock(1.0, 0.0, 0.02, 0.0, False), LinkClock(1.0, 0.0, 0.01, 0.0, False)
    assert slow.cross(100, *fast.cross(100, 0.0, 0.0)) == (2.0, 4.0)  # the same, the other way


def test_a_link_holds_so_much_and_no_more() -> None:
    link = LinkClock(0.0, 0.0, 1e-6, 0.0, False)
    while not link.is_full(0.0):
        link.cross(1500, 0.0, 0.0)
    assert link.free_at == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize(
    ("found_ms", "found_mbit", "complaint"),
    [
        (5.4, 95.0, None),
        (5.6, 100.0, "device 3 to 1 .* one-way latency 5.600 ms instead of 5 ms"),
        (math.nan, 100.0, "latency nan"),
        (5.0, 80.0, "rate 80.0 Mbit/s instead of 100 Mbit/s"),
        (5.0, 0.0, "rate 0.0"),
    ],
)
def test_links_that_are_off_are_refused(
    found_ms: float, found_mbit: float, complaint: str | None
) -> None:
    measured = [Measured(3, 1, 5.0, found_ms, 100.0, found_mbit)]
    if complaint is None:
        check(measured)
    else:
        with pytest.raises(LinkError, match=complaint):
            check(measured)


def test_netem_is_told_what_the_link_is() -> None:
    link = parse_link("2ms±1ms/300mbit/loss0.1%")
    assert netem(link) == "netem limit 1000 delay 2000us 1000us loss 0.1% rate 300000kbit"
    assert netem(Link()) == "netem limit 1000"


@pytest.mark.parametrize("text", ["1ms;0-1:2ms", "2ms±1ms", "2ms/1mbit/reorder"])
def test_netem_refuses_what_it_cannot_do(text: str) -> None:
    with pytest.raises(LinkError, match="tc netem"):
        check_supported(parse_topology(text, 2))


def test_commands_stand_between_dashes() -> None:
    assert split_commands(["run", "--", "a", "-b", "--", "c"]) == (["run"], [["a", "-b"], ["c"]])
    assert split_commands(["check"]) == (["check"], [])
