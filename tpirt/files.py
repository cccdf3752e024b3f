"""Files on any file system: what one does not support is left out, what fails is an error."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from pathlib import Path

_WEB_PAGE = "a web page; download the file again"
_STAND_INS = {
    b"version https://git-lfs": "a git-lfs pointer; run `git lfs pull`",
    b"<!doctype": _WEB_PAGE,
    b"<html": _WEB_PAGE,
}
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NOT_FOR_FOLDERS = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF}


def nearest(path: Path) -> Path:
    """The path if it exists, if only as a link, else the first folder above it that does."""
    return next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))


def can_be_made(folder: Path) -> bool:
    """Whether something can be made in a folder, which is made first if it is missing."""
    there = nearest(folder)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def free_bytes(path: Path) -> int | None:
    """Free space of the disk that has the path, or will; None if that cannot be known."""
    try:
        usage = shutil.disk_usage(nearest(path))
    except OSError:  # such as a link to a disk that is not mounted
        return None
    return usage.free if usage.total else None  # some file systems say nothing


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor.

    Raises:
        OSError: it cannot be opened, or is something else, such as a FIFO.
    """
    # Without O_NONBLOCK, opening a FIFO would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def read_regular(path: Path, most_bytes: int = -1) -> bytes:
    """Read a regular file, or its first ``most_bytes``.

    Raises:
        OSError: as :func:`open_regular`, or it cannot be read.
    """
    with open(open_regular(path), "rb") as file:
        return file.read(most_bytes)


def stand_in(head: bytes) -> str | None:
    """What a download has left in a file's place, and what to do; None if it is not known.

    Args:
        head: the file's first bytes.
    """
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((what for magic, what in _STAND_INS.items() if head.startswith(magic)), None)


def sync_file(descriptor: int) -> None:
    """Flush a file to disk, if its file system can.

    Raises:
        OSError: the disk is full, or failed.
    """
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno not in _UNSUPPORTED:
            raise


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, if its file system can (SMB and many FUSE ones cannot).

    Raises:
        OSError: the disk failed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as exc:
        if exc.errno not in _UNSUPPORTED | _NOT_FOR_FOLDERS:
            raise


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file; a crash leaves the old or the new one.

    Any number of processes, also of other hosts, may write it at once.

    Raises:
        OSError: it cannot be written.
    """
    replace_file(path, text.encode(), 0o666)


def replace_file(path: Path, data: bytes, mode: int) -> None:
    """As :func:`write_atomically`, with the permissions ``mode`` as far as the umask has them.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            sync_file(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
