"""Frames survive any cutting of the stream, and no bytes crash the reader."""

from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from tpirt.errors import TransportError
from tpirt.transport.frame import Frame, FrameReader, Header, Kind

UINT8, UINT32, UINT64 = (st.integers(0, 2**bits - 1) for bits in (8, 32, 64))
HEADERS = st.builds(Header, UINT8, UINT8, UINT64, UINT32, UINT32, UINT32, UINT32, UINT64)
PAYLOADS = st.binary(max_size=300) | st.sampled_from([65_408, 65_472, 65_473, 200_000]).map(
    lambda size: bytes(at % 251 for at in range(size))
)
FRAMES = st.builds(
    Frame.of,
    st.sampled_from(Kind),
    st.binary(max_size=150) | st.just(b"m" * 70_000),
    PAYLOADS,
    dtype=UINT8,
    step=UINT64,
    seq=UINT32,
    rows=UINT32,
    columns=UINT32,
)


@given(header=HEADERS)
def test_headers_keep_their_values(header: Header) -> None:
    assert Header.unpack(header.pack()) == header


@given(frames=st.lists(FRAMES, max_size=5), data=st.data())
@settings(max_examples=100)
def test_any_cutting_of_the_stream_gives_the_same_frames(
    frames: list[Frame], data: st.DataObject
) -> None:
    stream = b"".join(part for frame in frames for part in frame.parts())
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12).map(sorted))
    reader = FrameReader("7", limit=1 << 20)
    got = [
        frame
        for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)
        for frame in reader.feed(stream[start:stop])
    ]
    assert [(f.head, f.message, bytes(f.payload)) for f in got] == [
        (f.head, f.message, f.payload) for f in frames
    ]
    assert [f.header for f in got] == [f.header for f in frames]


@given(frame=FRAMES, sizes=st.lists(st.integers(3_000, 70_000), min_size=1, max_size=6))
def test_a_byte_count_says_what_is_missing_of_a_large_frame(frame: Frame, sizes: list[int]) -> None:
    stream = b"".join(frame.parts())
    reader = FrameReader("7", limit=1 << 20)
    position = turn = 0
    while position < len(stream):
        piece = stream[position : position + sizes[turn % len(sizes)]]
        list(reader.feed(piece))
        position, turn = position + len(piece), turn + 1
        large = frame.nbytes > 64 << 10 and position >= 64
        assert reader.missing == (len(stream) - position if large else 0)


@given(data=st.binary(max_size=400), valid=st.booleans())
@settings(max_examples=300)
def test_arbitrary_bytes_are_frames_or_refused(data: bytes, valid: bool) -> None:
    reader = FrameReader("7", limit=1 << 16)
    with contextlib.suppress(TransportError):
        for frame in reader.feed(b"tp\x03" * valid + data):
            header = frame.header
            assert header.message_bytes == len(frame.message)
            assert header.payload_bytes == len(frame.payload)
