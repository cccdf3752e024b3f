"""How much memory one rank needs, foretold from the shapes alone.

Axes: T tokens of a step, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tpirt.config import ModelConfig
from tpirt.ops.nn import MASK_ELEMENTS
from tpirt.sharding.blocks import rank_blocks
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import Plan, Shard
from tpirt.weights.layout import file_bytes
from tpirt.weights.reader import buffer_bytes

DEFAULT_CHUNK_TOKENS = 512
_MIN_CHUNK_TOKENS = 16

# Resident memory of a peer before it holds anything of a model: Python, torch, gRPC (measured).
PROCESS_BYTES = 270 << 20

# What a running process takes beyond what is counted: allocator slack, thread stacks, gRPC.
SLACK_BYTES = 32 << 20


def activation_bytes(config: ModelConfig, shard: Shard, world_size: int, tokens: int) -> int:
    """Most bytes of a step of ``tokens`` tokens on one rank, frames on the wire included."""
    hidden = 4 * tokens * config.hidden_size
    heads = shard.q_heads.size + 2 * shard.kv_heads.size
    qkv = 4 * tokens * heads * config.head_dim
    mlp = 4 * tokens * shard.columns.size
    mask = 5 * min(tokens * config.context_length, MASK_ELEMENTS) if tokens > 1 else 0
    logits = 8 * config.vocab_size if shard.first else 0
    senders = world_size - 1 if shard.first else 1
    return (6 + 3 * senders) * hidden + 4 * qkv + 4 * mlp + mask + logits


def logits_tokens(config: ModelConfig, shard: Shard, world_size: int, tokens: int) -> int:
    """How many tokens' logits rank 0 can hold in what a step of ``tokens`` tokens takes.

    Each takes two rows of the vocabulary in float32: its logits, and what they are made of or
    what is made of them.
    """
    room = activation_bytes(config, shard, world_size, tokens)
    return max(1, min(tokens, room // (8 * config.vocab_size)))


def kv_bytes(config: ModelConfig, shard: Shard, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the keys and values of ``tokens`` positions on one rank."""
    per_layer = 2 * shard.kv_heads.size * config.head_dim * dtype.itemsize
    return config.num_hidden_layers * per_layer * tokens


def choose_chunk_tokens(
    config: ModelConfig, shards: tuple[Shard, ...], memory_bytes: int | None
) -> int:
    """Choose how many tokens a prefill step takes at most.

    Without a memory bound the default; otherwise halved until a step's activations take at most
    a quarter of the bound on the neediest rank: every chunk of a prompt streams the weights once
    more, and what a chunk takes is the weights' again while tokens are decoded.
    """
    tokens = DEFAULT_CHUNK_TOKENS
    if memory_bytes is None:
        return tokens

    def need(tokens: int) -> int:
        return max(activation_bytes(config, shard, len(shards), tokens) for shard in shards)

    while tokens > _MIN_CHUNK_TOKENS and need(tokens) > memory_bytes // 4:
        tokens //= 2
    return tokens


@dataclass(frozen=True)
class RankPlan:
    """What one rank will hold and need; a block's bytes are those of its file in memory."""

    rank: int
    shard: Shard
    form: WeightFormat
    block_bytes: tuple[int, ...]  # in the order of use
    kv_token_bytes: int
    activation_bytes: int

    @property
    def weights_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(self.block_bytes)


def plan_rank(
    config: ModelConfig, plan: Plan, rank: int, form: WeightFormat, chunk_tokens: int
) -> RankPlan:
    """Foretell one rank's memory from the shapes alone."""
    shard = plan.shards[rank]
    blocks = rank_blocks(config, shard, form)
    return RankPlan(
        rank=rank,
        shard=shard,
        form=form,
        block_bytes=tuple(buffer_bytes(file_bytes(block)) for block in blocks),
        kv_token_bytes=kv_bytes(config, shard, form.dtype, 1),
        activation_bytes=activation_bytes(config, shard, plan.world_size, chunk_tokens),
    )
