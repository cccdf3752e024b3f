"""Reservations of a store's disk space for concurrent writers."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from tpirt.errors import StoreError
from tpirt.units import format_bytes

# Space to leave free on a disk for other programs.
RESERVE_BYTES = 1 << 30
_RESERVE_PART = 20  # of a disk, if that is less


class Promise:
    """Space reserved for one writer; :meth:`release` returns the rest."""

    def __init__(self, room: Room, nbytes: int):
        self.nbytes = nbytes
        self._room = room

    def keep(self, nbytes: int) -> None:
        """Record that ``nbytes`` were written and use disk space now."""
        self.nbytes = max(0, self.nbytes - nbytes)

    def release(self) -> None:
        """End the reservation; idempotent."""
        self._room.withdraw(self)


class Room:
    """The free space of a store, minus the reservations of this process.

    Args:
        root: the store's folder.
        limit_bytes: maximum size of the store; None for no limit except the disk.
        used: returns the size of the store.
    """

    def __init__(self, root: Path, limit_bytes: int | None, used: Callable[[], int]):
        self._root = root
        self._limit_bytes = limit_bytes
        self._used = used
        self._promises: set[Promise] = set()
        self._lock = threading.Lock()

    def promise(self, nbytes: int, evict: Callable[[int], None]) -> Promise:
        """Reserve ``nbytes`` for a writer.

        Args:
            nbytes: size of what will be written.
            evict: called with how much the store's limit is exceeded by; may remove something.

        Raises:
            StoreError: the disk or the store's limit has less; the message has the sizes.
            OSError: the folder cannot be read.
        """
        with self._lock:
            needed = nbytes + sum(promise.nbytes for promise in self._promises)
            self._check_disk(needed)
            self._check_limit(needed, evict)
            promise = Promise(self, nbytes)
            self._promises.add(promise)
            return promise

    def check(self, nbytes: int) -> None:
        """Check that ``nbytes`` would fit, if nothing else had to stay. Raises as `promise`."""
        with self._lock:
            needed = nbytes + sum(promise.nbytes for promise in self._promises)
            self._check_disk(needed)
            if self._limit_bytes is not None and needed > self._limit_bytes:
                raise self._too_large(needed)

    def withdraw(self, promise: Promise) -> None:
        """End a reservation."""
        with self._lock:
            self._promises.discard(promise)

    def _check_disk(self, needed: int) -> None:
        usage = shutil.disk_usage(self._root)
        if not usage.total:  # a file system that does not know
            return
        reserve = min(RESERVE_BYTES, usage.total // _RESERVE_PART)
        if usage.free - reserve < needed:
            raise StoreError(
                f"{self._root}: the slice needs {needed:,} bytes, the disk has {usage.free:,} free "
                f"and {reserve:,} of them stay free; make room or choose another --store"
            )

    def _check_limit(self, needed: int, evict: Callable[[int], None]) -> None:
        if self._limit_bytes is None:
            return
        used = self._used()
        if used + needed > self._limit_bytes >= needed:
            evict(used + needed - self._limit_bytes)
            used = self._used()
        if needed > self._limit_bytes:
            raise self._too_large(needed)
        if used + needed > self._limit_bytes:
            raise StoreError(
                f"{self._root}: the slice needs {format_bytes(needed)}, and {format_bytes(used)} "
                f"of the store's limit of {format_bytes(self._limit_bytes)} are in use, or were in "
                "the last ten minutes; end other sessions, remove slices with `tpirt store rm`, or "
                "raise --store-limit"
            )

    def _too_large(self, needed: int) -> StoreError:
        return StoreError(
            f"{self._root}: the slice needs {format_bytes(needed)}, the store may have "
            f"{format_bytes(self._limit_bytes or 0)}; raise --store-limit"
        )
