"""What each rank will hold, as a short table before anything is loaded."""

from __future__ import annotations

from typing import TextIO

from tpirt.chat.console import columns, printable
from tpirt.cluster.rank import Limits
from tpirt.cluster.roster import PeerProfile
from tpirt.engine.engine import LoadPlan
from tpirt.errors import MemoryLimitError
from tpirt.model.memory import PROCESS_BYTES, RankPlan
from tpirt.units import format_bytes
from tpirt.weights.streamer import plan_streaming

_MOST_LINES = 8
_HEAD = ("rank", "peer", "heads", "KV heads", "MLP columns", "weights", "limit", "held")


def show_plan(plan: LoadPlan, out: TextIO) -> None:
    """Write one line per rank, at most 8, and one with the dtype and its reason."""
    ranks = list(zip(plan.ranks, plan.peers, plan.limits, strict=True))
    rows = [_HEAD, *(_row(*entry) for entry in ranks[:_MOST_LINES])]
    lines = [printable(line) for line in columns(rows, left=2)]
    if len(ranks) > _MOST_LINES:
        lines.append(f"... and {len(ranks) - _MOST_LINES} more")
    quant = plan.ranks[0].form.quant
    how = "" if quant.kind == "none" else f", weights in {quant}"
    lines.append(printable(f"dtype {plan.dtype.name} ({plan.dtype.reason}){how}"))
    out.write("".join(line + "\n" for line in lines))
    out.flush()


def _row(rank: RankPlan, peer: PeerProfile, limits: Limits) -> tuple[str, ...]:
    limit = limits.memory_bytes
    return (
        str(rank.rank),
        peer.peer_id,
        str(rank.shard.q_heads.size),
        str(rank.shard.kv_heads.size),
        str(rank.shard.columns.size),
        format_bytes(rank.weights_bytes),
        "none" if limit is None else format_bytes(limit),
        _held(rank, limits),
    )


def _held(rank: RankPlan, limits: Limits) -> str:
    """Say how the weights will be kept, as far as that can be foretold."""
    budget = limits.memory_bytes
    if budget is not None:
        budget -= PROCESS_BYTES + rank.activation_bytes
    try:
        window = plan_streaming(rank.block_bytes, limits.window_blocks, budget)
    except MemoryLimitError:
        return "too little memory"
    if not window.slots:
        return "resident"
    kept = f", {len(window.pinned)} kept" if window.pinned else ""
    return f"streamed, window {window.slots} of {len(rank.block_bytes)} blocks{kept}"
