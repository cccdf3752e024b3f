"""Quantization schemes: how matrices are stored, and the meaning of the codes.

Axes: N out_features, Np N rounded up to 16; K in_features, Kp K rounded up to 32; G = Kp / 32
groups. Codes are in the order of :mod:`tpirt.ops.tiles`, the same on every CPU.

- int8, a scale per output channel: ``w ~ q * s``, q in -127..127.
  ``codes`` int8 (Np / 16, G, 512), ``scales`` float32 (Np,).
- int4, a scale and a zero point per 32 inputs of an output channel: ``w ~ s * (q - 8 + t / 12)``, q
  in 0..15. ``codes`` uint8 (Np / 16, G, 256), ``scales`` int16 (Np / 16, G, 16): words of
  :mod:`tpirt.ops.quant_words`. 4.5 bits a weight.
- nl4, the same with 16 levels at unequal distances: ``w ~ s * (levels[q] + o)``, levels
  in -127..127, o even.

A tile needs nothing from outside of it, so any rectangle of groups can be cut out of a matrix in
4 bits without a change of its numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from tpirt.errors import ConfigError
from tpirt.ops.buffers import Region, round_up
from tpirt.ops.native.bindings import available_kernels, native_kernels
from tpirt.ops.quant_codebook import IQ4_NL
from tpirt.ops.quant_rounding import Workspace, check_weights, int4_tiles, round_int8
from tpirt.ops.quant_units import Int4Units, Int8Units, MatrixUnits
from tpirt.ops.quant_words import (
    on_codebook_grid,
    split_codebook_words,
    split_words,
    to_codebook_words,
    to_words,
)
from tpirt.ops.tiles import (
    TILE_INPUTS,
    TILE_ROWS,
    pack_bytes,
    pack_nibbles,
    unpack_bytes,
    unpack_groups,
    unpack_nibbles,
)

if TYPE_CHECKING:
    from tpirt.ops.quant_matrix import QuantMatrix


@dataclass(frozen=True)
class QuantSpec:
    """How matrices are stored: plain floats; subclasses of :class:`Scheme` store codes.

    Attributes:
        kind: name of the scheme.
    """

    kind: ClassVar[str] = "none"

    @staticmethod
    def parse(text: str) -> QuantSpec:
        """Parse ``none``, ``int8``, ``int4`` or ``nl4``.

        Raises:
            ConfigError: anything else.
        """
        if text not in SCHEMES:
            raise ConfigError(f"quantize {text!r}: expected {', '.join(SCHEMES)} (or auto)")
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
    """Stores a matrix as codes and scales."""

    @property
    def levels(self) -> tuple[int, ...]:
        """The 16 levels that codes are indices of; none if codes are numbers."""
        return ()

    def padded_in_features(self, in_features: int) -> int:
        return round_up(in_features, TILE_INPUTS)

    @abstractmethod
    def regions(self, out_features: int, in_features: int) -> tuple[Region, Region]:
        """Dtype and shape of codes and scales; offsets are not set."""

    @abstractmethod
    def round_rows(
        self,
        w: torch.Tensor,
        start: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        space: Workspace,
    ) -> None:
        """Quantize some rows of a matrix.

        Rows are independent: any split at multiples of 16, in any order and thread, gives the same
        bytes. Memory in ``space`` grows with the rows.

        Args:
            w: (n, K), any float dtype; rows of the matrix from ``start`` on.
            start: index of the first row, a multiple of 16.
            codes: the codes region of n rows; overwritten.
            scales: the scales region of the whole matrix, initially zero; entries of these rows
                are overwritten.
            space: scratch memory.

        Raises:
            CheckpointError: a weight is not finite, or too large for the scheme.
        """

    @abstractmethod
    def part(self, matrix: QuantMatrix, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales, views, of rows ``start`` to ``stop``; see ``QuantMatrix.part``."""

    @abstractmethod
    def rows(self, matrix: QuantMatrix, start: int, stop: int, space: torch.Tensor) -> torch.Tensor:
        """Dequantize rows ``start`` to ``stop``, multiples of 16: (stop - start, Kp).

        Multiply a product with them by :meth:`output_scales`.

        Args:
            space: flat memory of as many elements, in the dtype of the result, which may use it:
                new pages would take longer than the work.
        """

    def output_scales(self, scales: torch.Tensor) -> torch.Tensor | None:
        """Factors (Np,) float32 to apply to a product with the rows; None for no factors."""
        return None

    # -- units: rectangles that another plan can use; see tpirt.sharding.units -----------------

    @abstractmethod
    def column_step(self, start: int, step: int) -> int:
        """See :meth:`QuantSpec.column_step`."""

    @abstractmethod
    def unit_regions(self, rows: int, columns: int) -> tuple[Region, Region]:
        """Dtype and shape of a unit's codes and scales."""

    @abstractmethod
    def units(self, codes: torch.Tensor, scales: torch.Tensor) -> MatrixUnits:
        """Give access to a matrix by unit."""

    # -- synthetic weights; see tpirt.weights.synthetic -----------------------------------------

    @abstractmethod
    def even_scales(self, region: Region, rows: int, std: float) -> torch.Tensor:
        """Scales for codes drawn evenly: weights around 0 of that deviation; padding is 0."""


@dataclass(frozen=True)
class Int8(Scheme):
    """8 bits, one scale per output channel."""

    kind = "int8"

    @property
    def bits(self) -> float:
        return 8.0

    def regions(self, out_features: int, in_features: int) -> tuple[Region, Region]:
        rows, groups = _tiles(out_features, in_features)
        return (
            Region("codes", torch.int8, (rows // TILE_ROWS, groups, TILE_ROWS * TILE_INPUTS)),
            Region("scales", torch.float32, (rows,)),
        )

    def round_rows(
        self,
        w: torch.Tensor,
        start: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        space: Workspace,
    ) -> None:
        rows = len(codes) * TILE_ROWS
        levels = space.take("levels", torch.int8, rows, codes.shape[1] * TILE_INPUTS)
        levels[len(w) :] = 0
        round_int8(w, levels[: len(w)], scales[start : start + len(w)], space)
        pack_bytes(levels, codes)

    def part(self, matrix: QuantMatrix, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, last = start // TILE_ROWS, -(-stop // TILE_ROWS)
        return matrix.codes[first:last], matrix.scales[first * TILE_ROWS : last * TILE_ROWS]

    def rows(self, matrix: QuantMatrix, start: int, stop: int, space: torch.Tensor) -> torch.Tensor:
        """The codes, exact in bfloat16 too; scales are applied to the product."""
        native = available_kernels()
        if native is not None:
            return native.dense(matrix.native, start // TILE_ROWS, -(-stop // TILE_ROWS), space)
        return unpack_bytes(matrix.codes[start // TILE_ROWS : stop // TILE_ROWS]).to(space.dtype)

    def output_scales(self, scales: torch.Tensor) -> torch.Tensor | None:
        return scales

    def column_step(self, start: int, step: int) -> int:
        return 0  # all columns share their row's scale

    def unit_regions(self, rows: int, columns: int) -> tuple[Region, Region]:
        return (
            Region("codes", torch.int8, (rows, columns)),
            Region("scales", torch.float32, (rows,)),
        )

    def units(self, codes: torch.Tensor, scales: torch.Tensor) -> MatrixUnits:
        return Int8Units(codes, scales)

    def even_scales(self, region: Region, rows: int, std: float) -> torch.Tensor:
        scales = torch.zeros(region.shape, dtype=region.dtype)
        scales[:rows] = std / _even_deviation(256)
        return scales


@dataclass(frozen=True)
class Int4(Scheme):
    """4 bits, a scale and a zero point per 32 inputs of an output channel."""

    kind = "int4"

    @property
    def bits(self) -> float:
        return 4 + 16 / TILE_INPUTS

    def regions(self, out_features: int, in_features: int) -> tuple[Region, Region]:
        rows, groups = _tiles(out_features, in_features)
        blocks = rows // TILE_ROWS
        return (
            Region("codes", torch.uint8, (blocks, groups, TILE_ROWS * TILE_INPUTS // 2)),
            Region("scales", torch.int16, (blocks, groups, TILE_ROWS)),
        )

    def round_rows(
        self,
        w: torch.Tensor,
        start: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        space: Workspace,
    ) -> None:
        rows, first = len(codes) * TILE_ROWS, start // TILE_ROWS
        native = native_kernels(1)
        if native is not None:
            x = space.take("x", torch.float32, *w.shape).copy_(w)
            check_weights(x)
            native.fit4(x, self.levels, codes, scales[first : first + len(codes)])
            return
        for columns, levels, words in int4_tiles(w, rows, space, levels=self.levels):
            groups = slice(columns.start // TILE_INPUTS, columns.stop // TILE_INPUTS)
            pack_nibbles(levels.t(), codes[:, groups])
            packed = words.view(len(words), -1, TILE_ROWS).transpose(0, 1)
            scales[first : first + len(codes), groups] = packed

    def part(self, matrix: QuantMatrix, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, last = start // TILE_ROWS, -(-stop // TILE_ROWS)
        return matrix.codes[first:last], matrix.scales[first:last]

    def rows(self, matrix: QuantMatrix, start: int, stop: int, space: torch.Tensor) -> torch.Tensor:
        native = available_kernels()
        if native is not None:
            return native.dense(matrix.native, start // TILE_ROWS, -(-stop // TILE_ROWS), space)
        blocks = slice(start // TILE_ROWS, stop // TILE_ROWS)
        scale, offset = self._split(unpack_groups(matrix.scales[blocks]))
        codes = unpack_nibbles(matrix.codes[blocks])
        levels = self._levels_of(codes.view(len(codes), -1, TILE_INPUTS))
        return levels.add_(offset.unsqueeze(2)).mul_(scale.unsqueeze(2)).flatten(1).to(space.dtype)

    def _split(self, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and offsets: a weight is ``scale * (level + offset)``."""
        return split_words(words)

    def _levels_of(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes stand for, float32."""
        return codes.float()

    def column_step(self, start: int, step: int) -> int:
        """Whole groups; a shard that begins within a group has groups of its own."""
        return 0 if start % TILE_INPUTS else math.lcm(step, TILE_INPUTS)

    def unit_regions(self, rows: int, columns: int) -> tuple[Region, Region]:
        return (
            Region("codes", torch.uint8, (rows, columns // 2)),
            Region("scales", torch.int16, (rows, columns // TILE_INPUTS)),
        )

    def units(self, codes: torch.Tensor, scales: torch.Tensor) -> MatrixUnits:
        return Int4Units(codes, scales)

    def even_scales(self, region: Region, rows: int, std: float) -> torch.Tensor:
        word = self._even_word(std)
        scales = torch.zeros(region.shape, dtype=region.dtype)
        by_row = scales.transpose(1, 2)  # (blocks, 16, groups)
        by_row[: rows // TILE_ROWS] = word
        by_row[rows // TILE_ROWS :, : rows % TILE_ROWS] = word
        return scales

    def _even_word(self, std: float) -> torch.Tensor:
        """The word of codes drawn evenly."""
        scale = torch.full((1,), std / _even_deviation(16))
        # Codes 0..15 stand for -7.5..7.5 scales.
        return to_words(scale, scale / 2)


@dataclass(frozen=True)
class Codebook(Int4):
    """4 bits, a scale and an offset per 32 inputs, and levels at unequal distances."""

    kind = "nl4"
    levels: tuple[int, ...] = IQ4_NL

    def _split(self, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return split_codebook_words(words)

    def _levels_of(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.levels, dtype=torch.float32)[codes.int()]

    def _even_word(self, std: float) -> torch.Tensor:
        levels = torch.tensor(self.levels, dtype=torch.float32)
        scale = std / levels.std(correction=0, keepdim=True)
        return to_codebook_words(*on_codebook_grid(scale, -levels.mean(0, keepdim=True)))


def _tiles(out_features: int, in_features: int) -> tuple[int, int]:
    """Rows with padding, and groups."""
    return round_up(out_features, TILE_ROWS), -(-in_features // TILE_INPUTS)


def _even_deviation(levels: int) -> float:
    """Standard deviation of numbers drawn evenly from so many levels."""
    return levels / math.sqrt(12)


AS_THEY_ARE = QuantSpec()

# By the value of ``--quantize``.
SCHEMES: dict[str, QuantSpec] = {
    "none": AS_THEY_ARE,
    "int8": Int8(),
    "int4": Int4(),
    "nl4": Codebook(),
}
