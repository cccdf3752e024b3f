"""Plans by example, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tpirt.config import ModelConfig
from tpirt.errors import PlanError
from tpirt.sharding.partition import Span, apportion, make_partition


def config(**changes: Any) -> ModelConfig:
    sizes = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 1024,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 10,
    }
    return ModelConfig.from_hf({**sizes, **changes})


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (8, [1, 1, 1, 1], [2, 2, 2, 2]),
        (8, [1, 1, 1], [3, 3, 2]),  # ties go to the lower rank
        (10, [3, 1], [8, 2]),
        (10, [1, 3], [3, 7]),
        (4, [100, 1, 1, 1], [1, 1, 1, 1]),  # nobody is left without
        (5, [100, 1, 1, 1], [2, 1, 1, 1]),
        (7, [0.1, 0.2, 0.4], [1, 2, 4]),
        (1, [5], [1]),
        (6, [1e-320, 1e-320], [3, 3]),
        (6, [1e308, 1e308], [3, 3]),
        (6, [1e-300, 1e300], [1, 5]),
    ],
)
def test_apportion(total: int, weights: Sequence[float], expected: list[int]) -> None:
    assert apportion(total, weights) == expected


@pytest.mark.parametrize(
    ("world", "ratio", "q", "kv"),
    [
        (1, None, [8], [(0, 4)]),
        (2, None, [4, 4], [(0, 2), (2, 4)]),
        (3, None, [4, 2, 2], [(0, 2), (2, 3), (3, 4)]),
        (2, [3, 1], [6, 2], [(0, 3), (3, 4)]),
        # More ranks than KV heads: query heads one by one, KV heads copied where shared.
        (5, None, [2, 2, 2, 1, 1], [(0, 1), (1, 2), (2, 3), (3, 4), (3, 4)]),
        (5, [4, 1, 1, 1, 1], [4, 1, 1, 1, 1], [(0, 2), (2, 3), (2, 3), (3, 4), (3, 4)]),
        (8, None, [1] * 8, [(i // 2, i // 2 + 1) for i in range(8)]),
    ],
)
def test_heads(
    world: int, ratio: list[float] | None, q: list[int], kv: list[tuple[int, int]]
) -> None:
    shards = make_partition(config(), world, ratio).shards
    assert [shard.q_heads.size for shard in shards] == q
    assert [tuple(shard.kv_heads) for shard in shards] == kv
    assert [shard.first for shard in shards] == [True] + [False] * (world - 1)


@pytest.mark.parametrize(
    ("intermediate", "world", "unit"),
    [(1024, 1, 128), (1024, 2, 64), (1024, 8, 16), (11008, 3, 128), (50, 3, 1), (8960, 2, 128)],
)
def test_columns_are_aligned_where_balance_allows(intermediate: int, world: int, unit: int) -> None:
    shards = make_partition(config(intermediate_size=intermediate), world).shards
    sizes = [shard.columns.size for shard in shards]
    assert sum(sizes) == intermediate
    assert all(size % unit == 0 for size in sizes)
    assert max(sizes) - min(sizes) <= unit


@pytest.mark.parametrize(
    ("world", "ratio", "message"),
    [
        (0, None, "1 to 8 ranks"),
        (-1, None, "1 to 8 ranks"),
        (9, None, "world size 9: this model can be split over 1 to 8 ranks"),
        (2, [1.0], "expected 2 numbers, one per rank, got 1"),
        (2, [1.0, 2.0, 3.0], "expected 2 numbers"),
        (2, [1.0, 0.0], "rank 1 has 0"),
        (2, [-1.0, 1.0], "rank 0 has -1"),
        (2, [float("nan"), 1.0], "rank 0 has nan"),
        (2, [1.0, float("inf")], "rank 1 has inf"),
    ],
)
def test_refusals(world: int, ratio: list[float] | None, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_partition(config(), world, ratio)


def test_spans() -> None:
    assert Span(2, 5).size == 3
    assert Span(2, 5).scaled(4) == Span(8, 20)
