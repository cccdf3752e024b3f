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

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F

from tpirt.errors import ConfigError
from tpirt.ops.buffers import Region, round_up
from tpirt.ops.quant_rounding import Workspace, int4_tiles, round_int8
from tpirt.ops.quant_units import NibbleCodes, RowCodes, UnitCodes

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
        if text not in SCHEMES:
            raise ConfigError(f"quantize {text!r}: expected {', '.join(SCHEMES)}")
        return SCHEMES[text]

    def __str__(self) -> str:
        return self.kind

    def padded_in_features(self, in_features: int) -> int:
        """Kp: K with padding."""
        return in_features

    def column_step(self, start: int, step: int) -> int:
        """Columns between two cuts of a matrix that change no stored number.

        Args:
            start: the first column that is held, of the checkpoint's matrix.
            step: where cuts are wanted: at multiples of this many columns.

        Returns:
            ``step``, rounded up to what the scheme allows; 0 if the columns stay together.
        """
        return step

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

    # -- units: rectangles that another plan can use; see tpirt.sharding.units -----------------

    @abstractmethod
    def column_step(self, start: int, step: int) -> int:
        """See :meth:`QuantSpec.column_step`."""

    @abstractmethod
    def unit_regions(self, rows: int, columns: int) -> tuple[Region, Region]:
        """Dtype and shape of a unit's codes and scales: the same in every layout."""

    @abstractmethod
    def unit_codes(self, codes: torch.Tensor, layout: Layout) -> UnitCodes:
        """Give access to a matrix's codes by unit."""

    @abstractmethod
    def unit_scales(self, scales: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        """A unit's scales: a view."""

    # -- synthetic weights; see tpirt.weights.synthetic -----------------------------------------

    @abstractmethod
    def random_codes(
        self, draw: Callable[[int], torch.Tensor], in_features: int, nbytes: int, at_once: int
    ) -> Iterator[torch.Tensor]:
        """Yield the bytes of a codes region, drawn evenly; inputs that pad weigh nothing.

        Args:
            draw: gives the next random bytes, uint8 (n,).
            in_features: K.
            nbytes: size of the region.
            at_once: about how many bytes to yield at once.
        """

    @abstractmethod
    def even_scales(self, region: Region, rows: int, std: float) -> torch.Tensor:
        """Scales for codes drawn evenly: weights around 0 of that deviation; padding is 0."""


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

    def column_step(self, start: int, step: int) -> int:
        return 0  # all columns share their row's scale

    def unit_regions(self, rows: int, columns: int) -> tuple[Region, Region]:
        return (
            Region("codes", torch.int8, (rows, columns)),
            Region("scales", torch.bfloat16, (rows,)),
        )

    def unit_codes(self, codes: torch.Tensor, layout: Layout) -> UnitCodes:
        return RowCodes(codes)

    def unit_scales(self, scales: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        return scales[rows]

    def random_codes(
        self, draw: Callable[[int], torch.Tensor], in_features: int, nbytes: int, at_once: int
    ) -> Iterator[torch.Tensor]:
        width = self.padded_in_features(in_features)
        if width > in_features:
            at_once = max(1, at_once // width) * width  # whole rows
        for start in range(0, nbytes, at_once):
            codes = draw(min(at_once, nbytes - start))
            if width > in_features:
                codes.view(-1, width)[:, in_features:] = 0
            yield codes

    def even_scales(self, region: Region, rows: int, std: float) -> torch.Tensor:
        return torch.full(region.shape, std / _even_deviation(256), dtype=region.dtype)


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

    def column_step(self, start: int, step: int) -> int:
        """Whole groups; a shard that begins within a group has groups of its own."""
        return 0 if start % self.group_size else math.lcm(step, self.group_size)

    def unit_regions(self, rows: int, columns: int) -> tuple[Region, Region]:
        return (
            Region("codes", torch.uint8, (columns // 2, rows)),
            Region("scale_zero", torch.bfloat16, (columns // self.group_size, rows, 2)),
        )

    def unit_codes(self, codes: torch.Tensor, layout: Layout) -> UnitCodes:
        return NibbleCodes(codes, layout)

    def unit_scales(self, scales: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        return scales[columns.start // self.group_size : columns.stop // self.group_size, rows]

    def random_codes(
        self, draw: Callable[[int], torch.Tensor], in_features: int, nbytes: int, at_once: int
    ) -> Iterator[torch.Tensor]:
        for start in range(0, nbytes, at_once):  # any byte is two codes
            yield draw(min(at_once, nbytes - start))

    def even_scales(self, region: Region, rows: int, std: float) -> torch.Tensor:
        scale = std / _even_deviation(16)
        scale_zero = torch.zeros(region.shape, dtype=region.dtype)
        scale_zero[:, :rows, 0] = scale
        scale_zero[:, :rows, 1] = scale / 2  # codes 0..15 stand for -7.5..7.5 scales
        return scale_zero


def _even_deviation(levels: int) -> float:
    """Standard deviation of numbers drawn evenly from so many levels."""
    return levels / math.sqrt(12)


AS_THEY_ARE = QuantSpec()

# By the value of ``--quantize``.
SCHEMES: dict[str, QuantSpec] = {"none": AS_THEY_ARE, "int8": Int8(), "int4": Int4()} | {
    str(scheme): scheme for scheme in map(Int4, GROUP_SIZES)
}
