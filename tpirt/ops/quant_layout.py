"""Where the bytes of a quantized matrix lie: in the order in which a CPU's kernel reads them.

A 4-bit code byte holds one input's codes of two rows of a block. Which two rows, and the size of
the block, depend on the vectors torch uses (``weight_to_int4pack_kernel`` in
``ATen/native/cpu/int4mm_kernel.cpp``: 64 rows, halves, on AVX-512; 32 rows, halves, on AVX2;
neighbouring rows elsewhere). Torch does not say, so :func:`local_layout` packs a probe and looks.

Codes and scales are regions of one flat uint8 buffer. If the buffer starts at a multiple of 64
bytes, every region does: tensors are views of it, never copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from tpirt.ops.buffers import ALIGN, Region, page_buffer, place, round_up
from tpirt.ops.quant import Scheme
from tpirt.ops.quant_rounding import Workspace

Order = Literal["halves", "pairs"]


@dataclass(frozen=True)
class Layout:
    """The order of 4-bit codes: ``block`` rows (B) at a time, two of them in a byte.

    ``order`` says which: row i with row ``i + block / 2`` (halves), or 2 i with 2 i + 1 (pairs).
    """

    block: int
    order: Order

    @property
    def name(self) -> str:
        """The name recorded in manifests: machines of the same name read the same bytes."""
        return f"int4-{self.block}-{self.order}"

    @classmethod
    def named(cls, name: str) -> Layout | None:
        """The layout that :attr:`name` is of; None for one this version does not know."""
        return next((layout for layout in _LAYOUTS if layout.name == name), None)

    def pack(self, levels: torch.Tensor, out: torch.Tensor) -> None:
        """Codes 0..15, one byte each, (k, m B), to ``out``, uint8 (m, k, B / 2)."""
        rows = levels.view(torch.uint8).view(len(levels), -1, self.block)
        low, high = self.split(rows.transpose(0, 1))
        torch.add(low, high, alpha=16, out=out)

    def unpack(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        """Packed codes (m, k, B / 2) to levels -8..7 in ``out``, any float dtype (k, m B)."""
        rows = out.view(out.shape[0], codes.shape[0], self.block).permute(1, 0, 2)
        low, high = self.split(rows)
        low.copy_((codes & 15).view(torch.int8).sub_(8))
        high.copy_((codes >> 4).view(torch.int8).sub_(8))

    def levels(self, codes: torch.Tensor) -> torch.Tensor:
        """Packed codes (m, k, B / 2) to codes 0..15, one byte each, uint8 (k, m B)."""
        blocks, inputs, _ = codes.shape
        levels = page_buffer(inputs * blocks * self.block).view(inputs, blocks, self.block)
        low, high = self.split(levels.transpose(0, 1))
        torch.bitwise_and(codes, 15, out=low)
        torch.bitwise_right_shift(codes, 4, out=high)
        return levels.view(inputs, blocks * self.block)

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows (..., B) of the low and of the high halves of the bytes."""
        if self.order == "halves":
            return rows[..., : self.block // 2], rows[..., self.block // 2 :]
        return rows[..., 0::2], rows[..., 1::2]


_ORDERS: tuple[Order, ...] = ("halves", "pairs")
_LAYOUTS = [Layout(block, order) for block in (64, 32, 16) for order in _ORDERS]

# Where torch has no 4-bit kernel, weights are de-quantised from this.
PORTABLE_LAYOUT = Layout(64, "halves")


def find_kernel(name: str) -> Callable[..., torch.Tensor] | None:
    """A torch CPU kernel by its ``aten`` name; None where this build of torch lacks it."""
    packet = getattr(torch.ops.aten, name, None)
    return None if packet is None else packet.default


def local_layout() -> Layout | None:
    """Ask torch's packing kernel for its layout, with 48 KiB; well below a millisecond.

    None where there is no such kernel or its bytes are of a layout unknown here.
    """
    pack = find_kernel("_convert_weight_to_int4pack_for_cpu")
    if pack is None:
        return None
    # Two blocks at least, every pair of neighbours distinct.
    rows, inputs = 192, 32
    codes = (torch.arange(rows * inputs).view(rows, inputs) * 7 // 3 % 16).to(torch.uint8)
    try:
        packed = pack(codes.to(torch.int32), 2).view(-1)
    except RuntimeError:
        return None
    for layout in _LAYOUTS:
        ours = torch.empty(rows // layout.block, inputs, layout.block // 2, dtype=torch.uint8)
        layout.pack(codes.t().contiguous(), ours)
        if packed.dtype == torch.uint8 and torch.equal(ours.view(-1), packed):
            return layout
    return None


def local_regions(spec: Scheme, rows: int, inputs: int, layout: Layout) -> tuple[Region, ...]:
    """The two regions, codes and scales, of a (rows, inputs) matrix, placed one after the other."""
    return place(*spec.regions(rows, inputs, layout))


def regions_nbytes(regions: tuple[Region, ...]) -> int:
    """Bytes from the first region's start to the last one's end, rounded up to ``ALIGN``."""
    return round_up(regions[-1].end, ALIGN)


def view_regions(regions: tuple[Region, ...], buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All regions as tensors on ``buffer``'s memory, in order."""
    return tuple(region.view(buffer) for region in regions)


def quantize_rows(
    spec: Scheme,
    layout: Layout,
    w: torch.Tensor,
    start: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    space: Workspace,
) -> None:
    """Quantize some rows of a matrix.

    Rows are independent: any cut into parts that begin at multiples of the layout's block, in any
    order or thread, gives the same bytes. Memory in ``space`` grows with the rows.

    Args:
        w: (n, K), any float dtype: the matrix's rows from ``start`` on.
        start: index of the first row.
        codes: the codes region of n rows (:func:`local_regions`); overwritten.
        scales: the whole matrix's second region, zero at first; the rows' entries are overwritten.
        space: scratch memory.

    Raises:
        CheckpointError: a weight is not finite.
    """
    spec.round_rows(layout, w, start, codes, scales, space)
