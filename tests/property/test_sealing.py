"""Sealed records: what was sealed comes out whatever the pieces; anything else is refused."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpirt.errors import PeerLostError, TransportError
from tpirt.transport.frame import Frame, Kind
from tpirt.transport.sealing import (
    RECORD_BYTES,
    Seal,
    SealedReader,
    SealedWriter,
    agreed,
    costs,
    fastest,
)
from tpirt.transport.stream import Outgoing

SECRET, TICKET = bytes(range(32)), bytes(16)
CIPHERS = ("AES-GCM", "ChaCha20-Poly1305")

ciphers = st.sampled_from(CIPHERS)
sizes = st.one_of(
    st.integers(0, 300), st.sampled_from([RECORD_BYTES - 64, RECORD_BYTES, 3 * RECORD_BYTES + 1])
)


def pair(cipher: str) -> tuple[Seal, Seal]:
    """The caller's side, and the one that answered."""
    return (
        Seal(SECRET, TICKET, cipher, served=False),
        Seal(SECRET, TICKET, cipher, served=True),
    )


class Stingy:
    """A socket that takes some bytes at a time, and sometimes none."""

    def __init__(self, takes: Sequence[int]):
        self.taken = bytearray()
        self._takes = list(takes) or [1 << 30]
        self._turn = 0

    def send(self, data: memoryview) -> int:
        count = self._takes[self._turn % len(self._takes)]
        self._turn += 1
        if not count:
            raise BlockingIOError
        self.taken += data[:count]
        return min(count, len(data))


def written(seal: Seal, frames: Sequence[Frame], takes: Sequence[int]) -> bytes:
    """The records of some frames, sent as a channel sends them."""
    out = Stingy([*takes, 1 << 20])
    writer = SealedWriter(out, seal)  # type: ignore[arg-type]
    for frame in frames:
        views: list[memoryview] = [memoryview(part) for part in frame.parts() if len(part)]
        outgoing = object.__new__(Outgoing)
        outgoing.views = views
        while outgoing.views:
            outgoing.skip(writer.sendmsg(outgoing.views))
    return bytes(out.taken)


def read(seal: Seal, data: bytes, pieces: Sequence[int]) -> list[Frame]:
    """The frames of a stream that arrives in pieces."""
    reader = SealedReader("peer", seal)
    reader.limit = 1 << 20
    frames, at, turn = [], 0, 0
    while at < len(data):
        space = reader.space()
        assert len(space) > 0
        count = min(len(space), len(data) - at, pieces[turn % len(pieces)] if pieces else 1 << 20)
        space[:count] = data[at : at + count]
        reader.filled(count)
        at, turn = at + count, turn + 1
        while (frame := reader.next()) is not None:
            frames.append(frame)
        assert reader.missing <= RECORD_BYTES + 20
    return frames


@given(
    ciphers,
    st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4),
    st.lists(st.integers(0, 70_000), max_size=4),
    st.lists(st.integers(1, 70_000), max_size=4),
)
def test_frames_come_out_as_they_went_in(
    cipher: str, shapes: list[tuple[int, int]], takes: list[int], pieces: list[int]
) -> None:
    frames = [
        Frame.of(Kind.MESSAGE, b"m" * message, bytes([number + 1]) * payload, seq=number)
        for number, (message, payload) in enumerate(shapes)
    ]
    caller, answering = pair(cipher)
    data = written(caller, frames, takes)
    got = read(answering, data, pieces)
    assert [(f.header, f.message, bytes(f.payload)) for f in got] == [
        (f.header, f.message, bytes(f.payload)) for f in frames
    ]


@given(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4), st.integers(1, RECORD_BYTES))
def test_records_may_be_cut_anywhere(shapes: list[tuple[int, int]], size: int) -> None:
    """Ours end with a frame; a frame of two records, or a record of two frames, is read as well."""
    frames = [Frame.of(Kind.MESSAGE, b"m" * message, b"p" * tail) for message, tail in shapes]
    stream = b"".join(bytes(part) for frame in frames for part in frame.parts())
    size = max(size, len(stream) // 50)
    caller, answering = pair("AES-GCM")
    records = [caller.seal(stream[at : at + size]) for at in range(0, len(stream), size)]
    got = read(answering, b"".join(records), ())
    assert [(f.header, f.message, bytes(f.payload)) for f in got] == [
        (f.header, f.message, bytes(f.payload)) for f in frames
    ]


def test_a_frame_of_one_record_is_opened_into_its_own_memory() -> None:
    """As a frame in the clear is copied once on its way from the socket, a sealed one is opened."""
    caller, answering = pair("AES-GCM")
    data = written(caller, [Frame.of(Kind.PARTIAL, b"m", bytes(range(256)))], ())
    opened: list[memoryview | bytearray] = []
    open_into = answering.open_into

    def watched(record: memoryview, plain: memoryview | bytearray) -> None:
        open_into(record, plain)
        opened.append(plain)

    answering.open_into = watched  # type: ignore[method-assign]
    (frame,) = read(answering, data, ())
    (plain,) = opened
    plain[-1] = 7
    assert frame.payload[-1] == 7


@given(ciphers, st.data())
def test_any_change_is_noticed(cipher: str, data: st.DataObject) -> None:
    """A flipped bit, or records that are repeated, reordered or left out."""
    caller, answering = pair(cipher)
    frames = [Frame.of(Kind.MESSAGE, b"message %d" % number) for number in range(3)]
    records = [written(caller, [frame], ()) for frame in frames]
    order = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    stream = bytearray(b"".join(records[number] for number in order))
    in_order = order == list(range(len(order)))
    if in_order:
        at = data.draw(st.integers(0, 8 * len(stream) - 1))
        stream[at // 8] ^= 1 << at % 8
    got: list[Frame] = []
    reader = SealedReader("peer", answering)
    try:
        reader.space()[: len(stream)] = stream
        reader.filled(len(stream))
        while (frame := reader.next()) is not None:
            got.append(frame)
    except PeerLostError:
        pass
    else:  # a length that became larger: the rest never comes
        assert reader.missing > 0
    assert [frame.message for frame in got] == [frame.message for frame in frames[: len(got)]]
    assert len(got) < len(order)


@given(ciphers, st.binary(min_size=5, max_size=300))
def test_bytes_of_a_stranger_are_refused(cipher: str, said: bytes) -> None:
    _, answering = pair(cipher)
    reader = SealedReader("peer", answering)
    reader.space()[: len(said)] = said
    reader.filled(len(said))
    with contextlib.suppress(PeerLostError):
        assert reader.next() is None


def test_directions_and_connections_have_keys_of_their_own() -> None:
    caller, answering = pair("AES-GCM")
    other, _ = pair("AES-GCM")
    assert caller.seal(b"x") == other.seal(b"x")  # the same secret: the same keys
    with pytest.raises(TransportError, match="does not verify"):
        caller.open(bytes(pair("AES-GCM")[0].seal(b"x")))  # sent back
    fresh = Seal(bytes(32), TICKET, "AES-GCM", served=True)
    with pytest.raises(TransportError, match="does not verify"):
        fresh.open(bytes(pair("AES-GCM")[0].seal(b"x")))
    assert answering.open(bytes(pair("AES-GCM")[0].seal(b"x"))) == b"x"


def test_the_cipher_suits_both_sides() -> None:
    assert set(costs()) == set(CIPHERS)
    assert agreed(fastest()) == fastest()
    assert agreed(next(name for name in CIPHERS if name != fastest())) == "ChaCha20-Poly1305"
    with pytest.raises(ValueError, match="no cipher"):
        agreed("ROT13")


@pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33)])
def test_what_is_no_secret(secret: bytes) -> None:
    with pytest.raises(ValueError, match="not an offer"):
        Seal(secret, TICKET, "AES-GCM", served=True)


def test_a_partly_sent_record_is_not_sealed_again() -> None:
    """Over a real socket whose buffer is full."""
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        caller, answering = pair("AES-GCM")
        writer = SealedWriter(left, caller)
        payload = bytes(range(256)) * (8 << 10)
        views = [memoryview(payload)]
        outgoing = object.__new__(Outgoing)
        outgoing.views = views
        received = bytearray()
        while outgoing.views:
            outgoing.skip(writer.sendmsg(outgoing.views))
            received += right.recv(1 << 20)
        right.setblocking(False)
        plain, at = bytearray(), 0
        while at < len(received):
            end = at + 4 + int.from_bytes(received[at : at + 4], "little")
            plain += answering.open(bytes(received[at:end]))
            at = end
        assert plain == payload
