"""Rounding weights to 8 and 4 bits.

Axes: n output channels, K inputs, g inputs of a group, G = ceil(K / g) groups. Symbols: q code,
s scale, z zero point.

Every step is one torch call over a tile. A tile is large enough that the overhead of about 80
calls is small, and small enough for the cache. Results as large as a tile go to memory that is
reused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from tpirt.errors import CheckpointError
from tpirt.ops.buffers import round_up
from tpirt.ops.quant_codebook import round_to_levels
from tpirt.ops.quant_words import LARGEST_SCALE, on_grid, to_words
from tpirt.ops.tiles import TILE_INPUTS

# Elements rounded at once, 2 MiB in float32: the fastest of 2^16..2^20 with one thread and with
# two, which also contend for the GIL.
_TILE = 1 << 19

# Initial range of the refinement relative to max - min, and its step towards each of two fits.
# Measured on gaussian, Student-t(4) and trained weights: docs/quantization.md.
_START = 0.97
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
        scales: float32 (n,), overwritten.

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
        x.mul_(scales[part].reciprocal().unsqueeze(1))
        codes[part, :in_features] = x.round_().clamp_(-127, 127)
    _check_finite(scales)


def rows_at_once(in_features: int) -> int:
    """Number of output channels to round at once, a multiple of 64."""
    return max(64, min(256, _TILE // max(1, in_features) // 64 * 64))


def int4_tiles(
    w: torch.Tensor,
    padded: int,
    space: Workspace,
    *,
    levels: Sequence[int] = (),
    refine: bool = True,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Round output channels to 16 levels per 32 inputs, ``w ~ (q - 8) s + z``, some at a time.

    The baseline takes ``s = (max - min) / 15`` and ``z = min + 8 s``. The refinement works on
    ``x = (w - z) / s``, the weights in units of the baseline's scale. It starts with levels over a
    slightly narrower range and alternates between rounding and the least squares fit
    ``x ~ a t - c`` to the levels t = q - 8::

        a = cov(t, x) / var(t)
        c = a mean(t) - mean(x)

    Neither step raises the group's squared error (Lloyd 1982, restricted to equidistant levels).
    HQQ (Badri and Shaji 2023) alternates too, for the zero point only and in an l_p norm; it was
    worse here. With over-relaxation two rounds suffice instead of four. Scales and zero points
    are rounded to what is stored *before* the codes are chosen, so the codes compensate for it. A
    group keeps the baseline if it is better.

    Args:
        w: (n, K), any float dtype; best :func:`rows_at_once` rows.
        padded: rows with padding, whose codes and words are 0. A short last group is padded with
            its mean.
        space: scratch memory.
        levels: 16 of a codebook to round to (:func:`~tpirt.ops.quant_codebook.round_to_levels`).
        refine: False for the baseline.

    Yields:
        Columns of w, whole groups of 0..G g; their codes, uint8 0..15 (columns, padded),
        overwritten by the next ones; their words, int16 (groups, padded).

    Raises:
        CheckpointError: a weight is not finite, or larger than 217.
    """
    rows, in_features = padded, w.shape[1]
    # Transposed, so that groups broadcast and sum along whole vectors.
    turned = space.take("turned", w.dtype, in_features, rows)
    turned[:, : len(w)] = w.t()
    turned[:, len(w) :] = 0
    step = max(1, _TILE // max(1, rows * TILE_INPUTS)) * TILE_INPUTS
    for start in range(0, in_features, step):
        part = turned[start : start + step]
        width = round_up(len(part), TILE_INPUTS)
        x = space.take("x", torch.float32, width, rows)
        x[: len(part)] = part
        if len(part) < width:
            # The mean stays inside the group's range and hardly moves the fit.
            x[len(part) :] = x[width - TILE_INPUTS : len(part)].mean(0)
        check_weights(x)
        by_group = x.view(width // TILE_INPUTS, TILE_INPUTS, rows)
        if levels:
            codes, words = round_to_levels(by_group, levels)
        else:
            codes, words = _round_groups(by_group, space, refine)
        codes[..., len(w) :] = 0
        words[..., len(w) :] = 0
        yield slice(start, start + width), codes.view(width, rows), words


def _round_groups(
    x: torch.Tensor, space: Workspace, refine: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (G, g, n) and words (G, n); x (G, g, n) is overwritten."""
    t = space.take("t", torch.float32, *x.shape)
    stored = _baseline(x)
    scale, zero = stored
    x.sub_(zero).mul_(scale.reciprocal())
    if refine:
        u = space.take("u", torch.float32, *x.shape)
        # Back to weights, w ~ (s a) t + (z - s c).
        fit = _refined(x, t, u).mul_(scale)
        torch.sub(zero, fit[1], out=fit[1])
        fit = on_grid(fit)
        inverse = scale / fit[0]
        offset = (zero - fit[1]).div_(fit[0])
        torch.addcmul(offset, x, inverse, out=u)
        # The fit to a group of one level is nan; comparisons with nan are false.
        better = _squared_error(u, t) < _squared_error(x, t).mul_(inverse).mul_(inverse)
        stored = torch.where(better, fit, stored)
        torch.addcmul(torch.where(better, offset, 0), x, torch.where(better, inverse, 1), out=x)
    codes = space.take("codes", torch.uint8, *x.shape)
    return codes.copy_(x.round_().clamp_(-8, 7).add_(8)), to_words(*stored).squeeze(1)


def _baseline(x: torch.Tensor) -> torch.Tensor:
    """Return scales and zero points (2, G, 1, n), as stored, of levels from min to max."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    out = x.new_empty(2, *low.shape)
    torch.sub(high, low, out=out[0]).mul_(1 / 15)
    # A zero point is at most 5.25 scales from 0, so the levels end 13.25 below and 12.25 above it.
    torch.maximum(out[0], torch.maximum(low.mul(-1 / 13.25), high.mul_(1 / 12.25)), out=out[0])
    torch.add(low, out[0], alpha=8, out=out[1])
    return on_grid(out)


def _refined(x: torch.Tensor, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return a and c of the fit (2, G, 1, n); t and u are overwritten."""
    part = _START
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


def check_weights(w: torch.Tensor) -> None:
    """Check that 4 bits can store float32 weights.

    Raises:
        CheckpointError: a weight is not finite, or too large.
    """
    if not w.numel():
        return
    largest = max(-w.amin().item(), w.amax().item())
    if not math.isfinite(largest):
        raise CheckpointError("expected finite weights, got inf or nan")
    if largest > 7 * LARGEST_SCALE:
        raise CheckpointError(
            f"expected weights up to {7 * LARGEST_SCALE:g} for 4 bits, got {largest:g}; use int8"
        )
