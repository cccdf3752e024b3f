"""Messages as dataclasses: to bytes and back, and failures on their way."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpirt import errors
from tpirt.batch import Algorithm, Batch, Collective, CommDtype, Segment
from tpirt.errors import PeerError, PeerLostError, StoreError, TpirtError, TransportError
from tpirt.protocol.messages import (
    PROTOCOL_VERSION,
    Failure,
    HelloReply,
    LinkState,
    Loading,
    Ready,
    Setup,
    Trace,
    decode,
    decode_call,
    encode,
    encode_call,
)

COUNT = st.integers(0, 2**31 - 1)
SEGMENTS = st.builds(Segment, COUNT, COUNT, COUNT, COUNT, COUNT, prompt=st.booleans())
COLLECTIVES = st.builds(
    Collective, st.sampled_from(Algorithm), st.sampled_from(CommDtype), st.booleans()
)


@given(st.lists(SEGMENTS, max_size=4), st.booleans(), COLLECTIVES)
def test_a_batch_is_read_as_it_was_written(
    segments: list[Segment], prefill: bool, collective: Collective
) -> None:
    batch = Batch(tuple(segments), prefill, collective)
    assert decode(encode(batch), "peer") == batch


SETUP = Setup(
    PROTOCOL_VERSION, "f", "{}", "s", 1, 2, None, 0, 16, 1000, 0, 2**63 - 1, ("", "host:1")
)


@pytest.mark.parametrize(
    "message",
    [
        SETUP,
        Setup(PROTOCOL_VERSION, "f", "{}", "s", 1, 2, 4, None, 16, 1000, 0, 0, ()),
        replace(SETUP, kv_bits=8),
        Ready(1, 2, (LinkState(2, "tcp"), LinkState(3, "", "no link"))),
        Failure(7, "StoreError", "no disk"),
        Failure(7, "PeerLostError", "gone", 0),
        Trace("disk", ("a", "b"), 3),
        Loading(0, 0),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_is_read_as_it_was_written(message: object) -> None:
    """An absent number is not 0, and 0 is not absent."""
    assert decode(encode(message), "peer") == message


def test_a_call_is_read_as_it_was_written() -> None:
    reply = HelloReply(PROTOCOL_VERSION, "1.0", "p", "h", None, 1, 2, 3, 4, True, False, 7)
    assert decode_call(HelloReply, encode_call(reply), "peer") == reply


@given(st.binary(max_size=64))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    with suppress(TransportError):
        decode(data, "liar")


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, TpirtError)
    ],
)
def test_a_failure_comes_back_as_the_error_that_it_was(kind: type[TpirtError]) -> None:
    error = decode(encode(Failure.of(kind("why"), 5)), "peer").error("rank1")
    assert type(error) is kind
    assert str(error) == "peer rank1: why"


def test_a_lost_rank_is_told() -> None:
    failure = Failure.of(PeerLostError("gone", rank=0, peer_id="p"))
    error = decode(encode(failure), "peer").error("rank1")
    assert isinstance(error, PeerLostError)
    assert error.rank == 0
    assert isinstance(Failure.of(StoreError("x")).error("rank1"), StoreError)


@pytest.mark.parametrize("kind", ["SystemExit", "annotations", "", "KeyError", "__builtins__"])
def test_a_failure_of_an_unknown_kind_is_a_peer_error(kind: str) -> None:
    error = Failure(1, kind, "why").error("rank1")
    assert type(error) is PeerError
