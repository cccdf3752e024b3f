"""How long a step takes by its number of rows, learnt from the steps themselves."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from statistics import median

# Rows that are told apart; few of them cost nearly the same, and many in proportion.
_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
_KEPT = 9  # latest steps of a size; an odd number, so that the median is one of them


class StepCosts:
    """Predicts the seconds of a step, from the medians of the latest steps of each size."""

    def __init__(self) -> None:
        self._steps: dict[int, deque[tuple[int, float]]] = {}
        self._known: list[tuple[int, float]] = []  # rows and seconds, ascending

    def learn(self, rows: int, seconds: float) -> None:
        """Account for a step of ``rows`` rows."""
        size = _SIZES[min(bisect_left(_SIZES, rows), len(_SIZES) - 1)]
        self._steps.setdefault(size, deque(maxlen=_KEPT)).append((rows, seconds))
        self._known = sorted(map(_middle, self._steps.values()))

    def seconds(self, rows: int) -> float | None:
        """The expected seconds of a step; None before the first one.

        Between two known sizes they grow in a straight line; below all as for the smallest; beyond
        all in proportion to rows.
        """
        if not self._known:
            return None
        index = bisect_right(self._known, (rows, float("inf")))
        if index == 0:
            return self._known[0][1]
        low, low_s = self._known[index - 1]
        if index == len(self._known):
            return low_s * rows / low
        high, high_s = self._known[index]
        return low_s + (high_s - low_s) * (rows - low) / (high - low)

    def prompt_seconds(self, rows: int, chunk: int) -> float | None:
        """The expected seconds of ``rows`` rows in steps of at most ``chunk``; None as above."""
        whole, rest = divmod(rows, chunk)
        whole_s, rest_s = self.seconds(chunk), self.seconds(rest) if rest else 0.0
        return None if whole_s is None or rest_s is None else whole * whole_s + rest_s

    def rows_within(self, limit_s: float, most: int) -> int:
        """The most rows, up to ``most``, of a step that is expected to take at most ``limit_s``."""
        within = 0
        for rows in (*(size for size in _SIZES if size < most), most):
            expected_s = self.seconds(rows)
            if expected_s is None or expected_s > limit_s:
                break
            within = rows
        return within


def _middle(steps: deque[tuple[int, float]]) -> tuple[int, float]:
    return round(median(rows for rows, _ in steps)), median(seconds for _, seconds in steps)
