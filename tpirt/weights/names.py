"""Names and shapes of the checkpoint tensors of a decoder, from the sharding table.

Canonical names carry the ``model.`` prefix of the causal-LM classes; a checkpoint of the base
model has none (``Checkpoint.source_name`` maps). Axes: V vocabulary, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from tpirt.config import ModelConfig
from tpirt.sharding.blocks import layer_blocks
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import make_partition

PREFIX = "model."
EMBEDDING = "embed_tokens.weight"
FINAL_NORM = "norm.weight"
LM_HEAD = "lm_head.weight"

_MODEL_PART = re.compile(r"(layers\.\d+|embed_tokens|norm|lm_head)\.")
# Old checkpoints contain buffers that the model computes.
_HARMLESS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of the model by canonical name.

    They follow from the sharding table for a single rank, which holds the whole model. Without
    ``lm_head.weight`` if embeddings are tied.
    """
    expected: dict[str, tuple[int, ...]] = {
        canonical_name(EMBEDDING): head_shape(config),
        canonical_name(FINAL_NORM): (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        expected[LM_HEAD] = head_shape(config)
    (whole,) = make_partition(config, 1).shards
    for block in layer_blocks(config, whole, WeightFormat(torch.float32)):
        for tensor in block.tensors:
            for piece in tensor.pieces:
                name = canonical_name(piece.source)
                known = expected.get(name, piece.stops)
                expected[name] = tuple(map(max, known, piece.stops))
    return expected


def head_shape(config: ModelConfig) -> tuple[int, ...]:
    """Shape of the embedding and of the LM head: (V, H)."""
    return (config.vocab_size, config.hidden_size)


def canonical_name(name: str) -> str:
    """Add the ``model.`` prefix to an unprefixed name, except to ``lm_head.weight``."""
    return name if name.startswith("lm_head.") else PREFIX + name


def unprefixed_name(name: str) -> str:
    """Remove the ``model.`` prefix if there is one."""
    return name.removeprefix(PREFIX)


def is_model_part(name: str) -> bool:
    """Whether a tensor belongs to a module of the decoder and affects its result."""
    return bool(_MODEL_PART.match(unprefixed_name(name))) and not _HARMLESS.search(name)


def name_prefix(names: Iterable[str]) -> str:
    """Return the prefix of a checkpoint's decoder tensors: ``model.`` or nothing."""
    return PREFIX if any(n.startswith(PREFIX) and is_model_part(n) for n in names) else ""
