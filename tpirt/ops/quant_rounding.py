"""Rounding weights to 8 and 4 bits.

Axes: n output channels, K inputs, g inputs of a group, G = ceil(K / g) groups. Symbols: q code,
s scale, z zero point.

Every step is one torch call over a tile. A tile is large enough that the overhead of about 80
calls is small, and small enough for the cache. Results as large as a tile go to memory that is
reused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from tpirt.errors import CheckpointError
from tpirt.ops.buffers import round_up

# Elements rounded at once, 2 MiB in float32: the fastest of 2^16..2^20 with one thread and with
# two, which also contend for the GIL.
_TILE = 1 << 19

# Initial range of the refinement relative to max - min, and its step towards each of two fits.
# Measured on gaussian, Student-t(4) and trained weights: docs/quantization.md.
_START = {32: 0.97, 64: 0.95, 128: 0.92}
_STRIDES = (2.5, 1.5)

# The smallest scale; its inverse does not overflow.
_TINY = 1e-30


class Workspace:
    """Scratch memory that is reused: new pages would add half the time of the rounding.

    Not thread-safe.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Return uninitialised memory; calls with the same name and dtype share it."""
        count = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[name, dtype] = torch.empty(count, dtype=dtype)
        return buffer[:count].view(shape)


def round_int8(
    w: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, space: Workspace
) -> None:
    """Round each output channel to 255 levels, ``s = max|w| / 127``, ``q = round(w / s)``.

    Searching 25 clipped scales per channel lowers the squared error by only 1% (for gaussian and
    Student-t weights, docs/quantization.md), so there is no search.

    Args:
        w: (n, K), any float dtype.
        codes: int8 (n, K or more), overwritten; columns beyond K become 0.
        scales: bfloat16 (n,), overwritten.

    Raises:
        CheckpointError: a weight is not finite.
    """
    rows, in_features = w.shape
    codes[:, in_features:] = 0
    if not in_features:
        scales.zero_()
        return
    step = max(1, _TILE // in_features)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        x = space.take("x", torch.float32, min(step, rows - start), in_features)
        x.copy_(w[part])
        scales[part] = torch.maximum(x.amax(1), x.amin(1).neg_()).mul_(1 / 127).clamp_min_(_TINY)
        x.mul_(scales[part].float().reciprocal_().unsqueeze(1))
        codes[part, :in_features] = x.round_().clamp_(-127, 127)
    _check_finite(scales)


def rows_at_once(in_features: int) -> int:
    """Number of output channels to round at once: a tile, a multiple of the layouts' 64 rows."""
    return max(64, min(256, _TILE // max(1, in_features) // 64 * 64))


def int4_tiles(
    w: torch.Tensor, group_size: int, space: Workspace, *, refine: bool = True
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Round output channels to 16 levels per group, ``w ~ (q - 8) s + z``, tile by tile.

    The baseline takes ``s = (max - min) / 15`` and ``z = min + 8 s``. The refinement works on
    ``x = (w - z) / s``, the weights in units of the baseline's scale. It starts with levels over a
    slightly narrower range and alternates between rounding and the least squares fit
    ``x ~ a t - c`` to the levels t = q - 8::

        a = cov(t, x) / var(t)
        c = a mean(t) - mean(x)

    Neither step raises the group's squared error (Lloyd 1982, restricted to equidistant levels).
    HQQ (Badri and Shaji 2023) alternates too, for the zero point only and in an l_p norm; it was
    worse here. With over-relaxation two rounds suffice instead of four. Scales and zero points
    are rounded to bfloat16 *before* the codes are chosen, so the codes compensate for it. A group
    keeps the baseline if it is better.

    Args:
        w: (n, K), any float dtype; best :func:`rows_at_once` rows.
        group_size: g; a short last group is padded with its mean.
        space: scratch memory.
        refine: False for the baseline.

    Yields:
        The tile's columns of w, whole groups of 0..G g; their codes, int8 0..15 (columns, n),
        overwritten by the next tile; scales and zero points, bfloat16 (2, groups, n).

    Raises:
        CheckpointError: a weight is not finite.
    """
    rows, in_features = w.shape
    # Transposed, so that groups broadcast and sum along whole vectors.
    turned = space.take("turned", w.dtype, in_features, rows)
    turned.copy_(w.t())
    step = max(1, _TILE // max(1, rows * group_size)) * group_size
    for start in range(0, in_features, step):
        part = turned[start : start + step]
        width = round_up(len(part), group_size)
        x = space.take("x", torch.float32, width, rows)
        x[: len(part)] = part
        if len(part) < width:
            # The mean stays inside the group's range and hardly moves the fit.
            x[len(part) :] = x[width - group_size : len(part)].mean(0)
        codes, scale_zero = _round_groups(
            x.view(width // group_size, group_size, rows), space, refine
        )
        _check_finite(scale_zero)
        yield slice(start, start + width), codes.view(width, rows), scale_zero


def _round_groups(
    x: torch.Tensor, space: Workspace, refine: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (G, g, n), scales and zero points (2, G, n); x (G, g, n) is overwritten."""
    t = space.take("t", torch.float32, *x.shape)
    stored = _baseline(x)
    scale, zero = stored.float()
    x.sub_(zero).mul_(scale.reciprocal())
    if refine:
        u = space.take("u", torch.float32, *x.shape)
        # Back to weights, w ~ (s a) t + (z - s c), rounded to bfloat16.
        fit = _refined(x, t, u).mul_(scale)
        torch.sub(zero, fit[1], out=fit[1])
        refined = fit.bfloat16()
        fit.copy_(refined)
        inverse = scale / fit[0]
        offset = (zero - fit[1]).div_(fit[0])
        torch.addcmul(offset, x, inverse, out=u)
        # The fit to a group of one level is nan; comparisons with nan are false.
        better = _squared_error(u, t) < _squared_error(x, t).mul_(inverse).mul_(inverse)
        stored = torch.where(better, refined, stored)
        torch.addcmul(torch.where(better, offset, 0), x, torch.where(better, inverse, 1), out=x)
    codes = space.take("codes", torch.int8, *x.shape)
    return codes.copy_(x.round_().clamp_(-8, 7).add_(8)), stored.squeeze(2)


def _baseline(x: torch.Tensor) -> torch.Tensor:
    """Return scales and zero points (2, G, 1, n) of levels from min to max, bfloat16."""
    low = x.amin(1, keepdim=True)
    out = x.new_empty(2, *low.shape)
    # A group with a single value has the smallest scale, and the value as zero point.
    torch.sub(x.amax(1, keepdim=True), low, out=out[0]).mul_(1 / 15).clamp_min_(_TINY)
    torch.add(low, out[0], alpha=8, out=out[1])
    return out.bfloat16()


def _refined(x: torch.Tensor, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return a and c of the fit (2, G, 1, n); t and u are overwritten."""
    part = _START[x.shape[1]]
    minus_mean = x.sum(1, keepdim=True).mul_(-1 / x.shape[1])
    fit = torch.tensor([part, 0.5 - part / 2]).view(2, 1, 1, 1)
    torch.mul(x, 1 / part, out=t).add_(0.5 / part - 0.5)
    for stride in _STRIDES:
        if stride != _STRIDES[0]:
            inverse = fit[0].reciprocal()
            torch.addcmul(fit[1] * inverse, x, inverse, out=t)
        fit = _least_squares(x, minus_mean, t, u).mul_(stride).add_(fit, alpha=1 - stride)
    return fit


def _least_squares(
    x: torch.Tensor, minus_mean: torch.Tensor, t: torch.Tensor, u: torch.Tensor
) -> torch.Tensor:
    """Round t to levels and fit them to x; t and u are overwritten."""
    t.round_().clamp_(-8, 7)
    first = t.sum(1, keepdim=True)
    second = torch.mul(t, t, out=u).sum(1, keepdim=True)
    cross = t.mul_(x).sum(1, keepdim=True)
    mean = first / x.shape[1]
    fit = x.new_empty(2, *mean.shape)
    cross.addcmul_(first, minus_mean)
    torch.div(cross, second.addcmul_(first, mean, value=-1), out=fit[0])
    torch.addcmul(minus_mean, fit[0], mean, out=fit[1])
    return fit


def _squared_error(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Squared rounding error of x per group; t is overwritten."""
    return torch.round(x, out=t).clamp_(-8, 7).sub_(x).square_().sum(1, keepdim=True)


def _check_finite(scales: torch.Tensor) -> None:
    """Inf and nan weights make the scale of their group inf or nan; amax propagates nan."""
    if scales.numel() and not math.isfinite(scales.amax()):
        raise CheckpointError("expected finite weights, got inf or nan")
