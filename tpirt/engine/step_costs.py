"""How long a step takes by its number of rows, learnt from the steps themselves."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from statistics import median

from tpirt.ops.quant_linear import FEW_ROWS

# Rows that are told apart; few of them cost nearly the same, and many in proportion.
_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
_KEPT = 9  # latest steps of a size; an odd number, so that the median is one of them
_SURE = 3  # steps of a size, of which the median is taken; of fewer the least: first ones are slow
_TRIED = 2  # steps of a size, which are unlikely to be both slow by chance
_STALE = 2048  # steps after which a size is measured afresh: what else a machine does changes
_ROW_SHARE = 1 / 16  # that a row adds to the time of the first, until it is known


class StepCosts:
    """Predicts the seconds of a step, from the medians of the latest steps of each size."""

    def __init__(self) -> None:
        self._steps: dict[int, deque[tuple[int, float]]] = {}
        self._medians: dict[int, tuple[float, int, float]] = {}  # seconds, steps, rows, by size
        self._count = 0
        self._latest: dict[int, int] = {}  # number of the latest step, by size
        self._known: list[tuple[float, float]] = []  # rows and seconds, ascending
        self._tried: list[int] = []  # sizes, ascending

    def learn(self, rows: int, seconds: float) -> None:
        """Account for a step of ``rows`` rows."""
        self._count += 1
        size = _size(rows)
        steps = self._steps.setdefault(size, deque(maxlen=_KEPT))
        if not self._is_fresh(size):
            steps.clear()
        steps.append((rows, seconds))
        self._latest[size] = self._count
        sizes = sorted(self._steps)
        self._medians[size] = _median(steps)
        self._known = _ascending([self._medians[size] for size in sizes])
        self._tried = [size for size in sizes if self._is_fresh(size, _TRIED)]

    def seconds(self, rows: int) -> float | None:
        """The expected seconds of a step; None before the first one.

        Between two known sizes they grow in a straight line; below all as for the smallest. Beyond
        all, a few rows go on in the line through those that are known, and many grow in proportion.
        """
        if not self._known:
            return None
        index = bisect_right(self._known, (rows, float("inf")))
        if index == 0:
            return self._known[0][1]
        low, low_s = self._known[index - 1]
        if index < len(self._known):
            high, high_s = self._known[index]
            return low_s + (high_s - low_s) * (rows - low) / (high - low)
        least, least_s = self._known[0]
        row_s = (low_s - least_s) / (low - least) if low > least else least_s * _ROW_SHARE
        few = max(low, min(rows, FEW_ROWS))
        return (low_s + row_s * (few - low)) * max(1.0, rows / few)

    def hoped_seconds(self, rows: int) -> float | None:
        """What a step may take at best: as much as one of the next smaller size that was tried."""
        index = bisect_right(self._tried, _size(rows))
        return self.seconds(min(rows, self._tried[index - 1]) if index else rows)

    def is_sure(self, rows: int) -> bool:
        """Whether so many steps of about this size are known that the first ones do not matter."""
        return self._is_fresh(_size(rows), _SURE)

    def _is_fresh(self, size: int, least: int = 0) -> bool:
        """Whether a size was measured lately, at least so many times."""
        fresh = self._count - self._latest.get(size, 0) <= _STALE
        return fresh and len(self._steps.get(size, ())) >= least

    def most_tried(self, limit: int) -> int:
        """The most rows, up to ``limit``, of a size that is known; 0 if none is."""
        return int(max((rows for rows, _ in self._known if rows <= limit), default=0))

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


def _size(rows: int) -> int:
    return _SIZES[min(bisect_left(_SIZES, rows), len(_SIZES) - 1)]


def _median(steps: deque[tuple[int, float]]) -> tuple[float, int, float]:
    """Seconds of a size, of how many steps, and their rows."""
    times = [seconds for _, seconds in steps]
    own_s = median(times) if len(times) >= _SURE else min(times)
    return own_s, len(times), median(rows for rows, _ in steps)


def _ascending(sizes: list[tuple[float, int, float]]) -> list[tuple[float, float]]:
    """The rows and seconds of each size, none less than those of a smaller one.

    Sizes that contradict this share their mean, by number of steps.
    """
    pools: list[tuple[float, int, list[float]]] = []  # seconds, steps, rows of the sizes
    for seconds, steps, row in sizes:
        own_s, count, rows = seconds, steps, [row]
        while pools and pools[-1][0] > own_s:
            other_s, others, other_rows = pools.pop()
            own_s = (own_s * count + other_s * others) / (count + others)
            count, rows = count + others, other_rows + rows
        pools.append((own_s, count, rows))
    return [(rows, seconds) for seconds, _, group in pools for rows in group]
