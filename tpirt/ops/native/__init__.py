"""Products and what lies between them in C: ``native.h`` has the formats."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from tpirt.ops.native.bindings import NativeKernels


@cache
def native_kernels(threads: int) -> NativeKernels | None:
    """The kernels of this machine with a pool of ``threads``; None if there are none."""
    if os.environ.get("TPIRT_NATIVE") == "off":
        return None
    return NativeKernels(Path("/tmp/native.so"), int(os.environ.get("TPIRT_SET", "2")), threads)
