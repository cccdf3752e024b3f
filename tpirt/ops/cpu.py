"""Properties of the CPU that decide which operations are fast."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def bfloat16_units() -> bool:
    """Whether the CPU has units for bfloat16 products (AVX-512 BF16, AMX, Arm BF16).

    False if unknown, because emulated bfloat16 is slower than float32.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    flags = {
        flag
        for line in text.splitlines()
        if line.lower().startswith(("flags", "features"))
        for flag in line.partition(":")[2].split()
    }
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
