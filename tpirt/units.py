"""Human-readable sizes."""

from __future__ import annotations

import re

from tpirt.errors import ConfigError

_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Parse ``900M``, ``1.5G``, ``2GiB`` or plain bytes; units are powers of 1024.

    Raises:
        ConfigError: not a size above zero.
    """
    match = _SIZE.fullmatch(text)
    size = float(match[1]) * _FACTORS[match[2].upper()] if match else 0.0
    if not 1 <= size < 2**63:
        raise ConfigError(f"size {text!r}: expected a number with K, M or G, such as 900M or 1.5G")
    return int(size)


def format_bytes(count: float) -> str:
    """Format a size with three significant digits: ``1.46 GiB``."""
    units = iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while abs(count) >= 1000:
        count /= 1024
        unit = next(units, "TiB")
    return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 100 else f"{count:.3g} {unit}"
