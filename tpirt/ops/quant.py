"""Weights in 8 and 4 bits: the choice, the rounding, and the portable bytes they travel as.

Axes: N out_features, K in_features, G = ceil(K / g) groups of g inputs. Symbols: q code, s scale,
z zero point (the value that code 8 stands for).

- int8, one scale per output channel:  ``w ~ q * s``, q in -127..127.
- int4, one scale and zero point per group of one channel:  ``w ~ (q - 8) * s + z``, q in 0..15,
  which is what torch's CPU kernel computes (``ATen/native/cpu/int4mm_kernel.cpp``).

Scales and zero points are bfloat16 because the kernels want them so. They are rounded *before*
the codes are chosen: that rounding then costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tpirt.errors import CheckpointError, ConfigError
from tpirt.ops.buffers import round_up

Kind = Literal["none", "int8", "int4"]

GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 64

# The 8-bit kernel reads 16 inputs at a time, unchecked: rows are padded to that.
INT8_INPUTS = 16

# Elements quantized at once: 512 KiB in float32. Measured best of 2^15..2^19: few calls, in cache.
_CHUNK = 1 << 17

# Where the refinement starts, as a part of max - min, and its rounds. Measured on gaussian,
# Student-t(4) and trained weights: docs/quantization.md.
_SHRINK = {32: 0.97, 64: 0.96, 128: 0.92}
_ROUNDS = 4

# Below this a scale is taken for zero: its inverse would overflow.
_TINY = 1e-30


@dataclass(frozen=True)
class QuantSpec:
    """How matrices are stored; ``group_size`` is 0 unless ``kind`` is int4."""

    kind: Kind = "none"
    group_size: int = 0

    def __post_init__(self) -> None:
        assert (self.group_size in GROUP_SIZES) if self.kind == "int4" else self.group_size == 0

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Read ``none``, ``int8``, ``int4`` or ``int4:GROUP``.

        Raises:
            ConfigError: anything else.
        """
        kind, colon, group = text.partition(":")
        if kind == "int4" and not colon:
            return cls("int4", DEFAULT_GROUP_SIZE)
        if kind == "int4" and group in map(str, GROUP_SIZES):
            return cls("int4", int(group))
        if text == "none":
            return cls("none")
        if text == "int8":
            return cls("int8")
        sizes = ", ".join(f"int4:{size}" for size in GROUP_SIZES)
        raise ConfigError(f"quantize {text!r}: expected none, int8, int4 or one of {sizes}")

    def __str__(self) -> str:
        return f"int4:{self.group_size}" if self.kind == "int4" else self.kind

    def padded_inputs(self, inputs: int) -> int:
        """K rounded up to what is stored: whole groups, or whole steps of the 8-bit kernel."""
        step = self.group_size if self.kind == "int4" else INT8_INPUTS
        return inputs if self.kind == "none" else round_up(inputs, step)

    @property
    def bits(self) -> float:
        """Stored bits per weight of a large matrix; 0 where nothing is quantized."""
        return {"none": 0.0, "int8": 8.0, "int4": 4 + 32 / max(1, self.group_size)}[self.kind]


AS_THEY_ARE = QuantSpec("none")


def quantize_int8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each output channel to 255 levels, ``s = max|w| / 127``, ``q = round(w / s)``.

    Searching 25 clipped scales per channel for the least squared error lowers the error by 1 %
    only (gaussian and Student-t weights alike, docs/quantization.md): not worth the time.

    Args:
        w: (N, K), any float dtype.

    Returns:
        Codes int8 (N, K) and scales bfloat16 (N,). Beside them memory stays at a few MiB.

    Raises:
        CheckpointError: a weight is not finite.
    """
    rows, inputs = w.shape
    codes = torch.empty(rows, inputs, dtype=torch.int8)
    scales = torch.zeros(rows, dtype=torch.bfloat16)
    step = max(1, _CHUNK // max(1, inputs))
    for start in range(0, rows if inputs else 0, step):
        part = slice(start, start + step)
        chunk = w[part].to(torch.float32)
        peak = torch.maximum(chunk.amax(1), -chunk.amin(1))
        _check_finite(peak, start, 1)
        scale = _bfloat16(peak / 127)
        codes[part] = (chunk * _inverse(scale).unsqueeze(1)).round_().clamp_(-127, 127)
        scales[part] = scale
    return codes, scales


def quantize_int4(
    w: torch.Tensor, group_size: int, *, refine: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round groups of inputs to 16 levels, ``q = clamp(round((w - z) / s) + 8, 0, 15)``.

    The baseline takes ``s = (max - min) / 15`` and ``z = min + 8 s``. The refinement starts from
    a slightly narrower range and alternates four times between rounding and the least squares
    solution for the codes it has (t = q - 8, sums over the group)::

        s = (g sum(t w) - sum(t) sum(w)) / (g sum(t^2) - sum(t)^2)
        z = (sum(w) - s sum(t)) / g

    Neither step raises the group's squared error, so it converges (Lloyd 1982, restricted to
    equidistant levels; HQQ, Badri and Shaji 2023, alternates alike, for the zero point only and
    in an l_p norm, and came out worse here). A group keeps the baseline where that is better.

    Args:
        w: (N, K), any float dtype.
        group_size: g; a last group that is short is filled with its own mean.
        refine: False for the baseline.

    Returns:
        Codes uint8 0..15 (N, G g), scales and zero points bfloat16 (N, G). Same bits at every
        thread count; beside the result memory stays at a few MiB.

    Raises:
        CheckpointError: a weight is not finite.
    """
    rows, inputs = w.shape
    width = round_up(inputs, group_size)
    groups = width // group_size
    codes = torch.empty(rows, width, dtype=torch.uint8)
    scales = torch.empty(rows, groups, dtype=torch.bfloat16)
    zeros = torch.empty(rows, groups, dtype=torch.bfloat16)
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, rows if inputs else 0, step):
        part = slice(start, start + step)
        chunk = _padded(w[part].to(torch.float32), width, group_size)
        count = chunk.shape[0]
        # Groups as columns: what belongs to a group broadcasts and sums along whole vectors.
        columns = chunk.view(count * groups, group_size).t().contiguous()
        low, high = columns.amin(0), columns.amax(0)
        _check_finite(high - low, start, groups)
        scale, zero = _span(low, high, 1.0)
        if refine:
            other = _alternate(columns, *_span(low, high, _SHRINK[group_size]))
            scale, zero = _better(columns, (scale, zero), other)
        else:
            scale, zero = _bfloat16(scale), _bfloat16(zero)
        levels = _int4_levels(columns, scale, zero, torch.empty_like(columns)).add_(8)
        codes[part] = levels.t().reshape(count, width)
        scales[part] = scale.view(count, groups)
        zeros[part] = zero.view(count, groups)
    return codes, scales, zeros


def dequantize_int8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``q * s`` in float32, (N, K)."""
    return codes.float() * scales.float().unsqueeze(1)


def dequantize_int4(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """``(q - 8) * s + z`` in float32, (N, G g)."""
    rows, groups = scales.shape
    levels = (codes.float() - 8).view(rows, groups, -1)
    return (levels * scales.float().unsqueeze(2) + zeros.float().unsqueeze(2)).view(rows, -1)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the even input's in the low half: (N, K) of 0..15 to uint8 (N, K / 2)."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)


def _bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return scale.reciprocal().masked_fill_(scale <= _TINY, 0)


def _int4_levels(
    columns: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    inverse = _inverse(scale)
    torch.addcmul(-zero * inverse, columns, inverse, out=out)
    return out.round_().clamp_(-8, 7)


def _padded(chunk: torch.Tensor, width: int, group_size: int) -> torch.Tensor:
    missing = width - chunk.shape[1]
    if not missing:
        return chunk
    # The mean stays inside the group's range and hardly moves the fit.
    last = chunk[:, width - group_size :].mean(1, keepdim=True)
    return torch.cat((chunk, last.expand(-1, missing)), dim=1)


def _span(low: torch.Tensor, high: torch.Tensor, part: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels over the middle ``part`` of low..high: 7.5 steps either side of the middle."""
    scale = (high - low) * (part / 15)
    # A group of one value has no step: code 8 stands for the value itself.
    scale.masked_fill_(scale <= _TINY, 0)
    return scale, (low + high) / 2 + scale / 2


def _alternate(
    columns: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    size = columns.shape[0]
    total = columns.sum(0)
    levels, product = torch.empty_like(columns), torch.empty_like(columns)
    for _ in range(_ROUNDS):
        _int4_levels(columns, scale, zero, levels)
        first = levels.sum(0)
        second = torch.mul(levels, levels, out=product).sum(0)
        cross = torch.mul(levels, columns, out=product).sum(0)
        spread = size * second - first * first
        slope = (size * cross - first * total) / spread.clamp_min(1)
        scale = torch.where(spread > 0, slope, scale)
        zero = (total - scale * first) / size
    return scale, zero


def _better(
    columns: torch.Tensor,
    plain: tuple[torch.Tensor, torch.Tensor],
    refined: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per group the one of smaller squared error, as rounded to bfloat16."""
    rounded, errors = [], []
    off = torch.empty_like(columns)
    for scale, zero in (plain, refined):
        scale, zero = _bfloat16(scale), _bfloat16(zero)
        torch.addcmul(zero, _int4_levels(columns, scale, zero, off), scale, out=off)
        off.sub_(columns)
        rounded.append((scale, zero))
        errors.append(off.mul_(off).sum(0))
    wins = errors[1] < errors[0]
    (scale, zero), (other_scale, other_zero) = rounded
    return torch.where(wins, other_scale, scale), torch.where(wins, other_zero, zero)


def _check_finite(spans: torch.Tensor, first_row: int, per_row: int) -> None:
    finite = torch.isfinite(spans)
    if not bool(finite.all()):
        row = first_row + int((~finite).nonzero()[0, 0]) // per_row
        raise CheckpointError(
            f"weights of output row {row}: expected finite numbers, got inf or nan;"
            " copy or download the file again"
        )
