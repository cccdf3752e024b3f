"""The limits of containers, on trees as /proc and /sys/fs/cgroup of versions 1 and 2 show them."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from tpirt.cluster import machine
from tpirt.cluster.cgroup import MemoryGroup, cpu_quota, memory_group
from tpirt.errors import ConfigError

MIB = 1 << 20
V1_UNLIMITED = "9223372036854771712"
V1_MEMORY = Path("/sys/fs/cgroup/memory")
Memory = namedtuple("Memory", "available")


def tree(
    root: Path,
    own: str,
    mounts: str,
    groups: Mapping[str, Mapping[str, object]],
) -> Path:
    """A file system with ``/proc/self/cgroup``, ``mountinfo`` and files of groups."""
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(own)
    (proc / "mountinfo").write_text(mounts)
    for group, files in groups.items():
        folder = root / group.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(f"{content}\n")
    return root


def v2(root: Path, own: str, groups: Mapping[str, Mapping[str, object]]) -> Path:
    line = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    named = {f"/sys/fs/cgroup{group}": files for group, files in groups.items()}
    return tree(root, f"0::{own}\n", line, named)


def v1(root: Path, own: str, groups: Mapping[str, Mapping[str, object]], *, top: str = "/") -> Path:
    paths = f"9:name=systemd:/\n4:memory:{own}\n3:cpu,cpuacct:{own}\n0::/elsewhere\n"
    mounts = (
        f"31 30 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
        f"35 30 0:32 {top} /sys/fs/cgroup/memory rw shared:3 - cgroup cgroup rw,memory\n"
        "36 30 0:33 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    )
    named = {f"/sys/fs/cgroup{group}": files for group, files in groups.items()}
    return tree(root, paths, mounts, named)


def used2(limit: object, current: int, cache: int = 0) -> dict[str, object]:
    stat = f"anon 1\nfile {cache}\ninactive_file {cache // 2}\nactive_file {cache // 2}"
    return {"memory.max": limit, "memory.current": current, "memory.stat": stat}


def used1(limit: object, usage: int, cache: int = 0) -> dict[str, object]:
    stat = f"inactive_file 0\ntotal_inactive_file {cache // 2}\ntotal_active_file {cache // 2}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage, "memory.stat": stat}


def free(root: Path) -> int | None:
    group = memory_group(root)
    return None if group is None else group.free_bytes


# -- memory ----------------------------------------------------------------------------------


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert memory_group(tmp_path) is None
    assert cpu_quota(tmp_path) == math.inf


def test_own_group_counts_in_version_2(tmp_path: Path) -> None:
    groups = {"/": {}, "/a.slice": used2("max", 900), "/a.slice/b": used2(700 * MIB, 100 * MIB)}
    assert free(v2(tmp_path, "/a.slice/b", groups)) == 600 * MIB


def test_parent_counts_where_it_is_tighter(tmp_path: Path) -> None:
    groups = {"/a": used2(500 * MIB, 450 * MIB), "/a/b": used2(700 * MIB, 100 * MIB), "/a/b/c": {}}
    assert free(v2(tmp_path, "/a/b/c", groups)) == 50 * MIB


def test_soft_limit_that_slows_a_group_down_counts(tmp_path: Path) -> None:
    group = {**used2("max", 100 * MIB), "memory.high": 300 * MIB}
    assert free(v2(tmp_path, "/a", {"/a": group})) == 200 * MIB


def test_own_group_and_parents_count_in_version_1(tmp_path: Path) -> None:
    groups = {
        "/memory": used1(V1_UNLIMITED, 9000 * MIB),
        "/memory/a": used1(600 * MIB, 500 * MIB),
        "/memory/a/b": used1(V1_UNLIMITED, 100 * MIB),
    }
    assert free(v1(tmp_path, "/a/b", groups)) == 100 * MIB


def test_container_that_sees_its_group_as_the_top(tmp_path: Path) -> None:
    """Docker with version 1: the path is the host's, and the group itself is mounted."""
    groups = {"/memory": used1(600 * MIB, 200 * MIB)}
    assert free(v1(tmp_path, "/docker/4f", groups, top="/docker/4f")) == 400 * MIB


def test_parents_out_of_a_containers_sight_count_in_version_1(tmp_path: Path) -> None:
    group = used1(V1_UNLIMITED, 100 * MIB)
    group["memory.stat"] = f"hierarchical_memory_limit {300 * MIB}"
    assert free(v1(tmp_path, "/", {"/memory": group})) == 200 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_page_cache_does_not_count_as_used(tmp_path: Path, version: int) -> None:
    if version == 1:
        groups = {"/memory/a": used1(600 * MIB, 590 * MIB, cache=500 * MIB)}
        root = v1(tmp_path, "/a", groups)
    else:
        root = v2(tmp_path, "/a", {"/a": used2(600 * MIB, 590 * MIB, cache=500 * MIB)})
    assert free(root) == 510 * MIB


def test_free_memory_is_never_negative(tmp_path: Path) -> None:
    assert free(v2(tmp_path, "/a", {"/a": used2(600 * MIB, 650 * MIB)})) == 0


def test_paths_with_spaces_and_groups_outside_the_namespace(tmp_path: Path) -> None:
    line = "30 23 0:26 / /sys/my\\040groups rw - cgroup2 cgroup2 rw\n"
    root = tree(tmp_path, "0::/../other\n", line, {"/sys/my groups": used2(600 * MIB, 100 * MIB)})
    assert free(root) == 500 * MIB


def test_free_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/proc/meminfo")

    monkeypatch.setattr(psutil, "virtual_memory", unknown)
    with pytest.raises(ConfigError, match=r"memory is free: .*/proc/meminfo'; mount /proc"):
        machine.available_bytes()


# -- identity --------------------------------------------------------------------------------


def test_containers_with_limits_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(4000 * MIB))

    def host(group: MemoryGroup | None) -> str:
        monkeypatch.setattr(machine, "memory_group", lambda: group)
        return machine.host_id()

    unlimited = host(None)
    first, second = (host(MemoryGroup(name, 600 * MIB, 0)) for name in "ab")
    assert len({unlimited, first, second}) == 3
    assert host(MemoryGroup("a", 600 * MIB, 300 * MIB)) == first
    assert host(MemoryGroup("c", 8000 * MIB, 0)) == unlimited  # the machine has less
    assert first.startswith(f"{unlimited}/")


# -- CPU time --------------------------------------------------------------------------------


def test_quota_of_own_group_or_parent(tmp_path: Path) -> None:
    groups = {
        "/a": {"cpu.max": "150000 100000"},
        "/a/b": {"cpu.max": "max 100000"},
    }
    assert cpu_quota(v2(tmp_path, "/a/b", groups)) == 1.5


def test_quota_in_version_1(tmp_path: Path) -> None:
    groups = {
        "/cpu,cpuacct": {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100_000},
        "/cpu,cpuacct/a": {"cpu.cfs_quota_us": 50_000, "cpu.cfs_period_us": 100_000},
    }
    assert cpu_quota(v1(tmp_path, "/a", groups)) == 0.5


@pytest.mark.parametrize(("quota", "cores"), [(0.5, 1), (1.2, 2), (2.0, 2), (64.0, 4)])
def test_quota_bounds_the_threads(
    monkeypatch: pytest.MonkeyPatch, quota: float, cores: int
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.machine_cores() == machine.default_threads() == cores


# -- the real thing --------------------------------------------------------------------------

_PROBE = """
import sys
from pathlib import Path
(Path(sys.argv[1]) / "cgroup.procs").write_text("0")
from tpirt.cluster.cgroup import memory_group
print(memory_group().limit_bytes)
"""


def test_limit_of_a_nested_group_of_this_machine_is_seen() -> None:
    group = V1_MEMORY / f"tpirt-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(300 * MIB))
        (group / "inner").mkdir()
    except OSError:
        pytest.skip("needs root and memory cgroups of version 1")
    try:
        arguments = [sys.executable, "-c", _PROBE, str(group / "inner")]
        seen = subprocess.run(arguments, capture_output=True, text=True, check=True)
        assert int(seen.stdout) == 300 * MIB
    finally:
        (group / "inner").rmdir()
        group.rmdir()
