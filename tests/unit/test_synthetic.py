"""Synthetic models: the same bytes from the same seed, tame numbers, refusals before writing."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.nightly import nightly_but
from tpirt.cluster import synth
from tpirt.cluster.synth import make_synthetic
from tpirt.config import ModelConfig
from tpirt.errors import CheckpointError, ConfigError, StoreError, TpirtError
from tpirt.ops.quant import QuantSpec
from tpirt.ops.quant_linear import QuantMatrix, dequantize
from tpirt.ops.tiles import unpack_groups
from tpirt.sharding.blocks import rank_blocks
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import make_partition
from tpirt.testing.cluster import memory_engine
from tpirt.text import Tokenizer
from tpirt.types import Progress, ignore_progress
from tpirt.weights.layout import view_weights
from tpirt.weights.store import SliceStore, StoredSlice
from tpirt.weights.synthetic import SyntheticCheckpoint

# 40 inputs per head row and 100 columns: neither is a multiple of a group or of 16.
SHAPE: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 40,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "rope_theta": 10_000.0,
}
PROMPT = list(b"abcdefgh")
FORMS = ("none", "int8", "int4")
Usage = namedtuple("Usage", "total free")


def make(
    out: Path,
    *,
    quantize: str = "int4",
    seed: int = 0,
    world_size: int = 2,
    ratio: list[float] | None = None,
    shape: Mapping[str, Any] = SHAPE,
    dtype: torch.dtype = torch.float32,
) -> list[StoredSlice]:
    plan = make_partition(ModelConfig.from_hf(shape), world_size, ratio)
    form = WeightFormat(dtype, QuantSpec.parse(quantize))
    return make_synthetic(out, shape, seed, plan, form, ignore_progress)


def content(slices: list[StoredSlice]) -> list[bytes]:
    return [(s.path / b.file).read_bytes() for s in slices for b in s.manifest.blocks]


@pytest.mark.parametrize("quantize", FORMS)
def test_bytes_follow_from_the_seed(
    tmp_path: Path, quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = content(make(tmp_path / "a", quantize=quantize, seed=7))
    monkeypatch.setattr(synth, "_WRITERS", 1)
    again = content(make(tmp_path / "b", quantize=quantize, seed=7))
    other = content(make(tmp_path / "c", quantize=quantize, seed=8))
    assert again == first
    assert all(one != two for one, two in zip(first, other, strict=True))
    assert len(set(first)) == len(first)  # no two blocks, no two ranks alike


@pytest.mark.parametrize("quantize", FORMS)
def test_weights_are_spread_around_zero_and_padding_is_nothing(
    tmp_path: Path, quantize: str
) -> None:
    (stored,) = make(tmp_path, quantize=quantize, world_size=1)
    config = ModelConfig.from_hf(SHAPE)
    blocks = rank_blocks(config, stored.manifest.shard, stored.manifest.form)
    for index, block in enumerate(blocks):
        raw = stored.block_path(index).read_bytes()
        buffer = torch.frombuffer(bytearray(raw[len(raw) - block.nbytes :]), dtype=torch.uint8)
        aligned = torch.zeros(block.nbytes + 64, dtype=torch.uint8)
        start = -aligned.data_ptr() % 64
        aligned = aligned[start : start + block.nbytes].copy_(buffer)
        for name, weight in view_weights(block, aligned, 0).items():
            if isinstance(weight, QuantMatrix):
                scales = weight.scales
                by_row = scales if scales.ndim == 1 else unpack_groups(scales)
                assert by_row[: weight.out_features].all()
                assert not by_row[weight.out_features :].any()
                weight = dequantize(weight)
            if "norm" in name:
                assert (weight == 1).all()
            else:
                # Five standard errors; a word of 4-bit weights holds their scale to 1/32.
                error = 5 * weight.numel() ** -0.5
                assert abs(weight.float().mean()) < error * 0.02
                assert weight.float().std() == pytest.approx(0.02, rel=1 / 32 + error / 2)


@pytest.mark.parametrize("quantize", nightly_but({"int4:32"}, FORMS))
async def test_eighty_layers_keep_their_numbers(tmp_path: Path, quantize: str) -> None:
    shape = {**SHAPE, "num_hidden_layers": 80, "hidden_size": 256, "head_dim": 64}
    make(tmp_path, quantize=quantize, shape=shape, dtype=torch.bfloat16)
    store = tmp_path / "slices"
    async with memory_engine(
        tmp_path, 2, quantize=quantize, dtype="bfloat16", store=store
    ) as engine:
        logits = await engine.logits(PROMPT)
    assert logits.isfinite().all()
    assert 0.05 < logits.std() < 10


@pytest.mark.parametrize(("world_size", "ratio"), [(4, None), (3, [3.0, 2.0, 1.0])])
async def test_more_ranks_than_kv_heads_and_uneven_ones(
    tmp_path: Path, world_size: int, ratio: list[float] | None
) -> None:
    slices = make(tmp_path, world_size=world_size, ratio=ratio)
    assert len(slices) == world_size
    async with memory_engine(
        tmp_path, world_size, ratio=ratio, quantize="int4", store=tmp_path / "slices"
    ) as engine:
        assert (await engine.logits(PROMPT)).isfinite().all()


def test_embedding_rows_follow_from_seed_and_row(tmp_path: Path) -> None:
    config = ModelConfig.from_hf(SHAPE)
    rows = SyntheticCheckpoint(tmp_path, config, 3).gather_rows("e", [5, 6, 5])
    assert rows.shape == (3, 40)
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows, SyntheticCheckpoint(tmp_path, config, 4).gather_rows("e", [5] * 3))


def test_tokenizer_encodes_any_text_and_decodes_any_id(tmp_path: Path) -> None:
    make(tmp_path)
    tokenizer = Tokenizer.from_dir(tmp_path)
    text = "Zwölf 🦊\n"
    ids = tokenizer.encode(text)
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == SHAPE["vocab_size"]
    words = [tokenizer.detokenizer().push(i) for i in range(258, 300)]
    assert all(word.startswith(" ") and word[1:].isalpha() for word in words)
    assert len(set(words)) == len(words)


def test_what_is_whole_stays_and_what_is_missing_or_damaged_is_made(tmp_path: Path) -> None:
    slices = make(tmp_path, world_size=3)
    before = content(slices)
    SliceStore(tmp_path / "slices").remove(slices[0])
    damaged = slices[1].block_path(2)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    kept = slices[2].block_path(0).stat().st_mtime_ns
    again = make(tmp_path, world_size=3)
    assert content(again) == before
    assert again[2].block_path(0).stat().st_mtime_ns == kept
    make(tmp_path, world_size=1)  # another split beside it
    assert len(SliceStore(tmp_path / "slices").slices()) == 4


def test_too_small_a_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2000, 1000))
    with pytest.raises(StoreError, match=r"need [\d,]+ bytes, the disk has 1,000 free"):
        make(tmp_path / "deep" / "model")
    assert list(tmp_path.iterdir()) == []


def test_stopped_by_an_error_it_leaves_whole_slices_only_and_goes_on(tmp_path: Path) -> None:
    plan = make_partition(ModelConfig.from_hf(SHAPE), 4)
    form = WeightFormat(torch.float32)

    def fail(progress: Progress) -> None:
        if progress.done > progress.total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_synthetic(tmp_path, SHAPE, 0, plan, form, fail)
    assert list((tmp_path / "slices").glob(".partial-*")) == []
    assert len(make_synthetic(tmp_path, SHAPE, 0, plan, form, ignore_progress)) == 4


def test_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (real / "config.json").write_text(json.dumps(dict(SHAPE)))
    made = tmp_path / "made"
    make(made)
    file = tmp_path / "file"
    file.touch()
    refused: list[tuple[Path, dict[str, Any], str]] = [
        (real, {}, "not synthetic"),
        (made, {"seed": 1}, "another seed"),
        (made, {"shape": {**SHAPE, "num_hidden_layers": 3}}, "another shape"),
        (file, {}, "expected a folder"),
    ]
    for folder, changes, says in refused:
        with pytest.raises((CheckpointError, StoreError), match=says) as error:
            make(folder, **changes)
        assert str(folder) in str(error.value)
    assert [path.name for path in real.iterdir()] == ["config.json"]


def test_too_small_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size 100"):
        make(tmp_path, shape={**SHAPE, "vocab_size": 100})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seed": -1}', '{"seed": "x"}'])
def test_broken_marker_is_named(tmp_path: Path, text: str) -> None:
    make(tmp_path)
    marker = tmp_path / "synthetic.json"
    marker.write_text(text)
    with pytest.raises(TpirtError, match=r"synthetic\.json"):
        SyntheticCheckpoint.open(tmp_path)
