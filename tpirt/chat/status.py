"""Statistics as text: the line after an answer, ``/stats`` and ``/peers``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import median

from tpirt.engine.token_times import token_times
from tpirt.planning import Deployment
from tpirt.terminal import table
from tpirt.types import RankStats, Recovery, StepTimes, TokenTimes
from tpirt.units import format_bytes

Row = tuple[str, ...]

_TIMES = ("rank", "peer", "compute", "disk", "network", "other")
_CAUSES = ("compute", "io", "comm", "other")


class Timing:
    """Times of an answer's tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self.finish_reason: str | None = None
        self._started_s = time.perf_counter()
        self._first_s = self._last_s = self._started_s

    def count(self) -> None:
        """Count a token that has just arrived."""
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
        """TTFT and rate, if known."""
        if self.tokens == 0:
            return "no token yet"
        first = f"TTFT {self.ttft_s:.2f} s"
        rate = self.tokens_per_s
        if rate is None:
            return first
        return f"{first}, {rate:.0f} tokens/s" if rate >= 100 else f"{first}, {rate:.3g} tokens/s"


def stats_table(ranks: Iterable[RankStats], columns: int | None = None) -> list[str]:
    """One line per rank: memory, disk and traffic of the last request."""
    head = ("rank", "peer", "peak RSS", "weights", "read", "per second", "sent", "received")
    rows = [
        (
            *(str(r.rank), r.peer_id, format_bytes(r.peak_rss_bytes)),
            *(format_bytes(r.weights_bytes), format_bytes(r.bytes_read), _disk_rate(r)),
            *(format_bytes(r.bytes_sent), format_bytes(r.bytes_received)),
        )
        for r in ranks
    ]
    return table([head, *rows], left=2, columns=columns)


def times_tables(ranks: Sequence[RankStats], columns: int | None = None) -> list[str]:
    """Times of the last request by rank and cause: prefill, then a decoded token.

    The last line of the second table is for all ranks together, if there are several; see
    :class:`tpirt.types.TokenTimes`.
    """
    prefills = [[step for step in rank.steps if step.prefill] for rank in ranks]
    tokens = sum(step.tokens for step in prefills[0])
    lines: list[str] = []
    if tokens:
        lines += ["", f"prefill of {tokens} tokens, ms:"]
        rows = [_times(steps, sum) for steps in prefills]
        lines += table([_TIMES, *map(_labelled, ranks, rows)], left=2, columns=columns)
    decoded = token_times(ranks)
    if decoded:
        lines += ["", f"a decoded token, ms (medians of {len(decoded)}):"]
        rows = [_times([s for s in rank.steps if not s.prefill], median) for rank in ranks]
        rows = list(map(_labelled, ranks, rows))
        if len(ranks) > 1:
            group = [
                median(getattr(token, f"{cause}_ms") for token in decoded) for cause in _CAUSES
            ]
            rows.append((f"0-{len(ranks) - 1}", "", *_row(group)))
        lines += [*table([_TIMES, *rows], left=2, columns=columns), _what_gated(decoded)]
    return lines


def _disk_rate(rank: RankStats) -> str:
    return format_bytes(rank.bytes_read / rank.read_ms * 1e3) if rank.read_ms else "-"


def _times(steps: Sequence[StepTimes], over: Callable[[Iterable[float]], float]) -> Row:
    """Combine some steps of one rank with ``over``: sum or median."""
    if not steps:  # the rank has not reached this phase
        return ("-",) * len(_CAUSES)
    busy = [(s.compute_ms, s.io_ms, s.comm_ms) for s in steps]
    idle = [s.total_ms - sum(parts) for s, parts in zip(steps, busy, strict=True)]
    return _row([*map(over, zip(*busy, strict=True)), over(idle)])


def _row(figures: Iterable[float]) -> Row:
    return tuple(f"{figure:.1f}" for figure in figures)


def _labelled(rank: RankStats, row: Row) -> Row:
    return (str(rank.rank), rank.peer_id, *row)


def _what_gated(decoded: Sequence[TokenTimes]) -> str:
    """Name the most frequent longest wait of the tokens."""
    found = Counter(
        f"{token.gated_by} of rank {token.slowest_rank}"
        if token.gated_by in ("compute", "disk")
        else token.gated_by
        for token in decoded
    )
    (what, times), *_ = found.most_common(1)
    return f"longest wait: {what}, in {times} of {len(decoded)} tokens"


def recoveries_table(losses: Sequence[Recovery], columns: int | None = None) -> list[str]:
    """One line per peer that was lost: who takes part since, and where the time went."""
    rows: list[Row] = [("lost", "since then", "noticing", "forming", "replaying", "sent")]
    for loss in losses:
        times = (loss.noticing_ms, loss.forming_ms, loss.replaying_ms)
        seconds = [f"{ms / 1e3:.1f} s" for ms in times]
        rows.append(
            (loss.peer_id, loss.change or "it is back", *seconds, format_bytes(loss.sent_bytes))
        )
    return ["", "lost peers:", *table(rows, left=2, columns=columns)]


def peers_table(plan: Deployment, lost_rank: int | None, columns: int | None = None) -> list[str]:
    """One line per rank: peer, heads, threads, and whether it is lost."""
    rows = [("rank", "peer", "heads", "KV heads", "threads", "state")]
    for rank, (peer, shard) in enumerate(zip(plan.peers, plan.partition.shards, strict=True)):
        heads = (str(shard.q_heads.size), str(shard.kv_heads.size))
        state = "lost" if rank == lost_rank else "ok"
        rows.append((str(rank), peer.peer_id, *heads, str(peer.threads), state))
    return table(rows, left=2, columns=columns)
