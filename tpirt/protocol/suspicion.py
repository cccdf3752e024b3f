"""How long a silence has to be before a peer counts as lost, learnt from its heartbeats.

On a calm link a peer is suspected after half of the timeout; on one that is often late, as Wi-Fi
is, after up to the whole of it.
"""

from __future__ import annotations

from collections import deque

_REMEMBERED = 256  # gaps between heartbeats: minutes
_LEAST_KNOWN = 8
_TIMES = 2.0  # so much longer than the longest gap a silence has to be


class Suspicion:
    """The longest silence that is not suspicious, from the gaps before the latest heartbeats.

    Args:
        interval_s: between heartbeats of a peer that is otherwise silent.
        timeout_s: the most.
    """

    def __init__(self, interval_s: float, timeout_s: float):
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._gaps: deque[float] = deque(maxlen=_REMEMBERED)
        self.limit_s = timeout_s

    def heard(self, gap_s: float) -> None:
        """Account for a heartbeat that came after a silence of ``gap_s``."""
        self._gaps.append(gap_s)
        if len(self._gaps) >= _LEAST_KNOWN:
            suspicious_s = _TIMES * max(self._gaps) + self._interval_s
            self.limit_s = min(self._timeout_s, max(self._timeout_s / 2, suspicious_s))
