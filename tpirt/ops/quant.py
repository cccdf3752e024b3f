"""Quantization schemes: how matrices are stored, and the meaning of the codes.

Axes: N out_features, K in_features, Kp padded K, g group size, G = Kp / g groups, B rows of a
kernel block, Np = N rounded up to B. Symbols: q code, s scale, z zero point (the value of code 8).

- int8, one scale per output channel: ``w ~ q * s``, q in -127..127.
  ``codes`` int8 (N, Kp), ``scales`` bfloat16 (N,).
- int4, one scale and zero point per group of one channel: ``w ~ (q - 8) * s + z``, q in 0..15,
  as in torch's CPU kernel (``ATen/native/cpu/int4mm_kernel.cpp``).
  ``codes`` uint8 (Np / B, Kp, B / 2) in the order of a :class:`~tpirt.ops.quant_layout.Layout`,
  ``scale_zero`` bfloat16 (G, Np, 2). Padding rows have scale and zero point 0.

Scales and zero points are bfloat16 because torch's kernels require it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F

from tpirt.errors import ConfigError
from tpirt.ops.buffers import Region, round_up
from tpirt.ops.quant_rounding import Workspace, int4_tiles, round_int8

if TYPE_CHECKING:
    from tpirt.ops.quant_layout import Layout
    from tpirt.ops.quant_matrix import QuantMatrix

GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 64

# The 8-bit kernel reads 16 inputs at a time without a bounds check, so rows are padded to that.
INT8_MULTIPLE = 16


@dataclass(frozen=True)
class QuantSpec:
    """How matrices are stored: plain floats; subclasses of :class:`Scheme` store codes.

    Attributes:
        kind: name of the scheme without its parameters.
        uses_layout: whether the order of the codes depends on the CPU.
    """

    kind: ClassVar[str] = "none"
    uses_layout: ClassVar[bool] = False

    @staticmethod
    def parse(text: str) -> QuantSpec:
        """Parse ``none``, ``int8``, ``int4`` or ``int4:GROUP``.

        Raises:
            ConfigError: anything else.
        """
        if text not in _BY_NAME:
            raise ConfigError(f"quantize {text!r}: expected {', '.join(_BY_NAME)}")
        return _BY_NAME[text]

    def __str__(self) -> str:
        return self.kind

    def padded_in_features(self, in_features: int) -> int:
        """Kp: K with padding."""
        return in_features

    @property
    def bits(self) -> float:
        """Stored bits per weight of a large matrix; 0 for plain floats."""
        return 0.0


class Scheme(QuantSpec, ABC):
    """Stores a matrix as codes and scales. Layouts matter only if ``uses_layout``."""

    @abstractmethod
    def regions(self, out_features: int, in_features: int, layout: Layout) -> tuple[Region, Region]:
        """Dtype and shape of codes and scales; offsets are not set."""

    @abstractmethod
    def round_rows(
        self,
        layout: Layout,
        w: torch.Tensor,
        start: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        space: Workspace,
    ) -> None:
        """Quantize some rows; see :func:`tpirt.ops.quant_layout.quantize_rows`."""

    @abstractmethod
    def part(self, matrix: QuantMatrix, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (a view) and scales of rows ``start`` to ``stop``; see ``QuantMatrix.part``."""

    @abstractmethod
    def pieces(
        self, matrix: QuantMatrix, dtype: torch.dtype, elements: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Dequantize a matrix piece by piece; see ``QuantMatrix.pieces``."""

    def output_scales(self, scales: torch.Tensor) -> torch.Tensor | None:
        """Factors (N,) float32 to apply to a product with the pieces; None for no factors."""
        return None


@dataclass(frozen=True)
class Int8(Scheme):
    """8 bits, one scale per output channel."""

    kind = "int8"

    def padded_in_features(self, in_features: int) -> int:
        return round_up(in_features, INT8_MULTIPLE)

    @property
    def bits(self) -> float:
        return 8.0

    def regions(self, out_features: int, in_features: int, layout: Layout) -> tuple[Region, Region]:
        return (
            Region("codes", torch.int8, (out_features, self.padded_in_features(in_features))),
            Region("scales", torch.bfloat16, (out_features,)),
        )

    def round_rows(
        self,
        layout: Layout,
        w: torch.Tensor,
        start: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        space: Workspace,
    ) -> None:
        round_int8(w, codes, scales[start : start + len(w)], space)

    def part(self, matrix: QuantMatrix, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return matrix.codes[start:stop], matrix.scales[start:stop]

    def pieces(
        self, matrix: QuantMatrix, dtype: torch.dtype, elements: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the codes, exact in bfloat16 too; scales are applied to the product."""
        step = max(1, elements // matrix.width)
        scratch = torch.empty(min(step, matrix.out_features), matrix.width, dtype=dtype)
        for start in range(0, matrix.out_features, step):
            codes = matrix.codes[start : start + step]
            yield start, scratch[: codes.shape[0]].copy_(codes)

    def output_scales(self, scales: torch.Tensor) -> torch.Tensor | None:
        return scales.float()


@dataclass(frozen=True)
class Int4(Scheme):
    """4 bits, a scale and a zero point per ``group_size`` inputs of an output channel."""

    kind = "int4"
    uses_layout = True

    group_size: int = DEFAULT_GROUP_SIZE

    def __post_init__(self) -> None:
        assert self.group_size in GROUP_SIZES

    def __str__(self) -> str:
        return f"int4:{self.group_size}"

    def padded_in_features(self, in_features: int) -> int:
        return round_up(in_features, self.group_size)

    @property
    def bits(self) -> float:
        return 4 + 32 / self.group_size

    def regions(self, out_features: int, in_features: int, layout: Layout) -> tuple[Region, Region]:
        width = self.padded_in_features(in_features)
        padded = round_up(out_features, layout.block)
        return (
            Region("codes", torch.uint8, (padded // layout.block, width, layout.block // 2)),
            Region("scale_zero", torch.bfloat16, (width // self.group_size, padded, 2)),
        )

    def round_rows(
        self,
        layout: Layout,
        w: torch.Tensor,
        start: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        space: Workspace,
    ) -> None:
        padding = len(codes) * layout.block - len(w)
        for columns, levels, scale_zero in int4_tiles(w, self.group_size, space):
            layout.pack(F.pad(levels, (0, padding)) if padding else levels, codes[:, columns])
            groups = slice(columns.start // self.group_size, columns.stop // self.group_size)
            scales[groups, start : start + len(w)] = scale_zero.permute(1, 2, 0)

    def part(self, matrix: QuantMatrix, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        block = matrix.layout.block
        codes = matrix.codes[start // block : -(-stop // block)]
        return codes, matrix.scales[:, start : start + block * len(codes)].contiguous()

    def pieces(
        self, matrix: QuantMatrix, dtype: torch.dtype, elements: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield weights; the last piece may extend past the last row, with zeros."""
        layout, width, blocks = matrix.layout, matrix.width, matrix.codes.shape[0]
        step = max(1, min(elements // width // layout.block, blocks))
        scratch = torch.empty(step * layout.block * width, dtype=dtype)
        for first in range(0, blocks, step):
            codes = matrix.codes[first : first + step]
            rows = codes.shape[0] * layout.block
            start = first * layout.block
            turned = scratch[: rows * width].view(width, rows)
            layout.unpack(codes, turned)
            levels = turned.view(-1, self.group_size, rows)
            pairs = matrix.scales[:, start : start + rows]
            scale, zero = (pairs[..., i].to(dtype).unsqueeze(1).contiguous() for i in (0, 1))
            # Rounded once: torch computes bfloat16 addcmul in float32.
            torch.addcmul(zero, levels, scale, out=levels)
            yield start, turned.t()


AS_THEY_ARE = QuantSpec()

_BY_NAME: dict[str, QuantSpec] = {"none": AS_THEY_ARE, "int8": Int8(), "int4": Int4()} | {
    str(scheme): scheme for scheme in map(Int4, GROUP_SIZES)
}
