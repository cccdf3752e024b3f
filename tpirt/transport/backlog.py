"""Callers that have not said yet what they want: a few at a time.

Nothing tells a stranger from a master before it speaks, and a master speaks within a round trip. So
when there are too many, the one that has been silent for longest gives way, of those from the host
that has most of them here. To refuse the newest instead would let a handful of silent callers keep
every master out.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar

from tpirt.errors import TransportError

_T = TypeVar("_T")


class Backlog:
    """Awaits at most ``places`` callers at a time."""

    def __init__(self, places: int):
        self._places = places
        self._waiting: dict[asyncio.Task[Any], str] = {}  # with their hosts, the oldest first

    async def wait(self, peer_id: str, caller: Coroutine[Any, Any, _T]) -> _T:
        """Await what ``caller`` says; cancelled, or crowded out, ``caller`` is cancelled.

        Args:
            peer_id: of the caller, ``host:port``.
            caller: returns what it says.

        Raises:
            TransportError: too many came after it.
        """
        task = asyncio.ensure_future(caller)
        self._waiting[task] = peer_id.rpartition(":")[0]
        if len(self._waiting) > self._places:
            self._crowd_out()
        try:
            await asyncio.wait({task})
        finally:
            crowded_out = self._waiting.pop(task, None) is None
            task.cancel()
        if task.cancelled() and crowded_out:
            raise TransportError("it said nothing, and too many others came after it; try again")
        return task.result()

    def _crowd_out(self) -> None:
        ((most, _),) = Counter(self._waiting.values()).most_common(1)
        oldest = next(task for task, host in self._waiting.items() if host == most)
        del self._waiting[oldest]
        oldest.cancel()
