"""Memory of this process and its children: now, and the most since it was last asked."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

_STEADY_S, _LOOK_S, _GIVE_UP_S = 0.5, 0.1, 10.0
_STEADY_BYTES = 1 << 20


def peak_bytes() -> int:
    """The most that one of the processes had resident since :func:`reset_peaks`."""
    return _largest("VmHWM")


def resident_bytes() -> int:
    """What the largest of the processes has resident."""
    return _largest("VmRSS")


def reset_peaks() -> None:
    """Begin again; without the right to, peaks are those since the processes began."""
    for pid in _pids():
        with suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def settled_bytes(read: Callable[[], int] = resident_bytes) -> int:
    """What is resident once that changes no more."""
    began = steady = time.monotonic()
    last = read()
    while time.monotonic() - steady < _STEADY_S and time.monotonic() - began < _GIVE_UP_S:
        time.sleep(_LOOK_S)
        now = read()
        if abs(now - last) > _STEADY_BYTES:
            last, steady = now, time.monotonic()
    return last


def _largest(field: str) -> int:
    return max(_status(pid, field) for pid in _pids())


def _pids() -> list[int]:
    own = psutil.Process()
    return [own.pid, *(child.pid for child in own.children(recursive=True))]


def _status(pid: int, field: str) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return 0
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
