"""The memory of one rank, computed from shapes.

:class:`MemoryBudget` is the only memory arithmetic in the program: the plan that is displayed, the
blocks that a rank keeps resident, the chunk size and the advice in error messages all come from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tpirt.config import ModelConfig
from tpirt.ops.buffers import round_up
from tpirt.ops.nn import MASK_ELEMENTS
from tpirt.sharding.blocks import rank_blocks
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import Shard
from tpirt.units import format_bytes
from tpirt.weights.layout import file_bytes
from tpirt.weights.reader import buffer_bytes
from tpirt.weights.stream_plan import StreamPlan, least_budget, plan_streaming

_CHUNKS = (512, 256, 128, 64, 32, 16)  # tokens of a step that are chosen from

# Resident memory of a process that holds nothing of a model: Python, torch, gRPC (measured).
PROCESS_BYTES = 270 << 20

# What a running process takes beyond what is counted: allocator slack, thread stacks, gRPC.
SLACK_BYTES = 32 << 20

# Advice on limits leaves room for a conversation of this many tokens, or of the whole context.
ADVISED_CONTEXT = 2048


def activation_bytes(config: ModelConfig, shard: Shard, world_size: int, tokens: int) -> int:
    """Most bytes that a step of ``tokens`` tokens takes on one rank, frames on links included."""
    hidden = 4 * tokens * config.hidden_size
    heads = shard.q_heads.size + 2 * shard.kv_heads.size
    qkv = 4 * tokens * heads * config.head_dim
    mlp = 4 * tokens * shard.columns.size
    mask = 5 * min(tokens * config.context_length, MASK_ELEMENTS) if tokens > 1 else 0
    logits = 8 * config.vocab_size if shard.first else 0
    senders = world_size - 1 if shard.first else 1
    return (6 + 3 * senders) * hidden + 4 * qkv + 4 * mlp + mask + logits


def logits_tokens(config: ModelConfig, shard: Shard, world_size: int, tokens: int) -> int:
    """How many tokens' logits rank 0 can hold in the memory of a step of ``tokens`` tokens.

    Each token takes two rows of the vocabulary in float32: its logits and one intermediate result.
    """
    room = activation_bytes(config, shard, world_size, tokens)
    return max(1, min(tokens, room // (8 * config.vocab_size)))


def kv_bytes(config: ModelConfig, shard: Shard, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the keys and values of ``tokens`` positions on one rank."""
    per_layer = 2 * shard.kv_heads.size * config.head_dim * dtype.itemsize
    return config.num_hidden_layers * per_layer * tokens


def format_limit(nbytes: int) -> str:
    """Write a memory limit as ``--memory`` takes it, rounded up to whole MiB."""
    return f"{-(-nbytes >> 20)}M"


@dataclass(frozen=True)
class Limits:
    """Bounds of one rank; None means no bound.

    Attributes:
        window_blocks: most weight blocks in memory.
        memory_bytes: most resident memory of the rank's whole process.
        chunk_tokens: most tokens of one step.
        trace_spans: most spans in each lane of a trace; 0 for no trace.
    """

    window_blocks: int | None
    memory_bytes: int | None
    chunk_tokens: int
    trace_spans: int = 0


@dataclass(frozen=True)
class MemoryBudget:
    """How one rank divides its memory limit: process, step, keys and values, weights.

    Attributes:
        config: the model.
        shard: the rank's part of it.
        world_size: number of ranks.
        form: how the rank keeps its weights.
        block_bytes: memory of each weight block, in the order of use.
        base_bytes: resident memory of the process before it holds anything of a model.
        limits: the rank's limits.
    """

    config: ModelConfig
    shard: Shard
    world_size: int
    form: WeightFormat
    block_bytes: tuple[int, ...]
    base_bytes: int
    limits: Limits

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        shard: Shard,
        world_size: int,
        form: WeightFormat,
        base_bytes: int,
        limits: Limits,
    ) -> MemoryBudget:
        """Make the budget of one rank; its block sizes follow from the shapes."""
        blocks = rank_blocks(config, shard, form)
        sizes = tuple(buffer_bytes(file_bytes(block)) for block in blocks)
        return cls(config, shard, world_size, form, sizes, base_bytes, limits)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weight blocks."""
        return sum(self.block_bytes)

    @property
    def process_bytes(self) -> int:
        """The part of the process itself."""
        return self.base_bytes + SLACK_BYTES

    def step_bytes(self, tokens: int | None = None) -> int:
        """The part of a step of ``tokens`` tokens; of the longest step when absent.

        Token counts are rounded up to powers of two, so that the streaming plan rarely changes.
        """
        longest = self.limits.chunk_tokens
        tokens = longest if tokens is None else min(1 << (tokens - 1).bit_length(), longest)
        return activation_bytes(self.config, self.shard, self.world_size, tokens)

    def kv_bytes(self, tokens: int) -> int:
        """An upper bound of the part of the keys and values of ``tokens`` positions.

        The store grows by a quarter of its size at a time, and copies one layer while it grows.
        """
        tokens = round_up(tokens + tokens // 4, 64)
        cache = kv_bytes(self.config, self.shard, self.form.dtype, tokens)
        return cache + cache // self.config.num_hidden_layers

    def left_for_weights(self, tokens: int | None = None, kv_bytes: int = 0) -> int | None:
        """The part of the weights during a step of ``tokens`` tokens; None without a limit.

        Negative if even the other parts do not fit.
        """
        limit = self.limits.memory_bytes
        if limit is None:
            return None
        return limit - self.process_bytes - self.step_bytes(tokens) - kv_bytes

    def streaming(self) -> StreamPlan:
        """The plan that a rank starts with: no keys and values yet, room for the longest step.

        Raises:
            MemoryLimitError: two blocks do not fit.
        """
        return plan_streaming(self.block_bytes, self.limits.window_blocks, self.left_for_weights())

    @property
    def least_bytes(self) -> int:
        """The lowest memory limit under which the rank loads."""
        return self._least_bytes(self.limits.chunk_tokens, 0)

    def holds(self, context: int) -> bool:
        """Whether ``context`` tokens can fit at all; the cache may need more while it grows."""
        kv = kv_bytes(self.config, self.shard, self.form.dtype, context)
        left = self.left_for_weights(1, kv)
        return left is None or left >= least_budget(self.block_bytes, self.limits.window_blocks)

    @property
    def shortage(self) -> str:
        """Why the rank cannot load, where its memory limit is below :attr:`least_bytes`."""
        limit = self.limits.memory_bytes or 0
        weights = least_budget(self.block_bytes, self.limits.window_blocks)
        return (
            f"its memory limit of {format_bytes(limit)} is too low: the process takes "
            f"{format_bytes(self.process_bytes)}, a step of {self.limits.chunk_tokens} tokens "
            f"{format_bytes(self.step_bytes())}, two weight blocks {format_bytes(weights)}"
        )

    def chunk_tokens(self) -> int:
        """Choose the longest step that takes at most a quarter of the memory limit.

        Each chunk of a prompt streams the weights once, so longer is better; the memory of a chunk
        is used by the weights again while tokens are decoded.
        """
        limit = self.limits.memory_bytes
        fitting = (c for c in _CHUNKS if limit is None or self._chosen_from(c) <= limit)
        return next(fitting, _CHUNKS[-1])

    def advised_bytes(self, context: int = 0) -> int:
        """A memory limit that works for ``context`` tokens of prompt and answer, in whole MiB.

        So does every higher one. A higher limit can bring longer steps, which take more memory
        themselves: those that it brings are accounted for. The least context is
        ``ADVISED_CONTEXT``, or all that the model has.
        """
        kv = self.kv_bytes(max(context, self._advised_context))
        possible = (c for c in _CHUNKS if self._chosen_from(c) < self._least_bytes(c, kv))
        chunks = (self.limits.chunk_tokens, _CHUNKS[-1], *possible)
        return round_up(max(self._least_bytes(chunk, kv) for chunk in chunks), 1 << 20)

    @property
    def _advised_context(self) -> int:
        return min(ADVISED_CONTEXT, self.config.context_length)

    def _chosen_from(self, chunk: int) -> int:
        """The memory limit from which on steps of ``chunk`` tokens are chosen."""
        step = activation_bytes(self.config, self.shard, self.world_size, chunk)
        return max(4 * step, self._least_bytes(chunk, self.kv_bytes(self._advised_context)))

    def _least_bytes(self, chunk: int, kv_bytes: int) -> int:
        """The lowest memory limit under which steps of ``chunk`` tokens work."""
        step = activation_bytes(self.config, self.shard, self.world_size, chunk)
        weights = least_budget(self.block_bytes, self.limits.window_blocks)
        return self.process_bytes + step + kv_bytes + weights
