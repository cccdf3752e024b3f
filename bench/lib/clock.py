"""A clock that stands still while its process is stopped."""

from __future__ import annotations

import threading
import time


class Clock:
    """Seconds without those in which this process was stopped, as others measure here, too."""

    def __init__(self) -> None:
        self._lost_s = 0.0
        self._last_s = time.monotonic()
        self._lock = threading.Lock()
        threading.Thread(target=self._tick, daemon=True).start()

    def now_s(self) -> float:
        """The time."""
        with self._lock:  # of a stop that has just ended, nobody may know yet
            now = time.monotonic()
            self._lost_s += max(0.0, now - self._last_s - 0.6)
            self._last_s = now
            return now - self._lost_s

    def _tick(self) -> None:
        while True:
            time.sleep(0.1)
            self.now_s()
