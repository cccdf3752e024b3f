"""One step under way on one rank."""

from __future__ import annotations

from collections.abc import Callable

from tpirt.batch import Batch


class StepAborted(Exception):  # noqa: N818 - not an error
    """The master gave the step up; not an error, never shown to a user."""


class StepContext:
    """A step from its start until its end or abort; it dies with the step.

    Attributes:
        number: of the step within the session, counted from 1.
        batch: what the step computes.
    """

    def __init__(self, number: int, batch: Batch):
        self.number = number
        self.batch = batch
        self._reason: Exception | None = None
        self._callbacks: list[Callable[[Exception], None]] = []

    @property
    def aborted(self) -> bool:
        """Whether the step was given up or has failed."""
        return self._reason is not None

    def check(self) -> None:
        """Raise the reason if the step was aborted."""
        if self._reason is not None:
            raise self._reason

    def abort(self, reason: Exception) -> None:
        """Give the step up: everything that waits in it raises ``reason``. The first one counts."""
        if self._reason is not None:
            return
        self._reason = reason
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(reason)

    def on_abort(self, callback: Callable[[Exception], None]) -> None:
        """Call ``callback(reason)`` when the step is aborted; at once if it was already."""
        if self._reason is not None:
            callback(self._reason)
        else:
            self._callbacks.append(callback)
