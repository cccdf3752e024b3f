"""Memory layout of quantized matrices: the order in which a CPU's kernel reads the codes.

A byte of 4-bit codes holds the codes of one input for two rows of a block. The two rows, and the
size of the block, depend on the vectors that torch uses (``weight_to_int4pack_kernel`` in
``ATen/native/cpu/int4mm_kernel.cpp``: 64 rows, halves, on AVX-512; 32 rows, halves, on AVX2;
neighbouring rows elsewhere). Torch has no query for it; :func:`local_layout` packs a probe.

Codes and scales are regions of one flat uint8 buffer. If the buffer starts at a multiple of 64
bytes, so does every region. Tensors are views of it, never copies.
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
    """The order of 4-bit codes: ``block`` rows (B) at a time, two rows per byte.

    ``order`` is ``halves`` (row i with row ``i + block / 2``) or ``pairs`` (2 i with 2 i + 1).
    """

    block: int
    order: Order

    @property
    def name(self) -> str:
        """The name in manifests; machines with the same layout name read the same bytes."""
        return f"int4-{self.block}-{self.order}"

    @classmethod
    def named(cls, name: str) -> Layout | None:
        """The layout with this :attr:`name`; None if unknown."""
        return next((layout for layout in _LAYOUTS if layout.name == name), None)

    def pack(self, levels: torch.Tensor, out: torch.Tensor) -> None:
        """Pack codes 0..15, one byte each, (k, m B), into ``out``, uint8 (m, k, B / 2)."""
        rows = levels.view(torch.uint8).view(len(levels), -1, self.block)
        low, high = self.split(rows.transpose(0, 1))
        torch.add(low, high, alpha=16, out=out)

    def unpack(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        """Unpack codes (m, k, B / 2) to levels -8..7 in ``out``, any float dtype (k, m B)."""
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
        """Split rows (..., B) into those of the low and of the high half-bytes."""
        if self.order == "halves":
            return rows[..., : self.block // 2], rows[..., self.block // 2 :]
        return rows[..., 0::2], rows[..., 1::2]


_ORDERS: tuple[Order, ...] = ("halves", "pairs")
_LAYOUTS = [Layout(block, order) for block in (64, 32, 16) for order in _ORDERS]

# The layout if torch has no 4-bit kernel and weights are dequantized.
PORTABLE_LAYOUT = Layout(64, "halves")


def find_kernel(name: str) -> Callable[..., torch.Tensor] | None:
    """Find a torch CPU kernel by its ``aten`` name; None if this build lacks it."""
    packet = getattr(torch.ops.aten, name, None)
    return None if packet is None else packet.default


def local_layout() -> Layout | None:
    """Detect the layout of torch's packing kernel, with 48 KiB in well below a millisecond.

    None if there is no such kernel or its layout is unknown.
    """
    pack = find_kernel("_convert_weight_to_int4pack_for_cpu")
    if pack is None:
        return None
    # At least two blocks; all pairs of neighbours are distinct.
    rows, columns = 192, 32
    codes = (torch.arange(rows * columns).view(rows, columns) * 7 // 3 % 16).to(torch.uint8)
    try:
        packed = pack(codes.to(torch.int32), 2).view(-1)
    except RuntimeError:
        return None
    for layout in _LAYOUTS:
        ours = torch.empty(rows // layout.block, columns, layout.block // 2, dtype=torch.uint8)
        layout.pack(codes.t().contiguous(), ours)
        if packed.dtype == torch.uint8 and torch.equal(ours.view(-1), packed):
            return layout
    return None


def local_regions(
    spec: Scheme, out_features: int, in_features: int, layout: Layout
) -> tuple[Region, ...]:
    """The regions of a matrix, codes and scales, placed one after the other."""
    return place(*spec.regions(out_features, in_features, layout))


def regions_nbytes(regions: tuple[Region, ...]) -> int:
    """Size of all regions, rounded up to ``ALIGN``."""
    return round_up(regions[-1].end, ALIGN)


def view_regions(regions: tuple[Region, ...], buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """View all regions of ``buffer`` as tensors, in order."""
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

    Rows are independent: any split at multiples of the layout's block, in any order and thread,
    gives the same bytes. Memory in ``space`` grows with the rows.

    Args:
        w: (n, K), any float dtype; rows of the matrix from ``start`` on.
        start: index of the first row.
        codes: the codes region of n rows (:func:`local_regions`); overwritten.
        scales: the scales region of the whole matrix, initially zero; entries of these rows are
            overwritten.
        space: scratch memory.

    Raises:
        CheckpointError: a weight is not finite.
    """
    spec.round_rows(layout, w, start, codes, scales, space)
