"""Real memory limits for benchmark processes: a cgroup of version 1 or 2 around each."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_V1 = Path("/sys/fs/cgroup/memory")
_BLKIO_V1 = Path("/sys/fs/cgroup/blkio")
_V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryCgroup:
    """A group of processes with one limit; ``folder`` is None where none could be made."""

    folder: Path | None

    def enter(self) -> None:
        """Put the calling process in: for ``preexec_fn``."""
        if self.folder is not None:
            (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self) -> int | None:
        """Most memory the group has had, file cache included."""
        return self._number("memory.max_usage_in_bytes", "memory.peak")

    def cache_bytes(self) -> int | None:
        """File cache charged to the group now."""
        if self.folder is None:
            return None
        for line in (self.folder / "memory.stat").read_text().splitlines():
            name, value = line.split()
            if name in ("total_cache", "file"):
                return int(value)
        return None

    def _number(self, *names: str) -> int | None:
        for name in names:
            if self.folder is not None and (self.folder / name).exists():
                return int((self.folder / name).read_text())
        return None


NO_CGROUP = MemoryCgroup(None)


@contextlib.contextmanager
def memory_cgroup(
    name: str, limit_bytes: int, warn: Callable[[str], None]
) -> Iterator[MemoryCgroup]:
    """Make a group with a limit; removed at the end, when its processes are gone."""
    version1 = _V1.is_dir()
    folder = (_V1 if version1 else _V2) / f"tpirt-{os.getpid()}-{name}"
    try:
        folder.mkdir()
        limit = "memory.limit_in_bytes" if version1 else "memory.max"
        (folder / limit).write_text(str(limit_bytes))
    except OSError as exc:
        with contextlib.suppress(OSError):
            folder.rmdir()
        warn(f"no memory cgroup ({exc.strerror}): the limit is tpirt's own only")
        yield NO_CGROUP
        return
    try:
        yield MemoryCgroup(folder)
    finally:
        remove_group(folder)


@contextlib.contextmanager
def disk_cgroup(path: Path, bytes_per_s: int, warn: Callable[[str], None]) -> Iterator[None]:
    """Throttle what this process and its children read from the disk that ``path`` is on."""
    version1 = _BLKIO_V1.is_dir()
    root = _BLKIO_V1 if version1 else _V2
    folder = root / f"tpirt-{os.getpid()}-disk"
    device = path.resolve().stat().st_dev
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    node = node.parent if (node / "partition").exists() else node  # throttles are of whole disks
    disk = (node / "dev").read_text().strip()
    try:
        folder.mkdir()
        if version1:
            (folder / "blkio.throttle.read_bps_device").write_text(f"{disk} {bytes_per_s}")
        else:
            (folder / "io.max").write_text(f"{disk} rbps={bytes_per_s}")
        (folder / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as exc:
        with contextlib.suppress(OSError):
            folder.rmdir()
        warn(f"no throttle for the disk ({exc.strerror})")
        yield
        return
    try:
        yield
    finally:
        (root / "cgroup.procs").write_text(str(os.getpid()))
        remove_group(folder)


def remove_group(folder: Path) -> None:
    """Remove a group whose processes have ended or are about to."""
    deadline = time.monotonic() + 10
    while folder.exists():
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)  # the last process is still on its way out
