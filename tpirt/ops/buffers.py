"""Raw memory of tensors: page-aligned buffers outside malloc, and views without a copy."""

from __future__ import annotations

import ctypes
import mmap

import torch


def page_buffer(nbytes: int) -> torch.Tensor:
    """Allocate zeroed uint8 (nbytes,), page-aligned, straight from the operating system.

    It goes back there as soon as the last view of it is gone: no allocator keeps it, so a memory
    limit can be held to.
    """
    return torch.frombuffer(mmap.mmap(-1, max(1, nbytes)), dtype=torch.uint8)[:nbytes]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """View a contiguous CPU tensor's memory as bytes; the view keeps the tensor alive."""
    assert tensor.is_contiguous()
    if tensor.numel() == 0:
        return memoryview(b"")
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")
