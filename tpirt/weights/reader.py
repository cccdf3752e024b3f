"""Reading a block file past the file cache, straight into the buffer that is computed from.

A cached read costs up to a whole core and evicts what others have cached; a direct one is the
disk's own copy. ``O_DIRECT`` on Linux, ``F_NOCACHE`` on macOS; elsewhere, and on file systems
that refuse, buffered reads whose pages are given back at once.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from tpirt.errors import StoreError
from tpirt.ops.buffers import round_up

# What O_DIRECT wants of offset, length and address; all disks in use are content with it.
ALIGNMENT = 4096
_LARGEST_READ = 1 << 30  # one system call moves a little below 2 GiB at most


def buffer_bytes(nbytes: int) -> int:
    """Size of the buffer that a read of ``nbytes`` needs."""
    return round_up(nbytes, ALIGNMENT)


def read_file(path: Path, target: memoryview, nbytes: int) -> None:
    """Fill ``target[:nbytes]`` with the file's first bytes.

    Args:
        path: file to read.
        target: page-aligned memory of ``buffer_bytes(nbytes)``, all of which may be written to.
        nbytes: how much is wanted.

    Raises:
        StoreError: the file cannot be read, or ends early; names it.
    """
    assert len(target) == buffer_bytes(nbytes)
    try:
        handle, direct = _open(path)
        try:
            done = _read(handle, target, nbytes)
        except OSError as exc:
            if not (direct and exc.errno == errno.EINVAL):
                raise
            os.close(handle)  # the file system wants larger units than ours
            handle, direct = os.open(path, os.O_RDONLY), False
            done = _read(handle, target, nbytes)
        finally:
            if not direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, nbytes, os.POSIX_FADV_DONTNEED)
            os.close(handle)
    except OSError as exc:
        raise StoreError(
            f"{path}: cannot be read: {exc.strerror}; if it stays so, remove the slice's folder "
            "and start again"
        ) from exc
    if done < nbytes:
        raise StoreError(
            f"{path}: block ends after {done} of {nbytes} bytes; "
            "remove the slice's folder and start again"
        )


def _open(path: Path) -> tuple[int, bool]:
    """Open for direct reads where that is possible; tells whether it is."""
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT), True
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
    handle = os.open(path, os.O_RDONLY)
    try:
        import fcntl

        fcntl.fcntl(handle, fcntl.F_NOCACHE, 1)  # type: ignore[attr-defined]
    except (ImportError, AttributeError, OSError):
        return handle, False
    return handle, True


def _read(handle: int, target: memoryview, nbytes: int) -> int:
    """Read until ``nbytes`` are there or the file ends; returns how many are."""
    done = 0
    while done < nbytes:
        # Whole units to the end: a direct read of a part of one is refused.
        count = os.preadv(handle, [target[done : done + _LARGEST_READ]], done)
        if count == 0:
            break
        done += count
    return min(done, nbytes)
