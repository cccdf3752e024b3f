"""Every plan covers the model exactly once; every slice puts the checkpoint together again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from tests.support.nightly import examples
from tpirt.config import ModelConfig
from tpirt.ops.quant import QuantSpec
from tpirt.sharding import blocks as sharding
from tpirt.sharding.blocks import mlp_pieces, rank_blocks
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import Partition, Shard, Span, apportion, make_partition
from tpirt.testing.models import make_model
from tpirt.weights.checkpoint import Checkpoint, resolve_tied
from tpirt.weights.layout import block_header, file_bytes, view_weights
from tpirt.weights.names import expected_tensors
from tpirt.weights.slicer import slice_bytes

SHARES = st.floats(1e-3, 1e3)
SMALL = {
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 8,
}


@st.composite
def configs(draw: st.DrawFn, most_groups: int = 9) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, most_groups))
    return {
        "hidden_size": draw(st.integers(1, 40)),
        "intermediate_size": draw(st.one_of(st.integers(1, 300), st.sampled_from([1024, 11008]))),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": kv_heads * draw(st.integers(1, 8)),
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 8)),
        "vocab_size": draw(st.integers(1, 50)),
    }


def read(sizes: dict[str, Any], family: str = "llama", **more: Any) -> ModelConfig:
    return ModelConfig.from_hf({"model_type": family, **sizes, **more})


@given(total=st.integers(1, 5000), weights=st.lists(SHARES, min_size=1, max_size=12))
def test_apportion_sums_and_is_close_to_proportional(total: int, weights: list[float]) -> None:
    if total < len(weights):
        total = len(weights)
    counts = apportion(total, weights)
    quotas = [total * weight / sum(weights) for weight in weights]
    assert sum(counts) == total
    assert min(counts) >= 1
    assert counts == apportion(total, weights)
    if min(quotas) >= 1:  # otherwise the minimum takes from others
        for count, quota in zip(counts, quotas, strict=True):
            assert math.floor(quota) - 1e-6 <= count <= math.ceil(quota) + 1e-6
    else:
        for count, quota in zip(counts, quotas, strict=True):
            assert count <= max(1, math.ceil(quota + 1e-6))


@given(count=st.integers(1, 400), ranks=st.integers(1, 40))
def test_even_split_differs_by_one_at_most(count: int, ranks: int) -> None:
    counts = apportion(max(count, ranks), [1.0] * ranks)
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


@given(weights=st.lists(SHARES, min_size=2, max_size=8), total=st.integers(8, 300))
def test_a_larger_share_never_gets_less(weights: list[float], total: int) -> None:
    counts = apportion(total, weights)
    for a, first in zip(weights, counts, strict=True):
        for b, second in zip(weights, counts, strict=True):
            assert a <= b or first >= second


def covers(spans: Sequence[Span], total: int) -> bool:
    """Spans in order, none empty, from 0 to ``total`` without gap or overlap."""
    starts = [span.start for span in spans]
    stops = [span.stop for span in spans]
    return starts == [0, *stops[:-1]] and stops[-1] == total and all(s.size > 0 for s in spans)


@given(sizes=configs(), data=st.data())
@settings(max_examples=300)
def test_plans_cover_exactly_once(sizes: dict[str, Any], data: st.DataObject) -> None:
    config = read(sizes)
    most = min(config.num_attention_heads, config.intermediate_size)
    world = data.draw(st.integers(1, most), "world_size")
    shares = st.none() | st.lists(SHARES, min_size=world, max_size=world)
    plan = make_partition(config, world, data.draw(shares, "ratio"))
    assert plan.world_size == world
    assert covers([shard.q_heads for shard in plan.shards], config.num_attention_heads)
    assert covers([shard.columns for shard in plan.shards], config.intermediate_size)
    group = config.q_heads_per_kv
    for rank, shard in enumerate(plan.shards):
        assert shard.first == (rank == 0)
        readers = {head // group for head in range(*shard.q_heads)}
        assert readers == set(range(*shard.kv_heads))  # all that it needs and nothing else
    if world <= config.num_key_value_heads:
        assert covers([shard.kv_heads for shard in plan.shards], config.num_key_value_heads)


# -- slices ------------------------------------------------------------------------------------

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
}


@given(
    sizes=configs(most_groups=4),
    family=st.sampled_from(sorted(FAMILIES)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shards=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=examples(20, 40))
def test_slices_put_together_are_the_checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: dict[str, Any],
    family: str,
    dtype: torch.dtype,
    shards: int,
    data: st.DataObject,
) -> None:
    options = {**sizes, **FAMILIES[family]}
    path = make_model(
        tmp_path_factory.mktemp("model"), family, dtype=dtype, shards=shards, **options
    )
    config = ModelConfig.from_dir(path)
    most = min(config.num_attention_heads, config.intermediate_size)
    world = data.draw(st.integers(1, most), "world_size")
    shares = st.none() | st.lists(SHARES, min_size=world, max_size=world)
    plan = make_partition(config, world, data.draw(shares, "ratio"))
    piece_bytes = data.draw(st.sampled_from([1, 20_000, 16 << 20]), "piece_bytes")
    with Checkpoint.open(path) as checkpoint, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "_MLP_PIECE_BYTES", piece_bytes)
        rebuilt = put_together(checkpoint, config, plan, dtype)
        for name in expected_tensors(config):
            if name != "model.embed_tokens.weight" or config.tie_word_embeddings:
                assert torch.equal(rebuilt[name], checkpoint.read(name)), name


def put_together(
    checkpoint: Checkpoint, config: ModelConfig, plan: Partition, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Lay the pieces of all ranks' block files where they came from; all overlaps must agree."""
    _, head = resolve_tied(checkpoint, config)
    whole: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for shard in plan.shards:
        for name, at, values in pieces(checkpoint, config, shard, dtype, head):
            info = checkpoint.tensors[name]
            target = whole.setdefault(name, torch.zeros(info.shape, dtype=info.dtype))
            known = seen.setdefault(name, torch.zeros(info.shape, dtype=torch.bool))
            values = values.to(info.dtype)
            assert torch.equal(target[at][known[at]], values[known[at]]), name
            target[at], known[at] = values, True
    assert all(known.all() for known in seen.values())
    return whole


def pieces(
    checkpoint: Checkpoint, config: ModelConfig, shard: Shard, dtype: torch.dtype, head: str
) -> Any:
    for block in rank_blocks(config, shard, WeightFormat(dtype)):
        content = b"".join(data for _, _, data in slice_bytes(checkpoint, head, [block]))
        assert len(content) == file_bytes(block)
        start = len(block_header(block))
        assert len(content) - start == block.nbytes
        buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        views = view_weights(block, buffer, start)
        for tensor in block.tensors:
            row = 0
            for piece in tensor.pieces:
                name = checkpoint.source_name(piece.source, head)
                values = views[tensor.name][row : row + piece.rows.size]
                row += piece.rows.size
                at = (slice(*piece.rows),)
                yield name, at if piece.columns is None else (*at, slice(*piece.columns)), values


def test_row_parallel_biases_are_held_once() -> None:
    config = read(
        {
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "vocab_size": 10,
        },
        attention_bias=True,
        mlp_bias=True,
    )
    for rank, shard in enumerate(make_partition(config, 3).shards):
        held = {
            t.name
            for b in rank_blocks(config, shard, WeightFormat(torch.float32))
            for t in b.tensors
        }
        assert ("o_proj.bias" in held) == ("down_proj.bias" in held) == (rank == 0)
        assert {"qk_proj.bias", "v_proj.bias", "gate_up_proj.bias"} <= held


@given(sizes=configs(), data=st.data())
def test_head_blocks_are_no_larger_than_layer_blocks(
    sizes: dict[str, Any], data: st.DataObject
) -> None:
    config = read({**sizes, "vocab_size": data.draw(st.integers(1, 5000))})
    blocks = rank_blocks(config, make_partition(config, 1).shards[0], WeightFormat(torch.float32))
    layers = blocks[: 2 * config.num_hidden_layers]
    head = blocks[len(layers) :]
    row_bytes = 4 * config.hidden_size
    # One row is the least that a block can be.
    limit = max(max(block.nbytes for block in layers), 2 * row_bytes)
    assert all(block.nbytes <= limit for block in head)
    assert sum(block.tensors[-1].shape[0] for block in head) == config.vocab_size


@given(
    columns=st.integers(1, 40_000),
    start=st.integers(0, 1000),
    hidden=st.sampled_from([64, 2048, 8192]),
    how=st.sampled_from(["none", "int8", "int4"]),
    layer=st.sampled_from([0, 1]),
)
def test_mlp_pieces_cover_the_columns(
    columns: int, start: int, hidden: int, how: str, layer: int
) -> None:
    config = read({**SMALL, "hidden_size": hidden, "intermediate_size": start + columns})
    shard = Shard(Span(0, 1), Span(0, 1), Span(start, start + columns), first=False)
    form = WeightFormat(torch.bfloat16, QuantSpec.parse(how))
    pieces = mlp_pieces(config, shard, form, layer)
    assert covers([Span(p.start - start, p.stop - start) for p in pieces], columns)
    assert all((piece.start - start) % 128 == 0 for piece in pieces)
    widest = max(piece.size for piece in pieces)
    least = min(piece.size for piece in pieces)
    assert widest - least < 256
    bits = {"none": 16, "int8": 8, "int4": 4.5 if layer else (2 * 4.5 + 8) / 3}[how]
    assert len(pieces) == 1 or (widest - 256) * 3 * hidden * bits / 8 <= 16 << 20


def test_block_files_are_safetensors_files(tmp_path: Path) -> None:
    path = make_model(tmp_path, "qwen3")
    config = ModelConfig.from_dir(path)
    with Checkpoint.open(path) as checkpoint:
        _, head = resolve_tied(checkpoint, config)
        for block in rank_blocks(
            config, make_partition(config, 3).shards[0], WeightFormat(torch.bfloat16)
        ):
            header = block_header(block)
            assert len(header) % 4096 == 0
            content = b"".join(data for _, _, data in slice_bytes(checkpoint, head, [block]))
            buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            views = view_weights(block, buffer, len(header))
            loaded = load(content)
            assert loaded.keys() == views.keys()
            assert all(torch.equal(loaded[name], views[name]) for name in loaded)
