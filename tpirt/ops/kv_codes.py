"""Keys and values in 8 bits: int8 codes, and one scale for each head of each token.

``append`` of ``native/layer.inc`` computes the same bits. Axes: K KV heads, T tokens, D head_dim.
"""

from __future__ import annotations

import math

import torch

# bfloat16 has float32's range in 16 bits. Codes are of the scale as it is stored, so that its
# rounding adds 0.4 % to the error, not to the value.
SCALE_DTYPE = torch.bfloat16

# Heads whose values are all smaller are 0; ``CODES_LEAST`` of ``native/native.c``.
_LEAST = 1e-30


def round_to_codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round x (K, T, D) to ``scale * code``.

    Where a value is not finite, the scale is NaN: all of that head's values are.

    Returns:
        Codes, int8 (K, T, D), and scales (K, T).
    """
    x = x.float()
    most = x.abs().amax(-1)
    most = torch.where(most.isfinite(), most, math.nan)
    scales = torch.where(most < _LEAST, 0.0, most / 127).to(SCALE_DTYPE)
    kept = scales.float()
    kept = torch.where(kept > 0, kept, math.inf)  # else all codes are 0
    codes = x.div(kept.unsqueeze(-1)).round_().nan_to_num_(0.0)
    return codes.to(torch.int8), scales


def from_codes(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values (K, T, D) that codes and scales stand for, rounded to ``dtype``."""
    return codes.to(dtype).mul_(scales.to(dtype).unsqueeze(-1))
