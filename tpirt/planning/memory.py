"""Memory use of one rank, computed from shapes.

All memory arithmetic is in :class:`MemoryBudget`: the displayed plan, the resident blocks of a
rank, the chunk size and the advice in error messages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tpirt.config import ModelConfig
from tpirt.model.kv_store import KVLayout, KVNeed, grown_capacity, most_capacity
from tpirt.ops.buffers import round_up
from tpirt.ops.nn import MASK_ELEMENTS
from tpirt.ops.quant import QuantSpec
from tpirt.sharding.blocks import rank_blocks
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import Shard
from tpirt.units import format_bytes
from tpirt.weights.layout import file_bytes
from tpirt.weights.reader import buffer_bytes
from tpirt.weights.stream_plan import StreamPlan, least_budget, plan_streaming

_CHUNKS = (512, 256, 128, 64, 32, 16)  # candidates for the tokens of a step

# Resident memory of a process without a model: Python, torch, gRPC (measured).
PROCESS_BYTES = 270 << 20

# Memory of a running process that no other part accounts for: allocator slack, stacks, gRPC, 8 MiB
# of scratch, and 20 to 25 MiB that torch's products keep once prompts of several lengths were
# computed (55 MiB in all with 16 users).
SLACK_BYTES = 64 << 20

# Advised limits suffice for a conversation of this many tokens, or the whole context if less.
ADVISED_CONTEXT = 2048


def activation_bytes(config: ModelConfig, shard: Shard, world_size: int, tokens: int) -> int:
    """Peak bytes of a step of ``tokens`` tokens on one rank, including frames on links."""
    hidden = 4 * tokens * config.hidden_size
    heads = shard.q_heads.size + 2 * shard.kv_heads.size
    qkv = 4 * tokens * heads * config.head_dim
    mlp = 4 * tokens * shard.columns.size
    mask = 5 * min(tokens * config.context_length, MASK_ELEMENTS) if tokens > 1 else 0
    logits = logits_bytes(config, 1) if shard.first else 0
    senders = world_size - 1 if shard.first else 1
    return (6 + 3 * senders) * hidden + 4 * qkv + 4 * mlp + mask + logits


def logits_tokens(config: ModelConfig, shard: Shard, world_size: int, tokens: int) -> int:
    """Number of tokens whose logits fit on rank 0 in the memory of a step of ``tokens`` tokens."""
    room = activation_bytes(config, shard, world_size, tokens)
    return max(1, min(tokens, room // logits_bytes(config, 1)))


def logits_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of logits: two rows of the vocabulary a token, one of them an intermediate result."""
    return 8 * config.vocab_size * tokens


def format_limit(nbytes: int) -> str:
    """Format a memory limit for ``--memory``, rounded up to whole MiB."""
    return f"{-(-nbytes >> 20)}M"


def more_memory(enough: int, free: int | None, whose: str = "") -> str:
    """Advise a limit of ``enough`` bytes, or what else helps where only ``free`` can be had."""
    limit = format_limit(enough)
    if free is None or enough <= free:
        return f"raise --memory{whose} to {limit}"
    return (
        f"it needs {limit}, and its machine or container has {format_bytes(free)} free: end other "
        "programs, raise the container's limit, add peers, or use fewer bits (--quantize)"
    )


@dataclass(frozen=True)
class Limits:
    """Limits of one rank; None means unlimited.

    Attributes:
        window_blocks: maximum weight blocks in memory.
        memory_bytes: maximum resident memory of the rank's process.
        chunk_tokens: maximum tokens of one step.
        trace_spans: maximum spans per lane of a trace; 0 for no trace.
        kv_bits: of a cached key or value, the same on every rank; None for those of the dtype.
        kv_tokens: maximum positions of all sequences in memory, up to a quarter more as they grow.
        reserved_bytes: of the process, for what is not the rank's: a draft model.
    """

    window_blocks: int | None
    memory_bytes: int | None
    chunk_tokens: int
    trace_spans: int = 0
    kv_bits: int | None = None
    kv_tokens: int | None = None
    reserved_bytes: int = 0


@dataclass(frozen=True)
class MemoryBudget:
    """Divides the memory limit of one rank into process, step, KV cache and weights.

    Attributes:
        config: the model.
        shard: the rank's shard.
        world_size: number of ranks.
        form: the format of its weights.
        block_bytes: memory of each weight block, in order of use.
        base_bytes: resident memory of the process without a model.
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
        """Create the budget of one rank; block sizes follow from the shapes."""
        blocks = rank_blocks(config, shard, form)
        sizes = tuple(buffer_bytes(file_bytes(block)) for block in blocks)
        return cls(config, shard, world_size, form, sizes, base_bytes, limits)

    def quantized(self, quant: QuantSpec) -> MemoryBudget:
        """The budget of the same rank with other weights."""
        return self.stored(replace(self.form, quant=quant))

    def stored(self, form: WeightFormat) -> MemoryBudget:
        """The budget of the same rank with weights in another format."""
        if form == self.form:
            return self
        return self.of(self.config, self.shard, self.world_size, form, self.base_bytes, self.limits)

    def of_shard(self, shard: Shard) -> MemoryBudget:
        """The budget of the same rank with another shard."""
        form, limits = self.form, self.limits
        return self.of(self.config, shard, self.world_size, form, self.base_bytes, limits)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weight blocks."""
        return sum(self.block_bytes)

    @property
    def process_bytes(self) -> int:
        """Bytes of the process without the rank's part of the model."""
        return self.base_bytes + SLACK_BYTES + self.limits.reserved_bytes

    def step_bytes(self, tokens: int | None = None, logits: int = 1) -> int:
        """Bytes reserved for a step of ``tokens`` tokens; by default for the longest step.

        The logits of several tokens come after the layers, and may take their memory. Token counts
        are rounded up to powers of two, so that the streaming plan rarely changes.
        """
        longest = self.limits.chunk_tokens
        tokens = longest if tokens is None else min(1 << (tokens - 1).bit_length(), longest)
        layers = activation_bytes(self.config, self.shard, self.world_size, tokens)
        if not self.shard.first:
            return layers
        at_once = min(logits, self._logits_tokens)
        return max(layers, logits_bytes(self.config, at_once))

    @property
    def _logits_tokens(self) -> int:
        chunk = self.limits.chunk_tokens
        return logits_tokens(self.config, self.shard, self.world_size, chunk)

    def kv_bytes(self, tokens: int) -> int:
        """An upper bound of the bytes of the KV cache for ``tokens`` positions.

        The KV store grows by a quarter at a time, and copies layer by layer.
        """
        cache = self.kv_token_bytes * most_capacity(tokens)
        return cache + cache // self.config.num_hidden_layers + self._kv.piece_bytes(tokens)

    def left_for_weights(
        self, tokens: int | None = None, kv_bytes: int = 0, logits: int = 1
    ) -> int | None:
        """Bytes left for weights during a step of ``tokens`` tokens; None without a limit.

        Negative if the rest does not fit.
        """
        limit = self.limits.memory_bytes
        if limit is None:
            return None
        return limit - self.process_bytes - self.step_bytes(tokens, logits) - kv_bytes

    @property
    def resident_bytes(self) -> int:
        """Enough memory for all weights, the longest step, and as many positions as there may be.

        Where their number has no limit, those of a usual conversation.
        """
        step = self.step_bytes(self.chunk_tokens())
        kv = self.kv_bytes(self.limits.kv_tokens or self._advised_context)
        return self.process_bytes + step + kv + self.weights_bytes

    @property
    def fits(self) -> bool:
        """Whether all weights are in memory while tokens of a usual conversation are generated.

        Not while its prompts are computed: a higher limit can select longer steps, for which
        blocks are given up, and would fit less.
        """
        left = self.left_for_weights(1, self.kv_bytes(self._advised_context))
        return left is None or self.weights_bytes <= left

    def streaming(self, tokens: int | None = None) -> StreamPlan:
        """The plan for a step of ``tokens`` tokens with an empty KV cache.

        By default for the longest step, which is a rank's initial plan.

        Raises:
            MemoryLimitError: two blocks do not fit.
        """
        left = self.left_for_weights(tokens)
        return plan_streaming(self.block_bytes, self.limits.window_blocks, left)

    @property
    def least_bytes(self) -> int:
        """The lowest memory limit with which the rank loads."""
        return self._least_bytes(self.limits.chunk_tokens, 0)

    def holds(self, context: int, cached: int = 0) -> bool:
        """Whether a prompt can be computed, chunk by chunk, up to ``context`` tokens in all.

        Follows what a rank does: before each chunk the KV store grows, one layer after another.

        Args:
            context: tokens of the prompt.
            cached: leading ones that need not be computed.
        """
        least = least_budget(self.block_bytes, self.limits.window_blocks)
        chunk, token_bytes = self.limits.chunk_tokens, self.kv_token_bytes
        capacity = grown_capacity(0, cached)
        for start in range(cached, context, chunk):
            end = min(start + chunk, context)
            before, capacity = capacity, grown_capacity(capacity, end)
            copied = before * token_bytes // self.config.num_hidden_layers
            growing = copied if capacity > before else 0
            reading = self._kv.piece_bytes(end)
            left = self.left_for_weights(end - start, capacity * token_bytes + growing + reading)
            if left is not None and left < least:
                return False
        return True

    def has_room(self, need: KVNeed, tokens: int, logits: int = 1, *, displacing: bool) -> bool:
        """Whether a step fits that needs so much of the KV store.

        Args:
            need: of the store.
            tokens: of the step.
            logits: those of them whose results are wanted.
            displacing: whether weights may be given up for it, down to two blocks.
        """
        most = self.limits.kv_tokens
        if most is not None and need.held > most_capacity(most):
            return False
        layers = self.config.num_hidden_layers
        left = self.left_for_weights(tokens, need.nbytes(self._kv, layers), logits)
        if left is None:
            return True
        window = self.limits.window_blocks
        if displacing:
            return left >= least_budget(self.block_bytes, window)
        return left >= sum(sorted(self.block_bytes, reverse=True)[:window])

    @property
    def _kv(self) -> KVLayout:
        heads, bits = self.shard.kv_heads.size, self.limits.kv_bits
        return KVLayout(heads, self.config.head_dim, self.form.run_dtype, bits)

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of the keys and values of one position."""
        return self.config.num_hidden_layers * self._kv.token_bytes

    @property
    def shortage(self) -> str:
        """Describe why the rank cannot load with a limit below :attr:`least_bytes`."""
        limit = self.limits.memory_bytes or 0
        weights = least_budget(self.block_bytes, self.limits.window_blocks)
        draft = self.limits.reserved_bytes
        beside = f", with {format_bytes(draft)} of a draft model" if draft else ""
        return (
            f"its memory limit of {format_bytes(limit)} is too low: the process needs "
            f"{format_bytes(self.process_bytes)}{beside}, a step of {self.limits.chunk_tokens} "
            f"tokens {format_bytes(self.step_bytes())}, two weight blocks {format_bytes(weights)}"
        )

    def chunk_tokens(self) -> int:
        """Choose the longest step that needs at most a quarter of the memory limit.

        Each chunk of a prompt streams the weights once, so longer is better. During decoding, the
        memory of a chunk is used for weights.
        """
        limit = self.limits.memory_bytes
        fitting = (c for c in _CHUNKS if limit is None or self._chosen_from(c) <= limit)
        return next(fitting, _CHUNKS[-1])

    def advised_bytes(self, context: int = 0) -> int:
        """A memory limit that works for ``context`` tokens of prompt and answer, in whole MiB.

        Every higher limit works, too: a higher limit can select longer steps, which need more
        memory, and these are accounted for. ``context`` is at least ``ADVISED_CONTEXT``, or the
        model's context length.
        """
        kv = self.kv_bytes(max(context, self._advised_context))
        possible = (c for c in _CHUNKS if self._chosen_from(c) < self._least_bytes(c, kv))
        chunks = (self.limits.chunk_tokens, _CHUNKS[-1], *possible)
        return round_up(max(self._least_bytes(chunk, kv) for chunk in chunks), 1 << 20)

    @property
    def _advised_context(self) -> int:
        return min(ADVISED_CONTEXT, self.config.context_length)

    def _chosen_from(self, chunk: int) -> int:
        """The lowest memory limit with which steps of ``chunk`` tokens are chosen."""
        step = activation_bytes(self.config, self.shard, self.world_size, chunk)
        quarter = self.limits.reserved_bytes + 4 * step
        return max(quarter, self._least_bytes(chunk, self.kv_bytes(self._advised_context)))

    def _least_bytes(self, chunk: int, kv_bytes: int) -> int:
        """The lowest memory limit with which steps of ``chunk`` tokens work."""
        step = activation_bytes(self.config, self.shard, self.world_size, chunk)
        weights = least_budget(self.block_bytes, self.limits.window_blocks)
        return self.process_bytes + step + kv_bytes + weights
