"""The scale and offset of 32 weights in 4 bits, in one word of 16 bits.

From the top: 5 bits of exponent e, 4 of mantissa m, 7 of offset o. A weight with code q in 0..15 is
``s * (q - 8 + t / 12)`` with ``s = 2^(e - 27) * (1 + m / 16)`` and ``t = o - 64``: scales from 7e-9
to 31, to within 3%; zero points, the value of code 8, within 5.3 scales of 0, to within a
twenty-fourth of a scale. The codes are chosen for the stored scale and zero point, so its rounding
costs little: docs/quantization.md.

With a codebook, a weight whose code stands for level l, an integer from -127 to 127, is
``s * (l + 2 * (o - 64))``.
"""

from __future__ import annotations

import torch

LARGEST_SCALE = 31.0

_STEPS = 12  # of the zero point, per scale
_MANTISSA = 4
_LOWEST = (127 - 27) << _MANTISSA  # exponent and mantissa of the smallest scale, as in float32


def on_grid(fit: torch.Tensor) -> torch.Tensor:
    """Round scales and zero points (2, ...) float32 to what a word can hold."""
    scale = _scale(_scale_field(fit[0]))
    return torch.stack((scale, _steps(scale, fit[1]).mul_(1 / _STEPS).mul_(scale)))


def to_words(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The words, int16, of scales and zero points (float32) that are rounded to the grid."""
    field = _scale_field(scale)
    offset = _steps(_scale(field), zero).to(torch.int32).add_(64)
    return (field << 7).add_(offset).to(torch.int16)


def split_words(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset, float32, of words: a weight is ``scale * (q + offset)``."""
    bits = words.to(torch.int32) & 0xFFFF
    return _scale(bits >> 7), ((bits & 127) - 160).float().mul_(1 / _STEPS)


def on_codebook_grid(
    scale: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round scales, and offsets in units of them, float32, to what a codebook's word can hold."""
    stored = _scale(_scale_field(scale))
    return stored, (offset * (scale / stored) / 2).round_().clamp_(-64, 63).mul_(2)


def to_codebook_words(scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The words, int16, of what :func:`on_codebook_grid` returned."""
    return (_scale_field(scale) << 7).add_((offset / 2).to(torch.int32).add_(64)).to(torch.int16)


def split_codebook_words(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset, float32, of a codebook's words: a weight is ``scale * (l + offset)``."""
    bits = words.to(torch.int32) & 0xFFFF
    return _scale(bits >> 7), ((bits & 127) - 64).float().mul_(2)


def _scale_field(scale: torch.Tensor) -> torch.Tensor:
    """Exponent and mantissa, int32, of the nearest stored scale."""
    shift = 23 - _MANTISSA
    bits = scale.contiguous().view(torch.int32).add(1 << (shift - 1))
    return (bits >> shift).sub_(_LOWEST).clamp_(0, 511)


def _scale(field: torch.Tensor) -> torch.Tensor:
    return ((field + _LOWEST) << (23 - _MANTISSA)).view(torch.float32)


def _steps(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return torch.div(zero, scale).mul_(_STEPS).round_().clamp_(-64, 63)
