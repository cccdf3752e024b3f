"""Slices of one plan made of another's units: the same bytes as cut from the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.support.nightly import examples
from tpirt.cluster.provision import lacking_units, plan_order, write_slice
from tpirt.cluster.slice_maker import SliceMaker
from tpirt.config import ModelConfig
from tpirt.ops.quant import QuantSpec
from tpirt.sharding import blocks as sharding
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import Partition, make_partition
from tpirt.sharding.units import block_units, most_units
from tpirt.testing.models import make_model
from tpirt.types import ignore_progress
from tpirt.weights.checkpoint import Checkpoint
from tpirt.weights.layout import view_weights
from tpirt.weights.manifest import NO_DIGEST, SliceSpec
from tpirt.weights.slicer import slice_bytes
from tpirt.weights.store import SliceStore, StoredSlice
from tpirt.weights.unit_bytes import BlockUnits, unit_nbytes
from tpirt.weights.writer import SliceWriter

# Without shrinking: it would take minutes, and examples are small.
PHASES = [Phase.explicit, Phase.generate]
FORMATS = st.builds(
    WeightFormat,
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([QuantSpec.parse(text) for text in ("none", "int8", "int4")]),
)


@dataclass(frozen=True)
class Opened:
    checkpoint: Checkpoint
    config: ModelConfig
    head: str


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Opened]]:
    """Biases, tied embeddings, head norms; sizes that are multiples of nothing much."""
    shapes: list[tuple[str, dict[str, Any]]] = [
        ("llama", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 328}),
        ("qwen3", {"head_dim": 24, "intermediate_size": 512, "hidden_size": 72}),
        ("qwen2", {"intermediate_size": 1024, "tie_word_embeddings": True}),
    ]
    opened = []
    for family, sizes in shapes:
        path = make_model(tmp_path_factory.mktemp("model"), family, **sizes)
        checkpoint, config = Checkpoint.open(path), ModelConfig.from_dir(path)
        head = "lm_head.weight"
        if head not in checkpoint.tensors:
            head = "model.embed_tokens.weight"
        opened.append(Opened(checkpoint, config, head))
    yield opened
    for each in opened:
        each.checkpoint.close()


def some_plan(data: st.DataObject, config: ModelConfig, name: str) -> Partition:
    world = data.draw(st.integers(1, min(5, config.num_attention_heads)), f"{name} world")
    shares = st.lists(st.sampled_from([1.0, 2.0, 3.5]), min_size=world, max_size=world)
    return make_partition(config, world, data.draw(st.none() | shares, f"{name} ratio"))


def cut_directly(opened: Opened, spec: SliceSpec) -> list[bytes]:
    pieces: dict[int, bytearray] = {}
    for index, _, piece in slice_bytes(opened.checkpoint, opened.head, spec.blocks):
        pieces.setdefault(index, bytearray()).extend(piece)
    return [bytes(pieces[index]) for index in range(len(spec.blocks))]


def content(stored: StoredSlice) -> list[bytes]:
    return [stored.block_path(i).read_bytes() for i in range(len(stored.manifest.blocks))]


@given(data=st.data(), form=FORMATS)
@settings(max_examples=examples(15, 30), phases=PHASES)
def test_another_plans_slices_are_made_of_the_units_at_hand(
    models: list[Opened], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, form: Any
) -> None:
    opened = data.draw(st.sampled_from(models), "model")
    first, second = (some_plan(data, opened.config, name) for name in ("first", "second"))
    piece_bytes = data.draw(st.sampled_from([4000, 40_000, 16 << 20]), "piece_bytes")
    root = tmp_path_factory.mktemp("store")
    master, worker = SliceStore(root / "master"), SliceStore(root / "worker")
    rank = data.draw(st.integers(0, second.world_size - 1), "rank")
    shard = second.shards[rank]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "_MLP_PIECE_BYTES", piece_bytes)
        old = SliceMaker(opened.checkpoint, opened.config, form)
        new = SliceMaker(opened.checkpoint, opened.config, form)
        spec = new.spec(shard)
        held_keys = set()
        for old_rank, old_shard in enumerate(first.shards):
            if data.draw(st.booleans(), f"rank {old_rank} is here"):
                write_slice(old, first, old_rank, worker, ignore_progress)
                held_keys |= {unit.key for _, unit in old.spec(old_shard).places}
                master.remember(old.manifest(old_shard))
        known = master.known(spec)
        order = plan_order(new, shard, worker.inventory(spec, known), known, ignore_progress)
        lacking = [n for n, (_, unit) in enumerate(spec.places) if unit.key not in held_keys]
        assert order.lacking == lacking
        with SliceWriter(worker, spec, order.kept) as writer:
            assert writer.lacking == lacking
            sent = []
            for number, unit in lacking_units(new, shard, order, master):
                assert len(unit) == spec.unit_bytes(number)
                sent.append(number)
                for offset in range(0, len(unit), 1000):
                    writer.write(number, offset, unit[offset : offset + 1000])
            assert sent == lacking
            stored = writer.commit()
        assert content(stored) == cut_directly(opened, spec)
        assert stored.manifest.digests == order.digests
        found = worker.find(stored.manifest.slice_id)
        assert found is not None
        assert found.manifest.slice_id == stored.manifest.slice_id
        found.verify()


@given(data=st.data(), form=FORMATS)
@settings(max_examples=30, phases=PHASES)
def test_units_are_a_block_taken_to_pieces(
    models: list[Opened], data: st.DataObject, form: WeightFormat
) -> None:
    opened = data.draw(st.sampled_from(models), "model")
    plan = some_plan(data, opened.config, "plan")
    shard = plan.shards[data.draw(st.integers(0, plan.world_size - 1), "rank")]
    spec = SliceSpec("f" * 32, "m", opened.config, form, shard)
    index = data.draw(st.integers(0, len(spec.blocks) - 1), "block")
    block, units = spec.blocks[index], spec.units[index]
    raw = cut_directly(opened, spec)[index]
    data_bytes = raw[len(raw) - block.nbytes :]
    source = BlockUnits(block, torch.frombuffer(bytearray(data_bytes), dtype=torch.uint8))
    empty = torch.zeros(block.nbytes, dtype=torch.uint8)
    target = BlockUnits(block, empty)
    for unit in data.draw(st.permutations(units), "order"):
        piece = source.get(unit)
        assert len(piece) == unit_nbytes(block, unit)
        target.put(unit, piece)
    target.flush()
    assert bytes(empty.numpy()) == data_bytes
    assert len({unit.key for unit in units}) == len(units)
    assert len(spec.places) <= most_units(opened.config)
    assert view_weights(block, empty, 0).keys() == {t.name for t in block.tensors}
    assert block_units(opened.config, block) == units


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_second_world_size_lacks_only_what_nobody_had(quantize: str) -> None:
    """Of 8 layers of an 8 B model, from 2 to 3 ranks: rank 1's columns are half there."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8}
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
            **sizes,
        }
    )
    form = WeightFormat(torch.bfloat16, QuantSpec.parse(quantize))
    old, new = make_partition(config, 2), make_partition(config, 3)

    def keys(plan: Partition, rank: int) -> dict[str, int]:
        spec = SliceSpec("f" * 32, "m", config, form, plan.shards[rank])
        return {unit.key: spec.unit_bytes(n) for n, (_, unit) in enumerate(spec.places)}

    for rank in (0, 1):
        held, wanted = keys(old, rank), keys(new, rank)
        lacking = sum(size for key, size in wanted.items() if key not in held)
        share = lacking / sum(wanted.values())
        # In 8 bits, a row's scale is that of all its columns here: output projections move whole.
        # With int4 the first layer's down_proj is in 8 bits.
        most = {"none": (0.0, 0.52), "int8": (0.35, 0.75), "int4": (0.02, 0.52)}[quantize]
        assert share < most[rank] + 0.01
    assert NO_DIGEST not in keys(old, 0)
