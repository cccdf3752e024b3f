"""The layout of frames, and what a reader refuses."""

from __future__ import annotations

import ctypes

import pytest

from tpirt.errors import TransportError
from tpirt.transport.frame import HEADER_BYTES, Frame, FrameReader, Header, Kind


def test_the_layout_is_the_documented_one() -> None:
    head = Frame.of(
        Kind.PARTIAL, b"abc", b"payload", dtype=2, step=3, seq=4, rows=5, columns=6
    ).head
    expected = (
        b"tp"
        + bytes([3, Kind.PARTIAL, 2, 0, 0, 0])
        + (3).to_bytes(8, "little")
        + b"".join(value.to_bytes(4, "little") for value in (4, 5, 6, 3))
        + (7).to_bytes(8, "little")
        + bytes(24)
    )
    assert head == expected
    assert len(head) == HEADER_BYTES


def test_the_payload_follows_the_padded_message() -> None:
    for size, padded in ((0, 0), (1, 64), (64, 64), (65, 128)):
        frame = Frame.of(Kind.REQUEST, b"m" * size, b"payload")
        data = b"".join(frame.parts())
        assert len(data) == frame.nbytes == HEADER_BYTES + padded + 7
        assert data[HEADER_BYTES:] == b"m" * size + bytes(padded - size) + b"payload"


@pytest.mark.parametrize("message_bytes", [0, 1, 100])
@pytest.mark.parametrize("payload_bytes", [1, 1000, 1 << 20])
def test_payloads_are_aligned_and_writable(message_bytes: int, payload_bytes: int) -> None:
    frame = Frame.of(Kind.PARTIAL, bytes(message_bytes), bytes(payload_bytes))
    reader = FrameReader("7", limit=1 << 21)
    (got,) = reader.feed(b"".join(frame.parts()))
    assert isinstance(got.payload, memoryview)
    assert not got.payload.readonly
    address = ctypes.addressof(ctypes.c_char.from_buffer(got.payload))
    assert address % 16 == 0


def test_frames_do_not_share_memory() -> None:
    reader = FrameReader("7")
    data = b"".join(Frame.of(Kind.PARTIAL, b"", b"first").parts())
    first, second = reader.feed(data + data)
    assert isinstance(first.payload, memoryview)
    first.payload[:] = b"other"
    assert bytes(second.payload) == b"first"
    list(reader.feed(data))
    assert bytes(first.payload) == b"other"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GET / HTTP/1.1\r\n".ljust(64), "expected a frame, got bytes that begin with b'GE'"),
        (bytes(64), "expected a frame"),
        (b"tp\x02".ljust(64), "a frame of version 2, expected version 3"),
    ],
)
def test_refusals_name_the_peer_and_what_came(data: bytes, message: str) -> None:
    with pytest.raises(TransportError, match=f"^peer 7: {message}"):
        list(FrameReader("7").feed(data))


def test_a_short_header_is_refused() -> None:
    with pytest.raises(TransportError, match="a frame header of 63 bytes, expected 64"):
        Header.unpack(bytes(63))


@pytest.mark.parametrize(
    ("message_bytes", "payload_bytes"), [(0, 101), (101, 0), (50, 51), (2**32 - 1, 2**64 - 1)]
)
def test_sizes_above_the_limit_are_refused_on_the_headers_word(
    message_bytes: int, payload_bytes: int
) -> None:
    head = Header(1, message_bytes=message_bytes, payload_bytes=payload_bytes).pack()
    size = message_bytes + payload_bytes
    with pytest.raises(TransportError, match=f"peer 7: a frame of {size} bytes, at most 100"):
        list(FrameReader("7", limit=100).feed(head))


def test_the_limit_may_be_raised_between_frames() -> None:
    reader = FrameReader("7", limit=10)
    small = b"".join(Frame.of(Kind.MESSAGE, b"small").parts())
    large = b"".join(Frame.of(Kind.MESSAGE, b"", bytes(100)).parts())
    frames = reader.feed(small + large)
    next(frames)
    reader.limit = 100
    assert len(next(frames).payload) == 100
