"""Memory shared between tensors and bytes."""

from __future__ import annotations

import pytest
import torch

from tpirt.ops.buffers import page_buffer, tensor_bytes


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
