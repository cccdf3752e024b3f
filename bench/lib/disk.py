"""What the disk gives: raw direct reads of the very files that a run reads, as the floor of it.

The readers' buffers are of huge pages and touched before the clock starts. A disk takes so many
pieces of memory per request (254 here): with 4 KiB pages scattered over memory, requests stay
below 1 MiB, and the same reader on the same files got 3.2 GB/s where huge pages gave 7.5.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

_DIRECT = getattr(os, "O_DIRECT", 0)
_HUGE_PAGE = 2 << 20
_LARGEST_READ = 1 << 30  # one system call moves a little below 2 GiB at most


def read_rate(paths: Sequence[Path], readers: int) -> float:
    """Read files whole, once, past the file cache; returns bytes per second.

    Args:
        paths: what to read; each reader takes the next one that is left.
        readers: threads that read side by side, each into one buffer of its own.
    """
    sizes = [path.stat().st_size for path in paths]
    buffers = [_huge_buffer(max(sizes) + mmap.PAGESIZE) for _ in range(readers)]
    left = iter(paths)
    lock = threading.Lock()
    errors: list[OSError] = []

    def read(buffer: memoryview) -> None:
        try:
            for path in _shared(left, lock):
                _read_whole(path, buffer)
        except OSError as exc:
            errors.append(exc)

    threads = [threading.Thread(target=read, args=[b], daemon=True) for b in buffers]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(sizes) / (time.perf_counter() - started)


def every_nth(paths: Sequence[Path], most_bytes: int, start: int) -> list[Path]:
    """Choose evenly spread files of about ``most_bytes`` in all; another ``start``, other files."""
    total = sum(path.stat().st_size for path in paths)
    step = -(-total // most_bytes)
    return list(paths[start % step :: step])


def _huge_buffer(nbytes: int) -> memoryview:
    """Allocate private memory of huge pages, where the system has them, all of it there."""
    size = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE
    if not hasattr(mmap, "MAP_PRIVATE"):
        return memoryview(mmap.mmap(-1, size))
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # another system, or a kernel without them
        buffer.madvise(mmap.MADV_HUGEPAGE)
    for offset in range(0, size, mmap.PAGESIZE):
        buffer[offset] = 1
    return memoryview(buffer)


def _shared(left: Iterator[Path], lock: threading.Lock) -> Iterator[Path]:
    while True:
        with lock:
            path = next(left, None)
        if path is None:
            return
        yield path


def _read_whole(path: Path, buffer: memoryview) -> None:
    try:
        handle = os.open(path, os.O_RDONLY | _DIRECT)
    except OSError:  # a file system that refuses direct reads
        handle = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while count := os.preadv(handle, [buffer[done : done + _LARGEST_READ]], done):
            done += count
    finally:
        os.close(handle)


if __name__ == "__main__":
    folder, number = sys.argv[1:]
    print(read_rate(sorted(Path(folder).glob("**/*.safetensors")), int(number)))
