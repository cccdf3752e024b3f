"""Ctrl-C outside of work: ends the process at once.

``KeyboardInterrupt`` is lost or becomes a traceback when it is raised within imports of torch and
gRPC. Imported by the entry point before anything else, so it must stay light.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

INTERRUPTED = 130


def exit_on_sigint() -> None:
    """End the process with exit code 130 on SIGINT, unless SIGINT is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt within the block, so that work can clean up."""
    exits = signal.getsignal(signal.SIGINT) is _exit
    if exits:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if exits:
            signal.signal(signal.SIGINT, _exit)


def _exit(*_: object) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"tpirt: interrupted\n")
    os._exit(INTERRUPTED)
