"""Raw memory for tensors: page-aligned buffers outside malloc, and views without a copy."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

# Alignment of every tensor in a block: a cache line, and the widest vector.
ALIGN = 64


def round_up(number: int, step: int) -> int:
    """The smallest multiple of ``step`` that is at least ``number``."""
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


# A disk request takes a limited number of memory segments (254 on virtio), so buffers should be
# contiguous. Reads into 4 KiB pages had half the rate of reads into huge pages.
_HUGE_PAGE = 2 << 20


def page_buffer(nbytes: int) -> torch.Tensor:
    """Allocate zeroed uint8 (nbytes,), page-aligned, straight from the operating system.

    It uses huge pages if the system has them. It is returned as soon as the last view is gone: no
    allocator keeps it, so memory limits are exact.
    """
    whole = nbytes // _HUGE_PAGE * _HUGE_PAGE
    if not whole or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.frombuffer(mmap.mmap(-1, max(1, nbytes)), dtype=torch.uint8)[:nbytes]
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # huge pages are not for shared memory
    memory = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=private)  # untouched pages are free
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    start = -buffer.data_ptr() % _HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return buffer[start : start + nbytes]


_scratch = threading.local()


def scratch(nbytes: int) -> torch.Tensor:
    """Memory uint8 (nbytes,), page-aligned: the calling thread's until it calls again.

    It is kept: the first use of fresh memory takes longer than what is done with it, up to a
    millisecond per MiB on a virtual machine.
    """
    return _room(nbytes)[:nbytes]


def scratch_address(nbytes: int) -> int:
    """The address of :func:`scratch`, without a view of it."""
    return _room(nbytes).data_ptr()


def _room(nbytes: int) -> torch.Tensor:
    room: torch.Tensor | None = getattr(_scratch, "room", None)
    if room is None or room.shape[0] < nbytes:
        room = _scratch.room = None  # before there is another one
        room = _scratch.room = page_buffer(nbytes)
    return room


def split_rows(rows: torch.Tensor, counts: Sequence[int]) -> Sequence[torch.Tensor]:
    """Views of successive rows. One part is the tensor itself.

    Weights go through all caches for each token: an operation that a single sequence does not need
    costs it some 0.1 ms.
    """
    return (rows,) if len(counts) == 1 else torch.split(rows, list(counts))


def join_rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Parts one after another. A single one that is not empty is returned itself."""
    filled = [part for part in parts if len(part)] or [parts[0]]
    return filled[0] if len(filled) == 1 else torch.cat(filled)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """View a contiguous CPU tensor's memory as bytes; the view keeps the tensor alive."""
    assert tensor.is_contiguous()
    if tensor.numel() == 0:
        return memoryview(b"")
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")
