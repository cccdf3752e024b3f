"""Ctrl-C goes to the task at work instead of interrupting the process."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator


class Interrupts:
    """Passes SIGINT to one handler at a time; ignores it without a handler."""

    def __init__(self) -> None:
        self._handler: Callable[[], None] | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Take SIGINT over; the previous handler is restored at the end."""
        loop = asyncio.get_running_loop()
        before = signal.getsignal(signal.SIGINT)
        try:
            loop.add_signal_handler(signal.SIGINT, self._pass_on)
        except NotImplementedError:  # a loop without signals (Windows): Ctrl-C ends the chat
            yield
            return
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def to(self, handler: Callable[[], None]) -> Iterator[None]:
        """Call ``handler`` for each SIGINT within the block."""
        before, self._handler = self._handler, handler
        try:
            yield
        finally:
            self._handler = before

    def _pass_on(self) -> None:
        if self._handler is not None:
            self._handler()
