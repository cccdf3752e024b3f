"""Locks on files and folders that end with the process that holds them, on whichever host it is."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


class Lock:
    """A lock that is held; :meth:`release` or the end of the process gives it up."""

    def __init__(self, descriptor: int | None):
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock up; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock(path: Path, *, shared: bool = False) -> Lock | None:
    """Lock a file or folder that exists; None if another holder excludes it.

    File systems without locks, and paths that cannot be opened, give a lock that excludes nobody.
    """
    return _lock(path, shared=shared, without=Lock(None))


def try_lock(path: Path) -> Lock | None:
    """Lock a file or folder exclusively; None unless it is certain that nobody else holds it."""
    return _lock(path, shared=False, without=None)


def _lock(path: Path, *, shared: bool, without: Lock | None) -> Lock | None:
    if fcntl is None:
        return without
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return without
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        return without
    return Lock(descriptor)
