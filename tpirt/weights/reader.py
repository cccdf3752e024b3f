"""Read block files without the page cache, into the buffers that are computed from.

A cached read uses up to a whole core and evicts other files from the cache; a direct one is DMA.
``O_DIRECT`` on Linux, ``F_NOCACHE`` on macOS. Elsewhere, and on file systems without direct I/O,
reads are buffered and their pages are dropped at once.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tpirt.errors import StoreError
from tpirt.ops.buffers import round_up

# Alignment of offset, length and address for O_DIRECT; enough for common disks.
ALIGNMENT = 4096
_LARGEST_READ = 1 << 30  # of one system call; the limit is just below 2 GiB


def buffer_bytes(nbytes: int) -> int:
    """Size of the buffer for a read of ``nbytes``."""
    return round_up(nbytes, ALIGNMENT)


def read_file(path: Path, target: memoryview, nbytes: int) -> None:
    """Fill ``target[:nbytes]`` with the file's first bytes.

    Args:
        path: file to read.
        target: page-aligned memory of ``buffer_bytes(nbytes)``, all of which may be written to.
        nbytes: number of bytes to read.

    Raises:
        StoreError: the file cannot be read, or ends early.
    """
    assert len(target) == buffer_bytes(nbytes)
    try:
        handle, direct = _open(path)
        try:
            done = _read(handle, target, nbytes)
        except OSError:
            if not direct:
                raise
            os.close(handle)  # a larger alignment is needed, or direct reads fail otherwise
            handle, direct = os.open(path, os.O_RDONLY), False
            done = _read(handle, target, nbytes)
        finally:
            if not direct and hasattr(os, "posix_fadvise"):
                with contextlib.suppress(OSError):
                    os.posix_fadvise(handle, 0, nbytes, os.POSIX_FADV_DONTNEED)
            os.close(handle)
    except OSError as exc:
        raise StoreError(
            f"{path}: cannot be read: {exc.strerror}; if this repeats, delete {path.parent}; it "
            "will be recreated"
        ) from exc
    if done < nbytes:
        raise StoreError(
            f"{path}: block ends after {done} of {nbytes} bytes; delete {path.parent}; it will be "
            "recreated"
        )


def _open(path: Path) -> tuple[int, bool]:
    """Open for direct reads if possible; returns whether it is."""
    if hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # which error means "not here" depends on the system
            return os.open(path, os.O_RDONLY | os.O_DIRECT), True
    handle = os.open(path, os.O_RDONLY)
    try:
        import fcntl

        fcntl.fcntl(handle, fcntl.F_NOCACHE, 1)  # type: ignore[attr-defined]
    except (ImportError, AttributeError, OSError):
        return handle, False
    return handle, True


def _read(handle: int, target: memoryview, nbytes: int) -> int:
    """Read up to ``nbytes``, fewer only at the end of the file; returns the number."""
    done = 0
    while done < nbytes:
        # Always to the end of the buffer: direct reads must be aligned.
        count = os.preadv(handle, [target[done : done + _LARGEST_READ]], done)
        if count == 0:
            break
        done += count
    return min(done, nbytes)
