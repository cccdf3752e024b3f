"""Figures as text: the line after an answer, ``/stats`` and ``/peers``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from tpirt.chat.console import columns
from tpirt.cluster.group import PeerInfo
from tpirt.engine.engine import LoadPlan
from tpirt.types import RankStats
from tpirt.units import format_bytes


class Timing:
    """When an answer's tokens came."""

    def __init__(self) -> None:
        self.tokens = 0
        self.finish_reason: str | None = None
        self._started_s = time.perf_counter()
        self._first_s = self._last_s = self._started_s

    def count(self) -> None:
        """Note that a token came now."""
        self._last_s = time.perf_counter()
        if self.tokens == 0:
            self._first_s = self._last_s
        self.tokens += 1

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self._first_s - self._started_s

    @property
    def tokens_per_s(self) -> float | None:
        """The inverse of TPOT = (last - first) / (n - 1); None before the second token."""
        elapsed = self._last_s - self._first_s
        return (self.tokens - 1) / elapsed if elapsed > 0 else None

    def __str__(self) -> str:
        """TTFT and rate, as far as there are any."""
        if self.tokens == 0:
            return "no token yet"
        first = f"TTFT {self.ttft_s:.2f} s"
        rate = self.tokens_per_s
        return first if rate is None else f"{first}, {rate:.3g} tokens/s"


def stats_table(ranks: Iterable[RankStats]) -> list[str]:
    """One line per rank: memory, traffic, and where the time of the last request went."""
    head = (
        *("rank", "peer", "peak RSS", "weights", "read", "sent", "received"),
        *("io ms", "compute ms", "comm ms"),
    )
    rows = [
        (
            *(str(r.rank), r.peer_id, format_bytes(r.peak_rss_bytes)),
            *(format_bytes(r.weights_bytes), format_bytes(r.bytes_read)),
            *(format_bytes(r.bytes_sent), format_bytes(r.bytes_received)),
            *(f"{r.io_ms:.0f}", f"{r.compute_ms:.0f}", f"{r.comm_ms:.0f}"),
        )
        for r in ranks
    ]
    return columns([head, *rows], left=2)


def peers_table(
    peers: Sequence[PeerInfo], plan: LoadPlan | None, broken: Exception | None
) -> list[str]:
    """One line per rank: who it is, what it computes, and whether it is lost."""
    rows = [("rank", "peer", "heads", "KV heads", "threads", "state")]
    for peer in peers:
        shard = plan.ranks[peer.rank].shard if plan else None
        heads = (str(shard.q_heads.size), str(shard.kv_heads.size)) if shard else ("?", "?")
        state = "lost" if is_lost(peer, broken) else "ok"
        rows.append((str(peer.rank), peer.peer_id, *heads, str(peer.threads), state))
    return columns(rows, left=2)


def is_lost(peer: PeerInfo, broken: Exception | None) -> bool:
    """Tell whether ``broken`` is about this peer: such messages begin with its name."""
    return broken is not None and str(broken).startswith(
        (f"{peer.peer_id}:", f"peer {peer.peer_id}:")
    )
