"""Limits of the control groups (cgroups v1 and v2) of this process: memory and CPU time.

A group's limit holds for all groups in it, so the own group and all visible parents count. In a
container, files outside it are not visible; version 1 reports the tightest limit of all parents in
``memory.stat``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")
_UNLIMITED = 1 << 60  # version 1 reports no limit as the largest number of pages
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class MemoryGroup:
    """A group with a memory limit.

    Attributes:
        name: identifies the group on this machine, also from within its container.
        limit_bytes: its limit.
        used_bytes: what it has in use; the page cache is not, because it gives way.
    """

    name: str
    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        """The memory that its processes can still take."""
        return max(0, self.limit_bytes - self.used_bytes)


def memory_group(root: Path = _ROOT) -> MemoryGroup | None:
    """The group, of the own one and its parents, with the least free memory; None without a limit.

    Args:
        root: folder that holds ``proc`` and the mounted hierarchies.
    """
    groups = (_memory_of(folder) for folder in _groups(root, "memory"))
    limited = [group for group in groups if group is not None]
    return min(limited, key=lambda group: group.free_bytes, default=None)


def cpu_quota(root: Path = _ROOT) -> float:
    """The processors' worth of time that this process may use at once; infinite without a quota."""
    return min((_quota_of(folder) for folder in _groups(root, "cpu")), default=math.inf)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the process's groups under a controller, from the own group upwards."""
    for mount, inner in _hierarchies(root, controller):
        folder = mount / inner
        while True:
            yield folder
            if folder == mount:
                break
            folder = folder.parent


def _hierarchies(root: Path, controller: str) -> Iterator[tuple[Path, Path]]:
    """Mounted hierarchies with a controller, and the path of the process's group in each."""
    own = _own_paths(root)
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, *_, options) = before.split(), (*after.split(), "", "")[:3]
        path = own.get(controller if kind == "cgroup" else "")
        if kind not in ("cgroup", "cgroup2") or path is None or len(fields) < 5:
            continue
        if kind == "cgroup" and controller not in options.split(","):
            continue
        top, mount = map(_unescaped, fields[3:5])
        # A container without a namespace has its own group mounted as the top of the hierarchy.
        inner = Path(path).relative_to(top) if Path(path).is_relative_to(top) else Path()
        yield root / mount.lstrip("/"), inner


def _own_paths(root: Path) -> dict[str, str]:
    """The path of the process's group by controller of version 1; "" for version 2."""
    paths = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        # Groups above the top of the namespace begin with "/..".
        paths.update(dict.fromkeys(controllers.split(","), path.replace("/..", "") or "/"))
    return paths


def _memory_of(folder: Path) -> MemoryGroup | None:
    stat = dict(re.findall(r"(\w+) (\d+)", _read(folder / "memory.stat")))
    if (used := _number(folder / "memory.current")) is not None:
        limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
        prefix = ""
    elif (used := _number(folder / "memory.usage_in_bytes")) is not None:
        limits = [_number(folder / "memory.limit_in_bytes")]
        limits += [int(stat.get("hierarchical_memory_limit", _UNLIMITED))]
        prefix = "total_"
    else:
        return None
    limit = min((each for each in limits if each is not None), default=_UNLIMITED)
    if limit >= _UNLIMITED:
        return None
    cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    return MemoryGroup(f"{folder.stat().st_ino:x}", limit, max(0, used - cache))


def _quota_of(folder: Path) -> float:
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    if not quota:
        quota = _read(folder / "cpu.cfs_quota_us").strip()
        period = _read(folder / "cpu.cfs_period_us").strip()
    if not (quota.isdecimal() and period.isdecimal() and int(period)):  # "max", and -1
        return math.inf
    return int(quota) / int(period)


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None  # "max"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _unescaped(text: str) -> str:
    """Decode the kernel's escapes of spaces and backslashes in a path."""
    return _OCTAL.sub(lambda found: chr(int(found[1], 8)), text)
