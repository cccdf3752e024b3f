"""A module run by a wall clock that another process can set.

    python -m bench.lib.jumping_clock OFFSET_FILE MODULE ARGUMENT...

The file has a double: the seconds by which the clock is wrong. There is one wall clock for all
processes of a machine (a time namespace has monotonic clocks only), so ``time.time`` is replaced,
for callers in tpirt: gRPC adds its timeouts to it and compares the sum with the system's clock.
"""

from __future__ import annotations

import mmap
import runpy
import struct
import sys
import time
from pathlib import Path

_OFFSET = struct.Struct("d")


def set_offset(path: Path, seconds: float) -> None:
    """Have the clocks that look at a file be wrong by so much."""
    if not path.exists():
        path.write_bytes(bytes(_OFFSET.size))
    with open(path, "r+b") as file:  # in place: it is mapped
        file.write(_OFFSET.pack(seconds))


def main() -> None:
    """Replace the clock and run the module."""
    _, path, module, *arguments = sys.argv
    with open(path, "rb") as file:
        offset = mmap.mmap(file.fileno(), _OFFSET.size, access=mmap.ACCESS_READ)
    right = time.time

    def wrong() -> float:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return right() + (_OFFSET.unpack(offset)[0] if caller.startswith("tpirt.") else 0.0)

    time.time = wrong
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
