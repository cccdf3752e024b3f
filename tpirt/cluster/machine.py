"""Properties of this machine and process: memory, threads, bfloat16, identity."""

from __future__ import annotations

import ctypes
import math
import os
import socket
import sys
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F

from tpirt.cluster.cgroup import cpu_quota, memory_group
from tpirt.errors import ConfigError
from tpirt.ops.cpu import bfloat16_units
from tpirt.ops.native.bindings import native_kernels

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h
_MMAP_BYTES, _KEPT_BYTES = 32 << 20, 16 << 20  # the former is the most that glibc takes


def host_id() -> str:
    """Return an id that is equal for processes sharing the memory of :func:`available_bytes`.

    It is that of the machine, or of the container (memory cgroup) whose limit leaves less.
    """
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        machine = f"{uuid.getnode():x}"
    group = memory_group()
    if group is None or group.free_bytes >= _free_bytes():
        return machine
    return f"{machine}/{group.name}"


def host_name() -> str:
    """Return the machine's name, for messages."""
    return socket.gethostname()


def has_bfloat16() -> bool:
    """Whether bfloat16 weights are as fast here as the memory: by units of the CPU, or in C."""
    return bfloat16_units() or native_kernels(1) is not None


def available_bytes() -> int:
    """Return the free memory of this machine, limited by the cgroups of this process.

    Raises:
        ConfigError: the system does not say.
    """
    free, group = _free_bytes(), memory_group()
    return free if group is None else min(free, group.free_bytes)


def _free_bytes() -> int:
    try:
        return int(psutil.virtual_memory().available)
    except OSError as exc:  # as in a chroot without /proc
        raise ConfigError(f"cannot tell how much memory is free: {exc}; mount /proc") from exc


def machine_cores() -> int:
    """Return the number of cores that this process may use; a CPU quota is rounded up."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    quota = cpu_quota()
    return cores if quota >= cores else max(1, math.ceil(quota))


def default_threads(processes: int = 1) -> int:
    """Return the number of compute threads for each of ``processes`` on this machine."""
    return max(1, machine_cores() // processes)


def resident_bytes() -> int:
    """Return this process's resident memory."""
    return int(psutil.Process().memory_info().rss)


@cache
def base_bytes() -> int:
    """Return this process's resident memory without a model.

    Measured at the first call, before the first session: later it would include memory that the
    allocator keeps. torch's kernels run once before, with as many rows as a prompt's, because they
    keep memory: their code, and what they compile.
    """
    for dtype in (torch.float32, torch.bfloat16):
        _run_kernels(dtype)
    release_free_memory()
    return resident_bytes()


def _run_kernels(dtype: torch.dtype) -> None:
    """What a prompt runs, in small."""
    x = torch.ones(128, 1024, dtype=dtype)
    x = F.silu(F.linear(x, torch.ones(1024, 1024, dtype=dtype)))
    F.rms_norm(x.float(), (1024,)).to(dtype)
    heads = x.view(128, 4, 4, 64).permute(1, 2, 0, 3)
    seen = torch.ones(128, 128, dtype=torch.bool).tril()
    F.scaled_dot_product_attention(heads, heads, heads, attn_mask=seen).float().sum().item()


def release_free_memory() -> None:
    """Return the allocator's free memory to the system, if supported (glibc)."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def set_up_allocator() -> None:
    """Have malloc keep memory where it is used again, if it is glibc's; call it before threads.

    One arena for all threads. By default each has an arena of its own, whose end
    :func:`release_free_memory` cannot return. A peer kept 86 MiB more after seven different
    sessions, and exceeded its memory limit; with one arena 29 MiB.

    Large temporaries come from the arena, whose free end is kept. By default each layer of a long
    prompt returned it to the system: a prompt of 512 tokens took 170,000 page faults and up to 9 %
    longer. Not more is kept, because it counts towards a memory limit: with 64 MiB, 16 users of a
    1.1 B model in 600 MiB took 610, with 16 MiB 594 and the same time.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def peak_resident_bytes() -> int:
    """Return this process's peak resident memory.

    ``VmHWM`` if there is a /proc: unlike ``ru_maxrss`` it does not start at the parent's peak.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
