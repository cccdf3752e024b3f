"""Times of decoded tokens by cause, from the measurements of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

from tpirt.types import RankStats, StepTimes, TokenTimes


def token_times(ranks: Sequence[RankStats]) -> list[TokenTimes]:
    """Combine the ranks' step times into one entry per decoded token.

    Args:
        ranks: statistics of all ranks, the master's first; none: no entries.

    Returns:
        One entry per decode step that is in the statistics of every rank, in order.
    """
    if not ranks:
        return []
    by_rank = [{step.step: step for step in rank.steps if not step.prefill} for rank in ranks]
    return [
        _combine([steps[number] for steps in by_rank])
        for number in by_rank[0]
        if all(number in steps for steps in by_rank)
    ]


def _combine(ranks: Sequence[StepTimes]) -> TokenTimes:
    """See :class:`tpirt.types.TokenTimes`."""
    master = ranks[0]
    slowest = max(range(len(ranks)), key=lambda rank: _own_ms(ranks[rank]))
    pace = ranks[slowest]
    compute_ms = pace.compute_ms - pace.head_compute_ms + master.head_compute_ms
    io_ms = pace.io_ms - pace.head_io_ms + master.head_io_ms
    comm_ms = max(0.0, master.comm_ms - (_own_ms(pace) - _own_ms(master)))
    other_ms = master.total_ms - compute_ms - io_ms - comm_ms
    causes = {"compute": compute_ms, "disk": io_ms, "network": comm_ms, "other": other_ms}
    return TokenTimes(
        step=master.step,
        total_ms=master.total_ms,
        compute_ms=compute_ms,
        io_ms=io_ms,
        comm_ms=comm_ms,
        other_ms=other_ms,
        slowest_rank=slowest,
        gated_by=max(causes, key=lambda cause: causes[cause]),
    )


def _own_ms(step: StepTimes) -> float:
    """A rank's own time within the layers."""
    return step.compute_ms + step.io_ms - step.head_compute_ms - step.head_io_ms
