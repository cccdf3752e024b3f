"""Details of frames that no property states: emptiness, copies, claims of size."""

from __future__ import annotations

import pytest
import torch

from tpirt.errors import TransportError
from tpirt.ops.buffers import page_buffer, tensor_bytes
from tpirt.transport.codec import Frame, read_tensor
from tpirt.transport.pb import tpirt_pb2 as pb


def test_empty_bytes_are_an_empty_frame() -> None:
    frame = Frame.of(b"")
    assert frame.kind == "empty"
    assert bytes(frame.payload) == b""


def test_payload_is_not_copied_on_decoding() -> None:
    data = Frame(pb.FrameHeader(abort=pb.Abort(step=1)), b"x" * 100).data
    frame = Frame.of(data)
    assert isinstance(frame.payload, memoryview)
    assert frame.payload.obj is data


@pytest.mark.parametrize(
    ("size", "expected"),
    [(3, "expected 8 bytes, got 3"), (0, "expected 8 bytes, got 0"), (9, "got 9")],
)
def test_wrong_size_names_both(size: int, expected: str) -> None:
    with pytest.raises(TransportError, match=expected):
        read_tensor(bytes(size), pb.FLOAT32, (1, 2))


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(TransportError, match="unknown dtype 9"):
        read_tensor(b"", 9, (0,))


def test_views_keep_their_tensor_alive() -> None:
    views = [tensor_bytes(torch.full((1000,), value, dtype=torch.uint8)) for value in range(20)]
    assert [set(view) for view in views] == [{value} for value in range(20)]


def test_views_are_of_contiguous_memory_only() -> None:
    assert bytes(tensor_bytes(torch.empty(0, 3))) == b""
    with pytest.raises(AssertionError):
        tensor_bytes(torch.ones(3, 2).t())


def test_page_buffers_begin_on_a_page_and_are_zero() -> None:
    for nbytes in (1, 4095, 4096, 100_000):
        buffer = page_buffer(nbytes)
        assert buffer.shape == (nbytes,)
        assert buffer.data_ptr() % 4096 == 0
        assert not buffer.any()
