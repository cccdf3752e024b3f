"""What people write for links: read back as meant, or refused in one sentence."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.net.spec import Link, LinkError, Topology, parse_link, parse_topology, uniform

TENTHS = st.integers(0, 1000).map(lambda n: n / 10)
LINKS = st.builds(
    lambda latency, share, rate, loss, reorder, flip, replay: Link(
        latency, round(latency * share, 3), rate, loss, reorder, flip, replay
    ),
    TENTHS,
    st.sampled_from([0, 0.1, 1.0]),
    st.none() | st.integers(1, 10_000).map(float),
    st.sampled_from([0.0, 0.1, 12.5]),
    st.booleans(),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([0.0, 100.0]),
)


@given(LINKS)
def test_a_link_is_read_as_it_is_written(link: Link) -> None:
    assert parse_link(str(link)) == link
    assert parse_link(str(link).replace("±", "+-").upper()) == link


@given(LINKS, st.integers(2, 8))
def test_one_value_is_for_a_message_from_device_to_device(link: Link, devices: int) -> None:
    topology = parse_topology(str(link), devices)
    assert topology == uniform(link, devices)
    assert topology.latency_ms(0, devices - 1) == pytest.approx(link.latency_ms)
    assert topology.jitter_ms(devices - 1, 0) == pytest.approx(link.jitter_ms)
    assert topology.rate_mbit(0, 1) == link.rate_mbit
    kept = [1 - way.loss_percent / 100 for way in topology.path(0, 1)]
    assert kept[0] * kept[1] == pytest.approx(1 - link.loss_percent / 100)


@given(st.text(string.printable + "±", max_size=40), st.integers(1, 4))
def test_any_text_is_a_topology_or_an_error_of_one_line(text: str, devices: int) -> None:
    error = ""
    try:
        assert isinstance(parse_topology(text, devices), Topology)
    except LinkError as exc:
        error = str(exc)
    assert len(error.splitlines()) <= 1


def test_devices_differ() -> None:
    topology = parse_topology("10ms/100mbit; 1:2ms/50mbit; 2:up=8ms/20mbit,down=1ms/90mbit", 3)
    assert topology.latency_ms(0, 1) == topology.latency_ms(1, 0) == 5 + 1
    assert topology.latency_ms(2, 0) == 8 + 5
    assert topology.latency_ms(0, 2) == 5 + 1
    assert topology.rate_mbit(2, 0) == 20
    assert topology.rate_mbit(0, 2) == 90
    assert topology.rate_mbit(0, 1) == 50


def test_pairs_have_links_of_their_own() -> None:
    topology = parse_topology("10ms;0-1:1ms/9mbit;0>2:3ms;1-2:none", 3)
    assert topology.path(1, 0) == (Link(1.0, rate_mbit=9.0),)
    assert topology.latency_ms(0, 2) == 3
    assert topology.latency_ms(2, 0) == 10
    assert topology.path(2, 1) == ()
    assert (1, 2) not in list(topology.routes())


def test_a_mesh_needs_no_router() -> None:
    topology = parse_topology("0-1:1ms;0-2:2ms;1-2:3ms", 3)
    assert len(list(topology.routes())) == 6


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "'' is no latency"),
        (
            "1ms/300",
            "'300' is no latency, rate, loss, flip, replay or reorder; such as",
        ),
        ("1ms/2ms", "latency is given twice"),
        ("1ms±2ms", "jitter of 2 ms is more than the latency"),
        ("1ms/0mbit", "rate 0 Mbit/s: expected 0.01 to"),
        ("1ms/loss80%", "loss 80 %: expected 0 to 50"),
        ("7:1ms", "'7' is no device; there are 0 to 2"),
        ("1ms;0-0:1ms", "no link to itself"),
        ("1ms;0:up=1ms", "down=... is missing"),
        ("1ms;0:left=1ms,down=1ms", "expected up=... and down=..."),
        ("0:1ms;1:1ms", "no link leads from device 0 to 2"),
        ("none", "'none' is no latency"),
    ],
)
def test_nonsense_is_named(text: str, complaint: str) -> None:
    with pytest.raises(LinkError) as caught:
        parse_topology(text, 3)
    assert complaint in str(caught.value)
