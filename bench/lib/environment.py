"""Where a result comes from: the code that ran, the machine that it ran on, and what else did."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

import tpirt
from tpirt.version import __version__

# What decides which matrix product runs, on x86 and on Arm.
_CPU_FLAGS = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "neon", "asimddp", "i8mm", "bf16", "sve"),
)
_MEMORY_BYTES = 256 << 20
_MEMORY_PASSES = 3


@dataclass(frozen=True)
class Environment:
    """What a result is traced to.

    ``commit`` and ``dirty`` are None outside a git checkout; a dirty one has changes in tracked
    files. ``memory_bytes_per_s`` is the read rate by number of threads.
    """

    tpirt: str
    commit: str | None
    dirty: bool | None
    date: str
    cpu: str
    cpu_flags: list[str]
    cores: int
    memory_bytes_per_s: dict[int, float]
    system: str
    python: str
    torch: str
    load_average: float | None


def current_environment() -> Environment:
    """Describe this moment; measures memory for less than half a second."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # first: we are load as well
    commit, dirty = git_state(Path(tpirt.__file__).parents[1])
    cpu, flags = _cpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Environment(
        tpirt=__version__,
        commit=commit,
        dirty=dirty,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=cpu,
        cpu_flags=flags,
        cores=cores or 1,
        memory_bytes_per_s=memory_rates(cores or 1),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        load_average=load,
    )


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Return the commit of a checkout, and whether tracked files differ from it."""
    if _git(root, "rev-parse", "--show-toplevel") != str(root.resolve()):
        return None, None
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return _git(root, "rev-parse", "HEAD"), None if changes is None else bool(changes)


def memory_rates(cores: int) -> dict[int, float]:
    """Measure how fast 1 thread and one per core read memory: the best of three passes.

    256 MiB exceed most caches; where they do not, the rate is that of the cache.
    """
    threads_before = torch.get_num_threads()
    data = torch.ones(_MEMORY_BYTES // 4)
    rates = {}
    try:
        for threads in sorted({1, cores}):
            torch.set_num_threads(threads)
            rates[threads] = _MEMORY_BYTES / min(_dot_s(data) for _ in range(_MEMORY_PASSES))
    finally:
        torch.set_num_threads(threads_before)
    return rates


def _dot_s(data: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.dot(data, data)
    return time.perf_counter() - started


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> tuple[str, list[str]]:
    """The CPU's name and those of its features that matter here."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), []
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(found[1].split()) if found else set()
    return (
        name[1].strip() if name else platform.machine(),
        [flag for flag in _CPU_FLAGS if flag in present],
    )
