"""The plan of a deployment as a short table, displayed before loading."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from tpirt.files import free_bytes
from tpirt.planning import Deployment, RankPlan, advise
from tpirt.planning.dtype import AS_ASKED
from tpirt.printable import printable
from tpirt.terminal import table, width, wrap
from tpirt.units import format_bytes

_MOST_LINES = 8
_HEAD = ("rank", "peer", "heads", "KV heads", "MLP", "weights", "limit", "held")


def show_plan(plan: Deployment, out: TextIO) -> None:
    """Write one line per rank, at most 8, and one with the dtype and its reason."""
    columns = width(out)
    rows = [_HEAD, *(_row(rank) for rank in plan.ranks[:_MOST_LINES])]
    lines = table(rows, left=2, columns=columns)
    if plan.world_size > _MOST_LINES:
        lines.append(f"... and {plan.world_size - _MOST_LINES} more")
    how = _quantized(plan)
    cache = "" if plan.kv_numbers == plan.dtype.name else f", KV cache in {plan.kv_numbers}"
    lines.append(wrap(f"dtype {plan.dtype.name} ({plan.dtype.reason}){how}{cache}", columns))
    out.write(printable("\n".join(lines)) + "\n")
    out.flush()


def show_advice(plan: Deployment, store: Path | None, out: TextIO) -> None:
    """Write what a model takes where memory is short, and what to do; else nothing.

    Args:
        plan: of the group.
        store: folder of this machine's slices; None if it need not hold any.
        out: the stream.
    """
    lines = advise(plan)
    if lines and store is not None:
        lines.insert(-1, _disk(plan, store))
    out.write("".join(printable(line) + "\n" for line in lines))
    out.flush()


def _disk(plan: Deployment, store: Path) -> str:
    here = plan.peers[0].host_id
    slices = sum(r.budget.weights_bytes for r in plan.ranks if r.peer.host_id == here)
    free = free_bytes(store)
    where = f"{store}" if free is None else f"{store}, where {format_bytes(free)} are free"
    return f"slices take {format_bytes(slices)} of disk in {where}"


def _quantized(plan: Deployment) -> str:
    spec, reason = plan.quant.spec, plan.quant.reason
    if reason == AS_ASKED:
        return "" if spec.kind == "none" else f", weights in {spec}"
    return f", weights in {plan.ranks[0].form.numbers} ({reason})"


def _row(rank: RankPlan) -> tuple[str, ...]:
    limit = rank.limits.memory_bytes
    return (
        str(rank.peer.rank),
        rank.peer.peer_id,
        str(rank.shard.q_heads.size),
        str(rank.shard.kv_heads.size),
        str(rank.shard.columns.size),
        format_bytes(rank.budget.weights_bytes),
        "none" if limit is None else format_bytes(limit),
        rank.held,
    )
