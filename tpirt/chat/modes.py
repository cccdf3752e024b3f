"""The modes of the terminal, and signals that stop or end the process while they are changed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from tpirt.chat.reader import Reader

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]


class TerminalModes:
    """Echo and line editing of the terminal on standard input, as they are when this is made."""

    def __init__(self) -> None:
        self._before = _get()
        self._silent: list[Any] | None = None  # the modes of echo_off

    @contextlib.contextmanager
    def echo_off(self) -> Iterator[None]:
        """Hide text typed within the block; the next prompt shows it."""
        if self._before is None:
            yield
            return
        self._silent = [*self._before[:3], self._before[3] & ~termios.ECHO, *self._before[4:]]
        _set(self._silent)
        try:
            yield
        finally:
            _set(self._before)

    @contextlib.contextmanager
    def guarded(self, reader: Reader) -> Iterator[None]:
        """Restore the modes before a signal stops or ends the process.

        When it continues, the modes are those that it was stopped in. A signal that is ignored, as
        by ``nohup``, stays ignored.
        """
        if self._before is None:
            yield
            return
        loop = asyncio.get_running_loop()

        def end(number: int) -> None:
            reader.release()
            self._restore()
            loop.remove_signal_handler(number)
            signal.raise_signal(number)

        def suspend() -> None:
            # A shell takes the terminal back as soon as another process of the group, such as a
            # wrapper script, has stopped. Stopped by changing modes in the background now, this
            # process would stop once more, below, after it was continued.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
            reader.aside(stop)

        def stop() -> None:
            during = _get()
            self._restore()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTTOU})
            loop.remove_signal_handler(signal.SIGTSTP)
            os.killpg(0, signal.SIGTSTP)  # as a terminal does; returns when the process continues
            loop.add_signal_handler(signal.SIGTSTP, suspend)
            _set(during)  # in the background, this stops the process until it is in front again

        caught = [
            number
            for number in (signal.SIGTSTP, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
            if signal.getsignal(number) is signal.SIG_DFL
        ]
        for number in caught:
            if number == signal.SIGTSTP:
                loop.add_signal_handler(number, suspend)
            else:
                loop.add_signal_handler(number, end, number)
        try:
            yield
        finally:
            for number in caught:
                loop.remove_signal_handler(number)

    def _restore(self) -> None:
        with contextlib.suppress(OSError):
            in_front = os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
            if in_front or _get() == self._silent:  # nobody else has changed it yet
                _set(self._before)


def _get() -> list[Any] | None:
    """The modes of the terminal on standard input; None if there is none."""
    if termios is None:
        return None
    with contextlib.suppress(OSError, ValueError, AttributeError, termios.error):
        return termios.tcgetattr(sys.stdin.fileno())
    return None


def _set(modes: list[Any] | None) -> None:
    """Set modes; a terminal that is gone has none."""
    if modes is not None:
        with contextlib.suppress(OSError, ValueError, termios.error):
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, modes)
