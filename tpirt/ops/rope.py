"""Rotary position embedding and its scalings, as in transformers' ``modeling_rope_utils``.

Axes: T tokens, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from tpirt.batch import Segment
from tpirt.config import ModelConfig, RopeConfig


def inverse_frequencies(config: ModelConfig, length: int) -> torch.Tensor:
    """Return the rotation frequencies, (D / 2,) float32.

    Args:
        config: the model.
        length: sequence length for ``dynamic`` scaling; ignored by the others.
    """
    rope, dim = config.rope, config.head_dim
    theta = rope.theta
    if rope.kind == "dynamic":
        theta = _dynamic_theta(config, max(length, config.max_position_embeddings))
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    frequencies = 1.0 / (theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _dynamic_theta(config: ModelConfig, length: int) -> float:
    # NTK-aware: https://www.reddit.com/r/LocalLLaMA/comments/14mrgpr
    rope, dim = config.rope, config.head_dim
    trained = config.max_position_embeddings
    stretch = rope.factor * length / trained - (rope.factor - 1)
    return float(rope.theta * stretch ** (dim / (dim - 2)))


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    trained = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / frequencies
    longest = trained / rope.low_freq_factor
    shortest = trained / rope.high_freq_factor
    smooth = (trained / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    scaled = torch.where(wavelength > longest, frequencies / rope.factor, blended)
    return torch.where(wavelength < shortest, frequencies, scaled)


class RotaryEmbedding:
    """Rotation angles for the rows of a batch."""

    def __init__(self, config: ModelConfig):
        self._config = config
        self._dynamic = config.rope.kind == "dynamic"
        self._frequencies = inverse_frequencies(config, 0)

    def tables(self, segments: Iterable[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and signed sin for the segments' rows in order, each (T, D) float32.

        The first half of sin is negated, so that :func:`rotate` need not negate.
        """
        angles = [self._angles(segment) for segment in segments]
        turn = angles[0] if len(angles) == 1 else torch.cat(angles)
        cos, sin = turn.cos(), turn.sin()
        return (
            torch.cat((cos, cos), dim=-1),
            torch.cat((-sin, sin), dim=-1),
        )

    def _angles(self, segment: Segment) -> torch.Tensor:
        positions = torch.arange(segment.position, segment.end, dtype=torch.float32)
        if segment.parents:
            positions = positions[segment.depths]
        if not self._dynamic:
            return torch.outer(positions, self._frequencies)
        lengths = [max(segment.rope_length, int(position) + 1) for position in positions]
        known = {length: inverse_frequencies(self._config, length) for length in set(lengths)}
        return positions[:, None] * torch.stack([known[length] for length in lengths])


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads ``x`` (heads, T, D) by their positions' angles, halves paired."""
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))
