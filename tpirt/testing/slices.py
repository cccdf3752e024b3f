"""Slices of artificial blocks, for tests of readers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash

from tpirt.config import ModelConfig
from tpirt.ops.buffers import tensor_bytes
from tpirt.sharding.blocks import Block, StoredTensor
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import make_partition
from tpirt.weights.layout import block_header
from tpirt.weights.manifest import BlockFile, Manifest, SliceSpec
from tpirt.weights.store import StoredSlice

TINY = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 16,
    }
)


def counting_slice(folder: Path, counts: Sequence[int]) -> tuple[StoredSlice, list[Block]]:
    """Write a slice whose block ``i``, named ``block<i>``, has ``counts[i]`` floats ``i``."""
    blocks = [
        Block(f"block{i}", (StoredTensor("t", (count,), torch.float32, ()),))
        for i, count in enumerate(counts)
    ]
    spec = SliceSpec(
        "f" * 32, "test", TINY, WeightFormat(torch.float32), make_partition(TINY, 1).shards[0]
    )
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index, (block, count) in enumerate(zip(blocks, counts, strict=True)):
        content = block_header(block) + bytes(tensor_bytes(torch.full((count,), float(index))))
        files.append(BlockFile.of(block, b"", xxhash.xxh3_128_hexdigest(content)))
        (folder / files[-1].file).write_bytes(content)
    return StoredSlice(folder, Manifest(spec, tuple(files))), blocks
