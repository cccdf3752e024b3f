"""Where the bytes of a quantized matrix lie: the portable form, and the one a CPU's kernel reads.

Axes: N out_features, K in_features (padded: Kp), g group size, G = Kp / g, B rows of a kernel
block, Np = N rounded up to B.

The **canonical** form is the same on every machine and is what crosses the wire:

- int8: ``codes`` int8 (N, Kp), ``scales`` bfloat16 (N,)
- int4: ``codes`` uint8 (N, Kp / 2), the even input in the low half; ``scales`` and ``zeros``
  bfloat16 (N, G)

The **local** form is what this machine's kernel reads. For int8 it is the canonical form. For
int4 it is ``codes`` uint8 (Np / B, Kp, B / 2) and ``scale_zero`` bfloat16 (G, Np, 2): each byte
holds one input's codes of two rows of a block. Which two, and B, depend on the vectors torch uses
here (``weight_to_int4pack_kernel`` in ``ATen/native/cpu/int4mm_kernel.cpp``: 64 rows, halves, on
AVX-512; 32 rows, halves, on AVX2; neighbouring rows elsewhere). Torch does not say, so
:func:`local_layout` packs a probe and looks. Rows that pad have scale and zero point 0.

Both forms are regions of one flat uint8 buffer. With the buffer itself at a multiple of 64 bytes
every region is: tensors are views of it, never copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from tpirt.ops.buffers import ALIGN, Region, place, round_up
from tpirt.ops.quant import QuantSpec, pack_nibbles, quantize_int4, quantize_int8

Order = Literal["halves", "pairs"]


# Bytes of codes converted at once.
_CHUNK = 1 << 20


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
    canonical = codes[:, 0::2] | (codes[:, 1::2] << 4)
    for layout in _LAYOUTS:
        if packed.dtype == torch.uint8 and torch.equal(_pack(canonical, layout).view(-1), packed):
            return layout
    return None


def canonical_regions(spec: QuantSpec, rows: int, inputs: int) -> tuple[Region, ...]:
    """The regions of a (rows, inputs) matrix in portable form."""
    width = spec.padded_inputs(inputs)
    if spec.kind == "int8":
        return place(
            Region("codes", torch.int8, (rows, width)), Region("scales", torch.bfloat16, (rows,))
        )
    groups = width // spec.group_size
    return place(
        Region("codes", torch.uint8, (rows, width // 2)),
        Region("scales", torch.bfloat16, (rows, groups)),
        Region("zeros", torch.bfloat16, (rows, groups)),
    )


def local_regions(spec: QuantSpec, rows: int, inputs: int, layout: Layout) -> tuple[Region, ...]:
    """The regions of a (rows, inputs) matrix as ``layout`` has them; int8 ignores it."""
    if spec.kind == "int8":
        return canonical_regions(spec, rows, inputs)
    width = spec.padded_inputs(inputs)
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
    spec: QuantSpec, w: torch.Tensor, canonical: tuple[torch.Tensor, ...], start: int = 0
) -> None:
    """Quantize some rows of a matrix into their places in its canonical tensors.

    Rows do not see each other: any cut into parts, in any order or thread, gives the same bytes.

    Args:
        w: (n, K), any float dtype: the matrix's rows from ``start`` on.
        canonical: what :func:`view_regions` gives for :func:`canonical_regions`.

    Raises:
        CheckpointError: a weight is not finite; the row it names counts from ``start``.
    """
    part = slice(start, start + w.shape[0])
    if spec.kind == "int8":
        codes, scales = canonical
        codes[part, : w.shape[1]], scales[part] = quantize_int8(w)
        codes[part, w.shape[1] :] = 0
        return
    nibbles, scales, zeros = canonical
    levels, scales[part], zeros[part] = quantize_int4(w, spec.group_size)
    nibbles[part] = pack_nibbles(levels)


def to_local(
    spec: QuantSpec,
    rows: int,
    inputs: int,
    layout: Layout,
    canonical: torch.Tensor,
    local: torch.Tensor,
) -> None:
    """Write the local form of a (rows, inputs) matrix into ``local``, from ``canonical``.

    Both are flat uint8 of :func:`regions_nbytes`; gaps between regions are left as they are.
    Beside them memory stays at a few MiB.
    """
    source = view_regions(canonical_regions(spec, rows, inputs), canonical)
    target = view_regions(local_regions(spec, rows, inputs, layout), local)
    if spec.kind == "int8":
        for old, new in zip(source, target, strict=True):
            new.copy_(old)
        return
    codes, scales, zeros = source
    packed, scale_zero = target
    step = _rows_at_once(codes.shape[1], layout)
    for start in range(0, rows, step):
        part = codes[start : start + step]
        blocks = -(-part.shape[0] // layout.block)
        if part.shape[0] < blocks * layout.block:
            whole = torch.zeros(blocks * layout.block, codes.shape[1], dtype=torch.uint8)
            whole[: part.shape[0]] = part
            part = whole
        _pack(part, layout, packed[start // layout.block :][:blocks])
    scale_zero[:, :rows, 0] = scales.t()
    scale_zero[:, :rows, 1] = zeros.t()
    scale_zero[:, rows:] = 0


def to_canonical(
    spec: QuantSpec,
    rows: int,
    inputs: int,
    layout: Layout,
    local: torch.Tensor,
    canonical: torch.Tensor,
) -> None:
    """The inverse of :func:`to_local`, bit for bit."""
    source = view_regions(local_regions(spec, rows, inputs, layout), local)
    target = view_regions(canonical_regions(spec, rows, inputs), canonical)
    if spec.kind == "int8":
        for old, new in zip(source, target, strict=True):
            new.copy_(old)
        return
    packed, scale_zero = source
    codes, scales, zeros = target
    step = _rows_at_once(codes.shape[1], layout)
    for start in range(0, rows, step):
        part = codes[start : start + step]
        blocks = -(-part.shape[0] // layout.block)
        part.copy_(_unpack(packed[start // layout.block :][:blocks], layout)[: part.shape[0]])
    scales.copy_(scale_zero[:, :rows, 0].t())
    zeros.copy_(scale_zero[:, :rows, 1].t())


def _rows_at_once(row_nbytes: int, layout: Layout) -> int:
    return max(1, _CHUNK // max(1, row_nbytes * layout.block)) * layout.block


def _pack(codes: torch.Tensor, layout: Layout, out: torch.Tensor | None = None) -> torch.Tensor:
    """Whole blocks of canonical codes (n B, Kp / 2) to local ones (n, Kp, B / 2)."""
    rows, half = codes.shape
    blocks = rows // layout.block
    if out is None:
        out = torch.empty(blocks, half * 2, layout.block // 2, dtype=torch.uint8)
    turned = codes.t().contiguous().view(half, blocks, layout.block)
    low, high = layout.split(turned)
    inputs = out.view(blocks, half, 2, layout.block // 2).permute(1, 0, 2, 3)
    inputs[:, :, 0] = (low & 15) | (high << 4)
    inputs[:, :, 1] = (low >> 4) | (high & 240)
    return out


def _unpack(packed: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Local codes (n, Kp, B / 2) to canonical ones (n B, Kp / 2)."""
    blocks, inputs, pairs = packed.shape
    halves = packed.view(blocks, inputs // 2, 2, pairs).permute(1, 0, 2, 3)
    even, odd = halves[:, :, 0], halves[:, :, 1]
    turned = torch.empty(inputs // 2, blocks, layout.block, dtype=torch.uint8)
    low, high = layout.split(turned)
    low.copy_((even & 15) | (odd << 4))
    high.copy_((even >> 4) | (odd & 240))
    return turned.view(inputs // 2, blocks * layout.block).t().contiguous()
