"""Partition arithmetic: attention heads and MLP columns over ranks, even or by ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tpirt.config import ModelConfig
from tpirt.errors import PlanError


class Span(NamedTuple):
    """The half-open range ``[start, stop)``."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def scaled(self, unit: int) -> Span:
        """The same range in elements, ``unit`` for each of ours."""
        return Span(self.start * unit, self.stop * unit)


@dataclass(frozen=True)
class Shard:
    """The part of the model on one rank: its heads and MLP columns.

    ``first`` marks rank 0, which also adds the row-parallel biases and has the LM head.
    """

    q_heads: Span
    kv_heads: Span
    columns: Span
    first: bool


@dataclass(frozen=True)
class Partition:
    """The shards of all ranks, by rank; together they cover the model exactly once.

    ``ratio`` is the requested ratio, None for an even split.
    """

    shards: tuple[Shard, ...]
    ratio: tuple[float, ...] | None = None

    @property
    def world_size(self) -> int:
        return len(self.shards)


def apportion(total: int, weights: Sequence[float], minimum: int = 1) -> list[int]:
    """Split ``total`` units in proportion to ``weights``, at least ``minimum`` each.

    Uses the largest remainder method; ties go to the lower rank, so the result is deterministic.
    """
    largest = max(weights)  # normalised, so that extreme weights do not overflow
    shares = [weight / largest for weight in weights]
    quotas = [total * share / sum(shares) for share in shares]
    counts = [max(minimum, int(quota)) for quota in quotas]
    ranks = range(len(counts))
    while sum(counts) < total:
        counts[max(ranks, key=lambda r: (quotas[r] - counts[r], -r))] += 1
    while sum(counts) > total:
        shrinkable = [r for r in ranks if counts[r] > minimum]
        counts[max(shrinkable, key=lambda r: (counts[r] - quotas[r], r))] -= 1
    return counts


def make_partition(
    config: ModelConfig, world_size: int, ratio: Sequence[float] | None = None
) -> Partition:
    """Decide each rank's heads and MLP columns.

    If there are at least as many KV heads as ranks, a KV head and its query heads stay on one
    rank. With more ranks than KV heads, query heads are distributed one by one, and each rank has
    a copy of the KV heads that its query heads read.

    Args:
        config: the model.
        world_size: number of ranks, 1 to ``num_attention_heads``.
        ratio: relative amount of work per rank; None for an even split.

    Raises:
        PlanError: the world size or the ratio does not fit the model.
    """
    weights = _check(config, world_size, ratio)
    q_spans = _split_heads(config, weights)
    unit = _column_unit(config.intermediate_size, world_size)
    columns = _spans(apportion(config.intermediate_size // unit, weights), unit)
    group = config.num_attention_heads // config.num_key_value_heads
    return Partition(
        tuple(
            Shard(q, Span(q.start // group, (q.stop - 1) // group + 1), c, first=rank == 0)
            for rank, (q, c) in enumerate(zip(q_spans, columns, strict=True))
        ),
        tuple(ratio) if ratio else None,
    )


def _check(config: ModelConfig, world_size: int, ratio: Sequence[float] | None) -> Sequence[float]:
    most = min(config.num_attention_heads, config.intermediate_size)
    if not 1 <= world_size <= most:
        raise PlanError(
            f"world size {world_size}: this model can be split over 1 to {most} ranks "
            f"({config.num_attention_heads} attention heads); use fewer peers"
        )
    if ratio is None:
        return [1.0] * world_size
    if len(ratio) != world_size:
        raise PlanError(
            f"ratio {','.join(f'{r:g}' for r in ratio)}: expected {world_size} numbers, "
            f"one per rank, got {len(ratio)}"
        )
    for rank, share in enumerate(ratio):
        if not 0 < share < float("inf"):
            raise PlanError(
                f"ratio: rank {rank} has {share:g}; every share must be a number above 0 "
                "(leave the peer out if it should hold nothing)"
            )
    return ratio


def _split_heads(config: ModelConfig, weights: Sequence[float]) -> list[Span]:
    groups = config.num_key_value_heads
    if len(weights) <= groups:
        return _spans(apportion(groups, weights), config.num_attention_heads // groups)
    return _spans(apportion(config.num_attention_heads, weights), 1)


def _column_unit(columns: int, world_size: int) -> int:
    # Aligned columns keep matrix kernels on their fast path. Every rank gets at least eight units,
    # so that the split stays balanced.
    for unit in (128, 64, 32, 16, 8):
        if columns % unit == 0 and columns // unit >= 8 * world_size:
            return unit
    return 1


def _spans(counts: Sequence[int], unit: int) -> list[Span]:
    spans, start = [], 0
    for count in counts:
        spans.append(Span(start * unit, (start + count) * unit))
        start += count
    return spans
