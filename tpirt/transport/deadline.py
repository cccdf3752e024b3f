"""Deadlines for waits that hardly ever reach them, at a tenth of the price of ``asyncio.timeout``.

A rank waits twice for every sum, some hundred times a token, and making and cancelling a timer for
each wait took 8 us (uvloop). Here one timer serves many waits: it is set for the first one's
deadline, and when it goes off, for that of the wait which is on by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

_T = TypeVar("_T")


class Deadline:
    """Bounds waits that follow one another; one wait at a time."""

    __slots__ = ("_cancelling", "_expired", "_task", "_timer", "_until")

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None  # who waits now
        self._until = 0.0  # until when, by the loop's clock
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False
        self._cancelling = 0  # how often others had cancelled the task before it waited

    async def wait(self, awaitable: Awaitable[_T], timeout_s: float | None) -> _T:
        """Await something for ``timeout_s`` at most; None waits for ever.

        Raises:
            TimeoutError: it took longer; it has been cancelled.
        """
        if timeout_s is None:
            return await awaitable
        loop = asyncio.get_running_loop()
        self._until = loop.time() + timeout_s
        if self._timer is None or self._timer.when() > self._until:
            self._set(loop)
        task = self._task = asyncio.current_task()
        assert task is not None
        self._cancelling, self._expired = task.cancelling(), False
        try:
            return await awaitable
        except asyncio.CancelledError as exc:
            if self._expired and task.uncancel() <= self._cancelling:
                raise TimeoutError from exc
            raise
        finally:
            self._task = None

    def close(self) -> None:
        """Let go of the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self, loop: asyncio.AbstractEventLoop) -> None:
        self.close()
        self._timer = loop.call_at(self._until, self._check)

    def _check(self) -> None:
        self._timer = None
        if self._task is None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() < self._until:  # of a later wait than the timer was set for
            self._set(loop)
            return
        self._expired = True
        self._task.cancel()
