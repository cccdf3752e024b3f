"""Where the bytes of a quantized matrix lie: in the order in which a CPU's kernel reads them.

Axes: N out_features, K in_features (padded: Kp), g group size, G = Kp / g, B rows of a kernel
block, Np = N rounded up to B.

- int8: ``codes`` int8 (N, Kp), ``scales`` bfloat16 (N,), the same everywhere.
- int4: ``codes`` uint8 (Np / B, Kp, B / 2), ``scale_zero`` bfloat16 (G, Np, 2): each byte holds
  one input's codes of two rows of a block. Which two, and B, depend on the vectors torch uses
  here (``weight_to_int4pack_kernel`` in ``ATen/native/cpu/int4mm_kernel.cpp``: 64 rows, halves,
  on AVX-512; 32 rows, halves, on AVX2; neighbouring rows elsewhere). Torch does not say, so
  :func:`local_layout` packs a probe and looks. Rows that pad have scale and zero point 0.

The two are regions of one flat uint8 buffer. With the buffer itself at a multiple of 64 bytes
every region is: tensors are views of it, never copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from tpirt.ops.buffers import ALIGN, Region, place, round_up
from tpirt.ops.quant import QuantSpec
from tpirt.ops.quant_rounding import Workspace, int4_tiles, round_int8

Order = Literal["halves", "pairs"]


@dataclass(frozen=True)
class Layout:
    """How a 4-bit kernel wants the codes: ``block`` rows at a time, two of them in a byte.

    ``order`` says which: row i with row ``i + block / 2`` (halves), or 2 i with 2 i + 1 (pairs).
    """

    block: int
    order: Order

    @property
    def name(self) -> str:
        """What a manifest records: bytes of one name serve every machine that answers the same."""
        return f"int4-{self.block}-{self.order}"

    @classmethod
    def named(cls, name: str) -> Layout | None:
        """The layout that :attr:`name` is of; None for one this version does not know."""
        return next((layout for layout in _LAYOUTS if layout.name == name), None)

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of the low and of the high halves of the bytes; ``rows`` is (..., B)."""
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
        _pack(codes.t().contiguous(), layout, ours)
        if packed.dtype == torch.uint8 and torch.equal(ours.view(-1), packed):
            return layout
    return None


def local_regions(spec: QuantSpec, rows: int, inputs: int, layout: Layout) -> tuple[Region, ...]:
    """The two regions of a (rows, inputs) matrix as ``layout`` has them; int8 ignores it."""
    width = spec.padded_inputs(inputs)
    if spec.kind == "int8":
        return place(
            Region("codes", torch.int8, (rows, width)), Region("scales", torch.bfloat16, (rows,))
        )
    padded = round_up(rows, layout.block)
    return place(
        Region("codes", torch.uint8, (padded // layout.block, width, layout.block // 2)),
        Region("scale_zero", torch.bfloat16, (width // spec.group_size, padded, 2)),
    )


def regions_nbytes(regions: tuple[Region, ...]) -> int:
    """Bytes from the first region's start to the last one's end, rounded up to ``ALIGN``."""
    return round_up(regions[-1].end, ALIGN)


def view_regions(regions: tuple[Region, ...], buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All regions as tensors on ``buffer``'s memory, in order."""
    return tuple(region.view(buffer) for region in regions)


def quantize_rows(
    spec: QuantSpec,
    layout: Layout,
    w: torch.Tensor,
    start: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    space: Workspace,
) -> None:
    """Quantize some rows of a matrix.

    Rows do not see each other: any cut into parts that begin at multiples of the layout's block,
    in any order or thread, gives the same bytes. Memory in ``space`` grows with the rows.

    Args:
        w: (n, K), any float dtype: the matrix's rows from ``start`` on.
        start: as said.
        codes: what :func:`local_regions` has as codes for n rows, filled.
        scales: the whole matrix's second region, zero so far; its places for these rows are filled.
        space: to work in.

    Raises:
        CheckpointError: a weight is not finite.
    """
    part = slice(start, start + len(w))
    if spec.kind == "int8":
        round_int8(w, codes, scales[part], space)
        return
    padding = len(codes) * layout.block - len(w)
    for inputs, levels, scale_zero in int4_tiles(w, spec.group_size, space):
        _pack(F.pad(levels, (0, padding)) if padding else levels, layout, codes[:, inputs])
        groups = slice(inputs.start // spec.group_size, inputs.stop // spec.group_size)
        scales[groups, part] = scale_zero.permute(1, 2, 0)


def _pack(levels: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
    """Codes 0..15 (k, m B) of one byte each to local ones in ``out``, uint8 (m, k, B / 2)."""
    rows = levels.view(torch.uint8).view(len(levels), -1, layout.block)
    low, high = layout.split(rows.transpose(0, 1))
    torch.add(low, high, alpha=16, out=out)
