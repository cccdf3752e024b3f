"""The log of a peer on standard error, which may be gone, full or unread without any effect."""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
from collections.abc import Iterator
from logging.handlers import QueueHandler, QueueListener
from typing import TextIO

from tpirt.printable import printable_line

_MOST_WAITING = 1000  # lines that nobody reads; later ones are dropped
_FLUSH_S = 1.0  # for the last lines when the peer ends


@contextlib.contextmanager
def logged(level: int, stream: TextIO | None = None) -> Iterator[None]:
    """Write the records of the logger ``tpirt`` to ``stream``, by default standard error.

    A daemon thread writes, because a pipe that nobody reads blocks its writer; what cannot be
    written is dropped.
    """
    lines: queue.Queue[logging.LogRecord] = queue.Queue(_MOST_WAITING)
    writer = _Writer(stream or sys.stderr)
    writer.setFormatter(_OneLine())
    QueueListener(lines, writer).start()
    try:
        with handled(_Enqueue(lines), level):
            yield
    finally:
        with lines.all_tasks_done:
            lines.all_tasks_done.wait_for(lambda: not lines.unfinished_tasks, _FLUSH_S)


@contextlib.contextmanager
def handled(handler: logging.Handler, level: int) -> Iterator[None]:
    """Have ``handler`` get the records of the logger ``tpirt`` from ``level`` on."""
    logger = logging.getLogger("tpirt")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _OneLine(logging.Formatter):
    """A record as one line without control characters: some of its text comes from others."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_line(super().format(record))


class _Enqueue(QueueHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drop a record that finds the queue full."""


class _Writer(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drop a record that cannot be written."""
