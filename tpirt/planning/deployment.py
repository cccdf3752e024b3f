"""The plan of a deployment: shard, weight format and limits of every rank."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tpirt.config import ModelConfig
from tpirt.errors import ConfigError, MemoryLimitError
from tpirt.model.kv_store import KVNeed
from tpirt.ops.quant import AS_THEY_ARE
from tpirt.planning.dtype import ChosenDtype, choose_dtype
from tpirt.planning.memory import (
    PROCESS_BYTES,
    Limits,
    MemoryBudget,
    format_limit,
    logits_tokens,
    more_memory,
)
from tpirt.planning.options import AUTO, KV_BITS, CollectiveOptions, PlanOptions
from tpirt.planning.profile import PeerProfile
from tpirt.planning.quantize import ChosenQuant, choose_quant
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import Partition, Shard, make_partition
from tpirt.units import format_bytes
from tpirt.weights.stream_plan import StreamPlan

_SHARE_OF_FREE_MEMORY = 0.85


@dataclass(frozen=True)
class RankPlan:
    """The plan of one rank.

    Attributes:
        peer: its process.
        budget: its memory budget.
        streaming: its resident blocks and slots after loading.
    """

    peer: PeerProfile
    budget: MemoryBudget
    streaming: StreamPlan

    @property
    def shard(self) -> Shard:
        """Its heads and MLP columns."""
        return self.budget.shard

    @property
    def form(self) -> WeightFormat:
        """The format of its weights."""
        return self.budget.form

    @property
    def limits(self) -> Limits:
        """Its limits."""
        return self.budget.limits

    @property
    def decoding(self) -> StreamPlan:
        """Its resident blocks and slots while tokens are generated; a prompt leaves less memory."""
        return self.budget.streaming(1)

    @property
    def held(self) -> str:
        """Describe how its weights are held while tokens are generated."""
        plan, blocks = self.decoding, len(self.budget.block_bytes)
        if not plan.slots:
            return "resident"
        resident = f", {len(plan.resident)} resident" if plan.resident else ""
        return f"streamed, window {plan.slots} of {blocks} blocks{resident}"


@dataclass(frozen=True)
class Deployment:
    """Shards, weight formats and limits of all ranks; created by :func:`plan`.

    Attributes:
        config: the model.
        partition: the shard of every rank.
        dtype: of attention, sums and weights, and the reason.
        quant: of the projections, and the reason.
        ranks: the plans of all ranks, by rank.
        chunk_tokens: maximum tokens of a step.
        context_length: maximum tokens of a conversation.
        collectives: options for partial sums.
    """

    config: ModelConfig
    partition: Partition
    dtype: ChosenDtype
    quant: ChosenQuant
    ranks: tuple[RankPlan, ...]
    chunk_tokens: int
    context_length: int
    collectives: CollectiveOptions

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def peers(self) -> tuple[PeerProfile, ...]:
        """The process of every rank."""
        return tuple(rank.peer for rank in self.ranks)

    @property
    def limits(self) -> tuple[Limits, ...]:
        """The limits of every rank."""
        return tuple(rank.limits for rank in self.ranks)

    @cached_property
    def usable_context(self) -> int:
        """Most tokens of a conversation that fit in every rank's memory, as a prompt would."""

        def exceeds(tokens: int) -> bool:
            return not all(rank.budget.holds(tokens) for rank in self.ranks)

        return bisect_left(range(1, self.context_length + 1), True, key=exceeds)

    @property
    def kv_numbers(self) -> str:
        """How keys and values are cached: ``int8``, ``bfloat16``."""
        bits = self.ranks[0].limits.kv_bits
        return self.dtype.name if bits is None else f"int{bits}"

    @property
    def kv_token_bytes(self) -> int:
        """Most bytes of the keys and values of one position on a rank."""
        return max(rank.budget.kv_token_bytes for rank in self.ranks)

    @property
    def logits_tokens(self) -> int:
        """Maximum tokens whose logits the master computes at once."""
        shard = self.partition.shards[0]
        return logits_tokens(self.config, shard, self.world_size, self.chunk_tokens)

    def check_context(
        self, tokens: int, cached: int = 0, *, otherwise: str = "shorten the conversation"
    ) -> None:
        """Check that a prompt of ``tokens`` tokens fits on every rank, ``cached`` of them cached.

        Args:
            tokens: number of tokens.
            cached: leading ones that need not be computed.
            otherwise: advice besides more memory.

        Raises:
            MemoryLimitError: they do not; the message has sufficient limits.
        """
        short = [rank for rank in self.ranks if not rank.budget.holds(tokens, cached)]
        if not short:
            return
        enough = [rank.budget.advised_bytes(tokens) for rank in self.ranks]
        free = _least_free(self.peers, enough)
        advice = [more_memory(max(enough), free)]
        if free is None:
            advice += [
                f"that of {peer.peer_id} to {format_limit(needed)}"
                for peer, needed in zip(self.peers, enough, strict=True)
                if (peer.memory_bytes or needed) < needed
            ]
        budget, peer = short[0].budget, short[0].peer
        raise MemoryLimitError(
            f"{tokens} tokens of context need {format_bytes(budget.kv_bytes(tokens))} of KV cache "
            f"on rank {peer.rank} ({peer.peer_id}), whose memory limit is "
            f"{format_bytes(budget.limits.memory_bytes or 0)}; {', '.join(advice)}, "
            f"or {otherwise}"
        )

    def has_room(self, need: KVNeed, tokens: int, logits: int = 1, *, displacing: bool) -> bool:
        """Whether every rank has room; see :meth:`MemoryBudget.has_room`."""
        budgets = (rank.budget for rank in self.ranks)
        return all(b.has_room(need, tokens, logits, displacing=displacing) for b in budgets)

    def explain(self) -> list[str]:
        """Describe the plan and its reasons, one line per fact."""
        lines = [f"prompts in chunks of {self.chunk_tokens} tokens"]
        kv = max(rank.budget.kv_bytes(self.usable_context) for rank in self.ranks)
        lines.append(
            f"conversations of up to {self.usable_context} tokens: at most {format_bytes(kv)} of "
            f"KV cache per rank, in {self.kv_numbers}"
        )
        for rank in self.ranks:
            budget = rank.budget
            draft_bytes = budget.limits.reserved_bytes
            parts = (
                f"{format_bytes(budget.process_bytes - draft_bytes)} process, "
                f"{format_bytes(budget.step_bytes())} step"
            )
            if draft_bytes:
                parts = f"{format_bytes(draft_bytes)} draft model, {parts}"
            limit = rank.limits.memory_bytes
            if limit is not None:
                left = format_bytes(budget.left_for_weights() or 0)
                parts = f"limit {format_bytes(limit)}: {parts}, {left} weights and conversation"
            who = ", ".join(filter(None, (rank.peer.peer_id, rank.peer.host_name)))
            lines.append(
                f"rank {rank.peer.rank} ({who}): "
                f"{format_bytes(budget.weights_bytes)} of weights {rank.held}; {parts}"
            )
        return lines


def plan(
    config: ModelConfig,
    peers: Sequence[PeerProfile],
    options: PlanOptions,
    *,
    like: Deployment | None = None,
    trace_spans: int = 0,
) -> Deployment:
    """Plan a deployment.

    Args:
        config: the model.
        peers: the processes, by rank.
        options: the user's options.
        like: a deployment whose numbers are kept: dtype and quantization.
        trace_spans: maximum spans per lane of a trace; 0 for no trace.

    Raises:
        PlanError: the ratio or the number of peers does not fit the model.
        ConfigError: the context is longer than the model's.
        MemoryLimitError: a limit is too low; the message has a sufficient one.
    """
    context = _context_length(config, options)
    partition = make_partition(config, len(peers), options.ratio)
    dtype = like.dtype if like else choose_dtype(config, options.dtype, peers)
    longest = options.chunk_tokens or context
    budgets = [
        MemoryBudget.of(
            config,
            shard,
            len(peers),
            WeightFormat(dtype.weights),
            peer.base_bytes,
            Limits(
                options.window,
                limit,
                longest,
                trace_spans,
                KV_BITS[options.kv],
                options.kv_tokens,
                peer.reserved_bytes,
            ),
        )
        for peer, shard, limit in zip(
            peers, partition.shards, memory_limits(peers, options.memory_bytes), strict=True
        )
    ]
    quant = like.quant if like else choose_quant(options.quantize, budgets)
    if like is None:
        quantized = quant.spec != AS_THEY_ARE
        dtype = choose_dtype(config, options.dtype, peers, quantized=quantized)
    budgets = [budget.stored(WeightFormat(dtype.weights, quant.spec)) for budget in budgets]
    chunk = options.chunk_tokens or min(budget.chunk_tokens() for budget in budgets)
    chunk = min(chunk, context)
    budgets = [replace(b, limits=replace(b.limits, chunk_tokens=chunk)) for b in budgets]
    try:
        ranks = tuple(
            RankPlan(peer, budget, budget.streaming())
            for peer, budget in zip(peers, budgets, strict=True)
        )
    except MemoryLimitError as exc:
        raise _shortage(peers, budgets, options) from exc
    collectives = CollectiveOptions.parse(options.collective, options.comm_dtype)
    deployment = Deployment(config, partition, dtype, quant, ranks, chunk, context, collectives)
    if options.context is not None:
        deployment.check_context(context, otherwise="give a lower --context")
    return deployment


def plan_model(
    config: ModelConfig, world_size: int, peer: PeerProfile, options: PlanOptions
) -> Deployment:
    """Plan ``world_size`` ranks on hypothetical peers like ``peer``, without memory limits.

    Raises:
        PlanError: the ratio or the world size does not fit the model.
        ConfigError: the quantization depends on memory limits.
    """
    if options.quantize == AUTO:
        raise ConfigError(
            "quantize 'auto' depends on the memory of the peers, which is not known here: "
            "expected none, int8, int4 or nl4"
        )
    unbounded = replace(peer, memory_bytes=None, available_bytes=None, base_bytes=PROCESS_BYTES)
    peers = [replace(unbounded, rank=rank) for rank in range(world_size)]
    return plan(config, peers, options)


def memory_limits(peers: Sequence[PeerProfile], asked: int | None) -> list[int | None]:
    """Choose each rank's memory limit.

    It is the limit asked for, or else a fair share of the machine's free memory; and never more
    than the peer's own limit. Ranks on one machine share its free memory.
    """
    limits = []
    for peer, free in zip(peers, free_memory(peers), strict=True):
        limit = asked
        if limit is None and free is not None:
            limit = int(free * _SHARE_OF_FREE_MEMORY)
        bounds = [bound for bound in (limit, peer.memory_bytes) if bound is not None]
        limits.append(min(bounds, default=None))
    return limits


def free_memory(peers: Sequence[PeerProfile]) -> list[int | None]:
    """Each rank's share of its machine's free memory; None if unknown."""
    sharing = Counter(peer.host_id for peer in peers)
    return [
        None if peer.available_bytes is None else peer.available_bytes // sharing[peer.host_id]
        for peer in peers
    ]


def _least_free(peers: Sequence[PeerProfile], needed: Sequence[int]) -> int | None:
    """The least free memory of the ranks that have less than needed; None if all have enough."""
    pairs = zip(free_memory(peers), needed, strict=True)
    return min((free for free, need in pairs if free is not None and free < need), default=None)


def _context_length(config: ModelConfig, options: PlanOptions) -> int:
    context = options.context or config.context_length
    if context > config.context_length:
        raise ConfigError(
            f"context {context}: the model has at most {config.context_length} tokens"
        )
    return context


def _shortage(
    peers: Sequence[PeerProfile], budgets: Sequence[MemoryBudget], options: PlanOptions
) -> MemoryLimitError:
    """The error for a limit that is too low, with limits that suffice for a conversation."""
    asked = options.memory_bytes
    advised = [budget.advised_bytes(options.context or 0) for budget in budgets]
    unlimited = [replace(peer, memory_bytes=None) for peer in peers]
    advice = []
    by_master = _below(budgets, memory_limits(unlimited, asked))
    if by_master:
        needed = [advised[rank] if rank in by_master else 0 for rank in range(len(peers))]
        enough, free = max(needed), _least_free(peers, needed)
        advice.append(
            more_memory(enough, free)
            if asked is not None or free is not None
            else "free memory on its machine, raise its container's limit, or set --memory to "
            f"{format_limit(enough)}"
        )
    by_peers = _below(budgets, [peer.memory_bytes for peer in peers])
    advice += [
        more_memory(advised[rank], free_memory(peers)[rank], f" of {peers[rank].peer_id}")
        for rank in by_peers
    ]
    rank = min(by_master + by_peers)
    budget = budgets[rank]
    return MemoryLimitError(
        f"rank {rank} ({peers[rank].peer_id}): {budget.shortage}; {', and '.join(advice)}"
    )


def _below(budgets: Sequence[MemoryBudget], limits: Sequence[int | None]) -> list[int]:
    """The ranks that cannot load under ``limits``."""
    pairs = enumerate(zip(budgets, limits, strict=True))
    return [
        rank for rank, (budget, limit) in pairs if limit is not None and limit < budget.least_bytes
    ]
