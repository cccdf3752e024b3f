"""A quantized matrix in memory: two regions of one flat uint8 buffer, codes and scales.

If the buffer starts at a multiple of 64 bytes, so does every region. Tensors are views of it, never
copies.
"""

from __future__ import annotations

import torch

from tpirt.ops.buffers import ALIGN, Region, place, round_up
from tpirt.ops.quant import Scheme


def matrix_regions(spec: Scheme, out_features: int, in_features: int) -> tuple[Region, ...]:
    """The regions of a matrix, codes and scales, placed one after the other."""
    return place(*spec.regions(out_features, in_features))


def regions_nbytes(regions: tuple[Region, ...]) -> int:
    """Size of all regions, rounded up to ``ALIGN``."""
    return round_up(regions[-1].end, ALIGN)


def view_regions(regions: tuple[Region, ...], buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """View all regions of ``buffer`` as tensors, in order."""
    return tuple(region.view(buffer) for region in regions)
