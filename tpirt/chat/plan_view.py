"""The plan of a deployment as a short table, displayed before loading."""

from __future__ import annotations

from typing import TextIO

from tpirt.planning import Deployment, RankPlan
from tpirt.printable import printable
from tpirt.terminal import table, width, wrap
from tpirt.units import format_bytes

_MOST_LINES = 8
_HEAD = ("rank", "peer", "heads", "KV heads", "MLP columns", "weights", "limit", "held")


def show_plan(plan: Deployment, out: TextIO) -> None:
    """Write one line per rank, at most 8, and one with the dtype and its reason."""
    columns = width(out)
    rows = [_HEAD, *(_row(rank) for rank in plan.ranks[:_MOST_LINES])]
    lines = table(rows, left=2, columns=columns)
    if plan.world_size > _MOST_LINES:
        lines.append(f"... and {plan.world_size - _MOST_LINES} more")
    quant = plan.ranks[0].form.quant
    how = "" if quant.kind == "none" else f", weights in {quant}"
    lines.append(wrap(f"dtype {plan.dtype.name} ({plan.dtype.reason}){how}", columns))
    out.write(printable("\n".join(lines)) + "\n")
    out.flush()


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
