"""The frame codec: the bytes are protobuf's own, and no bytes whatever crash it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from tpirt.errors import TransportError
from tpirt.ops.buffers import tensor_bytes
from tpirt.transport.codec import Envelope, Frame, read_tensor
from tpirt.transport.pb import tpirt_pb2 as pb

UINT32, UINT64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
TENSORS = st.builds(
    pb.Tensor,
    step=UINT64,
    seq=UINT32,
    dtype=st.sampled_from([0, 1, 2, 77]),
    shape=st.lists(UINT64, max_size=4),
)
BODIES = st.one_of(
    st.fixed_dictionaries({"partial": TENSORS}),
    st.fixed_dictionaries({"reduced": TENSORS}),
    st.fixed_dictionaries(
        {"step": st.builds(pb.Step, step=UINT64, start=UINT64, tokens=UINT64, rope_length=UINT64)}
    ),
    st.fixed_dictionaries({"abort": st.builds(pb.Abort, step=UINT64)}),
    st.fixed_dictionaries(
        {"error": st.builds(pb.Error, step=UINT64, kind=st.text(), message=st.text())}
    ),
    st.fixed_dictionaries({"setup": st.builds(pb.Setup, model_config=st.text(), rank=UINT32)}),
    st.fixed_dictionaries({"stats": st.builds(pb.Stats, io_ms=st.floats(allow_nan=False))}),
    st.fixed_dictionaries({"clock": st.builds(pb.Clock, now_ns=UINT64)}),
    st.fixed_dictionaries(
        {"trace": st.builds(pb.Trace, lane=st.text(), names=st.lists(st.text(), max_size=3))}
    ),
    st.just({}),
)
HEADERS = BODIES.map(lambda body: pb.FrameHeader(**body))
PAYLOADS = st.binary(max_size=300) | st.integers(100, 40_000).map(bytes)


@given(header=HEADERS, payload=PAYLOADS)
def test_bytes_are_those_of_protobuf(header: pb.FrameHeader, payload: bytes) -> None:
    data = Frame(header, payload).data
    assert data == pb.Frame(header=header, payload=payload).SerializeToString()
    parsed = pb.Frame.FromString(data)
    assert parsed.header == header
    assert parsed.payload == payload
    frame = Frame.of(data)
    assert frame.header == header
    assert bytes(frame.payload) == payload
    assert frame.kind == (header.WhichOneof("body") or "empty")


@given(header=HEADERS, payload=PAYLOADS)
def test_payload_before_header_is_read_too(header: pb.FrameHeader, payload: bytes) -> None:
    # Protobuf leaves the order of fields to the writer.
    data = pb.Frame(payload=payload).SerializeToString()
    data += pb.Frame(header=header).SerializeToString()
    frame = Frame.of(data)
    assert (frame.header, bytes(frame.payload)) == (header, payload)


def check_any(data: bytes) -> None:
    """Refused, or read as protobuf reads it."""
    frame = Frame.of(data)
    try:
        _ = frame.header
    except TransportError:
        return
    try:
        expected = pb.Frame.FromString(data)
    except DecodeError:  # stricter about lengths written with needless zeros
        return
    assert frame.header == expected.header
    assert bytes(frame.payload) == expected.payload


@given(data=st.binary(max_size=200))
@settings(max_examples=300)
def test_arbitrary_bytes(data: bytes) -> None:
    check_any(data)


@given(header=HEADERS, payload=st.binary(max_size=40), data=st.data())
@settings(max_examples=300)
def test_damaged_frames(header: pb.FrameHeader, payload: bytes, data: st.DataObject) -> None:
    whole = Frame(header, payload).data
    cut = data.draw(st.integers(0, len(whole)))
    at = data.draw(st.integers(0, len(whole) - 1))
    check_any(whole[:cut])
    check_any(whole + whole[:cut])
    check_any(whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :])


@given(
    values=st.lists(st.floats(width=32), max_size=30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rows=st.sampled_from([1, 2, 3]),
)
def test_tensors_keep_their_bits(values: list[float], dtype: torch.dtype, rows: int) -> None:
    tensor = torch.tensor(values * rows, dtype=torch.float32).to(dtype).view(rows, -1)
    kind = pb.FLOAT32 if dtype is torch.float32 else pb.BFLOAT16
    header = pb.FrameHeader(partial=pb.Tensor(step=3, seq=4, dtype=kind, shape=tensor.shape))
    frame = Frame.of(Frame(header, tensor_bytes(tensor)).data)
    got = frame.header.partial
    assert (got.step, got.seq) == (3, 4)
    again = read_tensor(frame.payload, got.dtype, tuple(got.shape))
    assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
    assert bytes(tensor_bytes(again)) == bytes(tensor_bytes(tensor))


@given(
    payload=st.binary(max_size=64),
    dtype=st.integers(-1, 4),
    shape=st.lists(st.sampled_from([0, 1, 2, 4, 2**31, 2**63, 2**64 - 1]), max_size=4),
)
def test_tensors_of_any_claim(payload: bytes, dtype: int, shape: list[int]) -> None:
    try:
        tensor = read_tensor(payload, dtype, tuple(shape))
    except TransportError:
        return
    assert list(tensor.shape) == shape
    assert bytes(tensor_bytes(tensor)) == payload


@given(
    kind=st.sampled_from(["partial", "reduced"]),
    step=UINT64,
    seq=UINT32,
    dtype=st.sampled_from(list(pb.DType.values())),
    shape=st.lists(UINT64, max_size=3).map(tuple),
    payload=PAYLOADS,
    other=HEADERS,
)
def test_envelopes_are_what_protobuf_writes(
    kind: str,
    step: int,
    seq: int,
    dtype: pb.DType,
    shape: tuple[int, ...],
    payload: bytes,
    other: pb.FrameHeader,
) -> None:
    due = Envelope(kind, step, seq, dtype, shape, len(payload))
    header = pb.FrameHeader(**{kind: due.tensor})
    frame = Frame(header, payload)
    assert due.seal(payload).data == frame.data
    assert bytes(due.open(Frame.of(frame.data)) or b"") == payload
    for wrong in (Frame(header, payload + b"x"), Frame(header, payload[1:]), Frame(other, payload)):
        if wrong.data != frame.data:
            assert due.open(wrong) is None


def test_a_tensor_lies_in_what_came_if_that_may_be_written_to() -> None:
    data = torch.ones(2).numpy().tobytes()
    copy = read_tensor(memoryview(data), pb.FLOAT32, (2,))
    copy += 1
    assert data == torch.ones(2).numpy().tobytes()
    came = bytearray(data)
    tensor = read_tensor(memoryview(came), pb.FLOAT32, (2,))
    tensor += 1
    assert came == torch.full((2,), 2.0).numpy().tobytes()


CASES: list[tuple[Any, str]] = [
    (b"\x0a", "cut off"),
    (b"\x0a\x05ab", "malformed"),
    (b"\x1a\x00", "malformed"),
    (b"\x0a\x00\x0a\x00", "malformed"),
    (b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "cut off"),
    (b"\x0a\x02\xff\xff", "header"),
]


@pytest.mark.parametrize(("data", "message"), CASES)
def test_refusals_say_what(data: bytes, message: str) -> None:
    with pytest.raises(TransportError, match=f"peer 7: .*{message}"):
        _ = Frame.of(data, "7").header
