"""A running step on one rank."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from tpirt.batch import Batch

_T = TypeVar("_T")


class StepAborted(Exception):  # noqa: N818 - not an error
    """The master aborted the step; not an error, never shown to a user."""


class StepContext:
    """One step on one rank, from its start to its end or abort.

    Attributes:
        number: number of the step in the session, from 1 on.
        batch: description of the step.
    """

    def __init__(self, number: int, batch: Batch):
        self.number = number
        self.batch = batch
        self._numbers = [0, 1]  # of the next collective of each micro-batch
        self._reason: Exception | None = None
        self._callbacks: list[Callable[[Exception], None]] = []

    @property
    def aborted(self) -> bool:
        """Whether the step was aborted or has failed."""
        return self._reason is not None

    def next_seq(self, part: int) -> int:
        """Number the next collective of a micro-batch: even for the first, odd for the second.

        Every rank makes the same calls in the same order within a part; the order between parts
        does not matter.
        """
        self._numbers[part] += 2
        return self._numbers[part] - 2

    def check(self) -> None:
        """Raise the reason if the step was aborted."""
        if self._reason is not None:
            raise self._reason

    def abort(self, reason: Exception) -> None:
        """Abort the step: all its waiting calls raise ``reason``. Only the first abort counts."""
        if self._reason is not None:
            return
        self._reason = reason
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(reason)

    def on_abort(self, callback: Callable[[Exception], None]) -> None:
        """Call ``callback(reason)`` when the step is aborted; at once if it already is."""
        if self._reason is not None:
            callback(self._reason)
        else:
            self._callbacks.append(callback)

    async def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Await ``work``; cancel it if the step is aborted or the caller is cancelled.

        Raises:
            Exception: the reason of the abort, or what ``work`` raises.
        """
        if self._reason is not None:
            work.close()
            raise self._reason
        task = asyncio.ensure_future(work)

        def give_up(_: Exception) -> None:
            task.cancel()

        self.on_abort(give_up)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if self._reason is None or (current is not None and current.cancelling()):
                raise
            raise self._reason from None
        finally:
            task.cancel()
            if give_up in self._callbacks:
                self._callbacks.remove(give_up)
