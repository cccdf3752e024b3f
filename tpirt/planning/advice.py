"""What to tell a user before a model is loaded that needs much memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from tpirt.errors import PlanError
from tpirt.ops.quant import QuantSpec
from tpirt.planning.deployment import Deployment, RankPlan, free_memory
from tpirt.planning.dtype import AS_ASKED
from tpirt.planning.memory import PROCESS_BYTES, MemoryBudget, more_memory
from tpirt.planning.quantize import CANDIDATES
from tpirt.sharding.partition import make_partition
from tpirt.units import format_bytes

_MOST_UNEVEN = (2, 3, 4, 6, 8, 12, 16)  # times the smallest share
_OTHERWISE = "more peers would share the weights; a smaller model would fit"


def advise(plan: Deployment) -> list[str]:
    """Say that memory is short, or that weights take twice their size, and what to do about it.

    Returns:
        One line per fact, the last one with an option to try; empty if there is nothing to say.
    """
    rank = max(plan.ranks, key=_shortfall)
    lines = []
    if not rank.budget.fits and rank.decoding.slots:
        lines.append(
            f"memory is short: rank {rank.peer.rank} ({rank.peer.peer_id}) needs "
            f"{format_bytes(rank.budget.resident_bytes)} to keep its weights in memory and may "
            f"use {format_bytes(rank.limits.memory_bytes or 0)}; it reads the rest from disk "
            "for every token"
        )
    if _doubled(plan) and rank.budget.weights_bytes > PROCESS_BYTES:
        lines.append(
            f"weights in {plan.config.dtype} take twice their size, as float32: {plan.dtype.reason}"
        )
    if not lines:
        return []
    remedies = [_raised(plan, rank), _uneven(plan), _quantized(plan, rank)]
    words = [words for words in remedies if words is not None]
    return [*lines, ", or ".join(words) or _OTHERWISE]


def _shortfall(rank: RankPlan) -> int:
    limit = rank.limits.memory_bytes
    return 0 if limit is None else rank.budget.resident_bytes - limit


def _doubled(plan: Deployment) -> bool:
    """Whether 16-bit weights are kept in float32, which nobody asked for."""
    return (
        plan.quant.spec.kind == "none"
        and plan.quant.reason == AS_ASKED
        and plan.dtype.name == "float32" != plan.config.dtype
        and plan.dtype.reason != AS_ASKED
    )


def _raised(plan: Deployment, rank: RankPlan) -> str | None:
    """The limit with which no rank reads weights from disk, if the machines have so much."""
    needed = [each.budget.resident_bytes for each in plan.ranks]
    free = free_memory(plan.peers)
    if rank.budget.fits or any(each is None or each < max(needed) for each in free):
        return None
    whose = "" if rank.peer.memory_bytes is None else f" of {rank.peer.peer_id}"
    return more_memory(max(needed), None, whose)


def _uneven(plan: Deployment) -> str | None:
    """The least uneven shares with which no rank reads weights from disk, if there are any."""
    budgets = [each.budget for each in plan.ranks]
    room = [left for each in budgets if (left := each.left_for_weights(1)) is not None]
    least = min(room, default=0)
    if all(each.fits for each in budgets) or len(room) < len(budgets) or least <= 0:
        return None
    for most in _MOST_UNEVEN:
        ratio = [min(most, each // least) for each in room]
        with suppress(PlanError):  # a rank would have no head
            if all(each.fits for each in _budgets_by(plan, ratio)):
                return f"try --ratio {','.join(map(str, ratio))}: all weights in memory"
    return None


def _budgets_by(plan: Deployment, ratio: Sequence[float]) -> list[MemoryBudget]:
    shards = make_partition(plan.config, len(plan.ranks), ratio).shards
    return [each.budget.of_shard(shard) for each, shard in zip(plan.ranks, shards, strict=True)]


def _quantized(plan: Deployment, rank: RankPlan) -> str | None:
    """The first quantization below the present one that fits all ranks, else the smallest."""
    budget = rank.budget
    others = {name: QuantSpec.parse(name) for name in CANDIDATES}
    smaller = [
        name
        for name, spec in others.items()
        if budget.quantized(spec).weights_bytes < budget.weights_bytes
    ]
    if not smaller:
        return None
    budgets = [each.budget for each in plan.ranks]
    fitting = (name for name in smaller if all(b.quantized(others[name]).fits for b in budgets))
    name = next(fitting, smaller[-1])
    tried = budget.quantized(others[name])
    there = "all of them in memory" if tried.fits else "so that less is read"
    return (
        f"try --quantize {name}: {format_bytes(tried.weights_bytes)} of weights instead of "
        f"{format_bytes(budget.weights_bytes)} on rank {rank.peer.rank}, {there}"
    )
