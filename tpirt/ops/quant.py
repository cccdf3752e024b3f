"""Weights in 8 and 4 bits: the choice, and what the codes stand for.

Axes: N out_features, K in_features, G = ceil(K / g) groups of g inputs. Symbols: q code, s scale,
z zero point (the value that code 8 stands for).

- int8, one scale per output channel:  ``w ~ q * s``, q in -127..127.
- int4, one scale and zero point per group of one channel:  ``w ~ (q - 8) * s + z``, q in 0..15,
  which is what torch's CPU kernel computes (``ATen/native/cpu/int4mm_kernel.cpp``).

Scales and zero points are bfloat16 because the kernels want them so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tpirt.errors import ConfigError
from tpirt.ops.buffers import round_up

Kind = Literal["none", "int8", "int4"]

GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 64

# The 8-bit kernel reads 16 inputs at a time, unchecked: rows are padded to that.
INT8_INPUTS = 16


@dataclass(frozen=True)
class QuantSpec:
    """How matrices are stored; ``group_size`` is 0 unless ``kind`` is int4."""

    kind: Kind = "none"
    group_size: int = 0

    def __post_init__(self) -> None:
        assert (self.group_size in GROUP_SIZES) if self.kind == "int4" else self.group_size == 0

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Read ``none``, ``int8``, ``int4`` or ``int4:GROUP``.

        Raises:
            ConfigError: anything else.
        """
        kind, colon, group = text.partition(":")
        if kind == "int4" and not colon:
            return cls("int4", DEFAULT_GROUP_SIZE)
        if kind == "int4" and group in map(str, GROUP_SIZES):
            return cls("int4", int(group))
        if text == "none":
            return cls("none")
        if text == "int8":
            return cls("int8")
        sizes = ", ".join(f"int4:{size}" for size in GROUP_SIZES)
        raise ConfigError(f"quantize {text!r}: expected none, int8, int4 or one of {sizes}")

    def __str__(self) -> str:
        return f"int4:{self.group_size}" if self.kind == "int4" else self.kind

    def padded_inputs(self, inputs: int) -> int:
        """K rounded up to what is stored: whole groups, or whole steps of the 8-bit kernel."""
        step = self.group_size if self.kind == "int4" else INT8_INPUTS
        return inputs if self.kind == "none" else round_up(inputs, step)

    @property
    def bits(self) -> float:
        """Stored bits per weight of a large matrix; 0 where nothing is quantized."""
        return {"none": 0.0, "int8": 8.0, "int4": 4 + 32 / max(1, self.group_size)}[self.kind]


AS_THEY_ARE = QuantSpec("none")
