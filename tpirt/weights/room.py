"""Room on a store's disk, promised to writers that are under way side by side."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from tpirt.errors import StoreError
from tpirt.units import format_bytes

# What stays free on a disk: a full one stops more than tpirt.
RESERVE_BYTES = 1 << 30
_RESERVE_PART = 20  # of a disk, where that is less


class Promise:
    """Room that one writer may fill; :meth:`release` gives back what it did not."""

    def __init__(self, room: Room, nbytes: int):
        self.nbytes = nbytes
        self._room = room

    def keep(self, nbytes: int) -> None:
        """Take note that so many bytes are written: the disk counts them now."""
        self.nbytes = max(0, self.nbytes - nbytes)

    def release(self) -> None:
        """Expect no more from this writer; a second call does nothing."""
        self._room.withdraw(self)


class Room:
    """A store's disk and limit, less what writers of this process have been promised.

    Args:
        root: the store's folder.
        limit_bytes: most bytes that it may take; None for no limit but the disk's.
        used: counts the bytes that it takes.
    """

    def __init__(self, root: Path, limit_bytes: int | None, used: Callable[[], int]):
        self._root = root
        self._limit_bytes = limit_bytes
        self._used = used
        self._promises: set[Promise] = set()
        self._lock = threading.Lock()

    def promise(self, nbytes: int) -> Promise:
        """Promise a writer ``nbytes``.

        Raises:
            StoreError: the disk, or the store's limit, leaves less; says how much.
            OSError: the folder cannot be looked at.
        """
        with self._lock:
            needed = nbytes + sum(promise.nbytes for promise in self._promises)
            self._check_disk(needed)
            self._check_limit(needed)
            promise = Promise(self, nbytes)
            self._promises.add(promise)
            return promise

    def withdraw(self, promise: Promise) -> None:
        """Forget a promise."""
        with self._lock:
            self._promises.discard(promise)

    def _check_disk(self, needed: int) -> None:
        usage = shutil.disk_usage(self._root)
        reserve = min(RESERVE_BYTES, usage.total // _RESERVE_PART)
        if usage.free - reserve < needed:
            raise StoreError(
                f"{self._root}: the slice needs {needed:,} bytes, the disk has {usage.free:,} free "
                f"and {reserve:,} of them stay free; make room or choose another --store"
            )

    def _check_limit(self, needed: int) -> None:
        if self._limit_bytes is None:
            return
        used = self._used()
        if used + needed > self._limit_bytes:
            raise StoreError(
                f"{self._root}: the slice needs {format_bytes(needed)}, the store has "
                f"{format_bytes(used)} of its limit of {format_bytes(self._limit_bytes)}; "
                "remove slices with `tpirt store rm`, or raise --store-limit"
            )
