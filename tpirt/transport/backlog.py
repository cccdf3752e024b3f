"""Callers that have not said yet what they want: a few at a time.

Nothing tells a stranger from a master before it speaks, and a master speaks within a round trip. So
when there are too many, the one that has been silent for longest gives way. To refuse the newest
instead would let a handful of silent callers keep every master out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from tpirt.errors import TransportError

_T = TypeVar("_T")


class Backlog:
    """Awaits at most ``places`` callers at a time."""

    def __init__(self, places: int):
        self._places = places
        self._waiting: dict[asyncio.Task[Any], None] = {}  # the oldest first

    async def wait(self, caller: Coroutine[Any, Any, _T]) -> _T:
        """Await what ``caller`` says; cancelled, or crowded out, ``caller`` is cancelled.

        Raises:
            TransportError: too many came after it.
        """
        task = asyncio.ensure_future(caller)
        self._waiting[task] = None
        if len(self._waiting) > self._places:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.cancel()
        try:
            await asyncio.wait({task})
        finally:
            crowded_out = self._waiting.pop(task, self) is self
            task.cancel()
        if task.cancelled() and crowded_out:
            raise TransportError("it said nothing, and too many others came after it; try again")
        return task.result()
