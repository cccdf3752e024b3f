"""Locks on files, released when the holding process ends, on any host.

Process ids would not do: a store can be shared by containers or hosts, whose ids differ.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


class Lock:
    """A held lock, until :meth:`release` or the end of the process."""

    def __init__(self, descriptor: int | None):
        self._descriptor = descriptor

    def release(self) -> None:
        """Release the lock; idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock(path: Path, *, shared: bool = False) -> Lock | None:
    """Lock an existing file; None if another holder excludes it.

    Without support for locks, and for paths that cannot be opened, the lock excludes nobody.
    """
    return _lock(path, shared=shared, without=Lock(None))


def try_lock(path: Path) -> Lock | None:
    """Lock a file exclusively; None if another holder is possible."""
    return _lock(path, shared=False, without=None)


def _lock(path: Path, *, shared: bool, without: Lock | None) -> Lock | None:
    if fcntl is None:
        return without
    try:
        descriptor = _open(path, writable=not shared)
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


def _open(path: Path, *, writable: bool) -> int:
    """Open for locking; NFS excludes others only through a file that is open for writing."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO would wait for its other end
    if writable:
        with contextlib.suppress(OSError):  # a folder, or not ours to write
            return os.open(path, os.O_RDWR | flags)
    return os.open(path, os.O_RDONLY | flags)
