"""Raw memory of tensors: page-aligned buffers outside malloc, and views without a copy."""

from __future__ import annotations

import ctypes
import math
import mmap
from dataclasses import dataclass, replace

import torch

# Every tensor in a block starts at a multiple of this: a cache line, the widest vector.
ALIGN = 64


def round_up(number: int, step: int) -> int:
    """The least multiple of ``step`` that is at least ``number``."""
    return -(-number // step) * step


@dataclass(frozen=True)
class Region:
    """One tensor inside a buffer: ``nbytes`` bytes from ``offset``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The region of ``buffer`` (uint8, flat), without a copy."""
        return buffer[self.offset : self.end].view(self.dtype).view(self.shape)


def place(*regions: Region) -> tuple[Region, ...]:
    """Lay regions one after another, each at a multiple of ``ALIGN``."""
    placed, offset = [], 0
    for region in regions:
        placed.append(replace(region, offset=offset))
        offset = round_up(placed[-1].end, ALIGN)
    return tuple(placed)


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
