"""16 levels that 4-bit codes can stand for, and rounding to them where C is missing.

Axes: G groups, g inputs of a group, n output channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tpirt.ops.quant_words import on_codebook_grid, to_codebook_words

# Those of ggml's IQ4_NL: closer around 0, where most weights are.
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# Initial range of the levels relative to max - min: docs/quantization.md.
_STARTS = (1.0, 0.88)
_TURNS = 3


def round_to_levels(x: torch.Tensor, levels: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, uint8 (G, g, n), and words, int16 (G, n), of x (G, g, n) float32.

    Rounding to the levels alternates with the least squares fit of scale and offset to them, as
    for equal steps (:func:`~tpirt.ops.quant_rounding.int4_tiles`). The best of all turns counts.
    """
    table = torch.tensor(levels, dtype=torch.float32)
    best = least = None
    for scale, offset in _starts(x, table):
        for _ in range(_TURNS):
            scale, offset = on_codebook_grid(scale, offset)
            codes = _codes(x, table, scale, offset)
            fitted = table.take(codes)
            error = ((fitted + offset) * scale - x).square_().sum(1, keepdim=True)
            found = codes.to(torch.uint8), to_codebook_words(scale, offset)
            if best is None or least is None:
                best, least = found, error
            else:
                better = error < least
                least = torch.where(better, error, least)
                best = (
                    torch.where(better, found[0], best[0]),
                    torch.where(better, found[1], best[1]),
                )
            scale, offset = _least_squares(x, fitted, scale, offset)
    assert best is not None
    return best[0], best[1].squeeze(1)


def _starts(x: torch.Tensor, table: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Scales and offsets (G, 1, n) of levels around the middle of a group."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    first, last = table[0], table[-1]
    # How far the levels reach from 0, in scales, with the farthest offsets.
    reach = torch.maximum(low / (first - 128), high / (last + 126)).clamp_min(2.0**-27)
    # Offsets are even, so that with an even level zeros stay zeros.
    even = table[table % 2 == 0]
    flat = even[even.abs().argmin()] if len(even) else first
    centre = torch.where(low < high, (first + last) / 2, flat)
    scales = [torch.maximum((high - low) * (start / (last - first)), reach) for start in _STARTS]
    return [(scale, (low + high) / 2 / scale - centre) for scale in scales]


def _codes(
    x: torch.Tensor, table: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    return torch.bucketize(x / scale - offset, (table[1:] + table[:-1]) / 2)


def _least_squares(
    x: torch.Tensor, fitted: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit scales and offsets to levels; where there is only one, they stay as they are."""
    level, value = fitted.mean(1, keepdim=True), x.mean(1, keepdim=True)
    around = fitted - level
    slope = (around * (x - value)).sum(1, keepdim=True) / around.square().sum(1, keepdim=True)
    fits = slope > 1e-8  # nan is not
    return torch.where(fits, slope, scale), torch.where(fits, value / slope - level, offset)
