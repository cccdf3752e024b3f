"""A quantized matrix in memory: codes and scales, viewed or dequantized.

Axes: N out_features, K in_features, Kp padded K.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from tpirt.ops.buffers import ALIGN, round_up, scratch
from tpirt.ops.native.bindings import Matrix
from tpirt.ops.quant import QuantSpec, Scheme
from tpirt.ops.quant_regions import matrix_regions, view_regions
from tpirt.ops.tiles import TILE_ROWS

# What is dequantized at once. With 2 MiB, torch's product with many rows of input hardly gains from
# a second thread. A single block of rows may be more.
PIECE_BYTES = 8 << 20

# A matrix can be split at multiples of it.
ROWS_UNIT = 64


class MatrixShape(NamedTuple):
    """How a matrix is stored, and its shape: the key of a kernel choice."""

    spec: QuantSpec
    out_features: int
    in_features: int


@dataclass(frozen=True)
class QuantMatrix:
    """An (N, K) matrix as two tensors, codes and scales (see :mod:`tpirt.ops.quant`)."""

    spec: Scheme
    out_features: int
    in_features: int
    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of_buffer(
        cls, spec: Scheme, out_features: int, in_features: int, buffer: torch.Tensor
    ) -> QuantMatrix:
        """View a matrix in flat uint8 memory that starts at a multiple of 64 bytes: no copy."""
        assert buffer.data_ptr() % ALIGN == 0
        regions = matrix_regions(spec, out_features, in_features)
        codes, scales = view_regions(regions, buffer)
        return cls(spec, out_features, in_features, codes, scales)

    # Cached: a decoded token asks for these at every product.
    @cached_property
    def width(self) -> int:
        """Kp, the stored in_features."""
        return self.spec.padded_in_features(self.in_features)

    @cached_property
    def height(self) -> int:
        """N, rounded up to whole tiles."""
        return round_up(self.out_features, TILE_ROWS)

    @cached_property
    def shape(self) -> MatrixShape:
        """The key of this matrix's kernel choice."""
        return MatrixShape(self.spec, self.out_features, self.in_features)

    @cached_property
    def native(self) -> Matrix:
        """The matrix as the kernels in C take it, without a bias."""
        shape = self.out_features, self.in_features
        return Matrix.of_tiles(self.codes, self.scales, *shape, self.spec.levels)

    def part(self, start: int, stop: int) -> QuantMatrix:
        """Rows ``start``, a multiple of ``ROWS_UNIT``, to ``stop``: views."""
        codes, scales = self.spec.part(self, start, stop)
        return QuantMatrix(self.spec, stop - start, self.in_features, codes, scales)

    def pieces(
        self, dtype: torch.dtype, elements: int | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Dequantize piece by piece, each in the memory of the last: the thread's scratch.

        Multiply a product with a piece by the scheme's ``output_scales``.

        Yields:
            The first row and a tensor (n, Kp) of at most ``elements`` weights (by default
            ``PIECE_BYTES``) or 16 rows. The last one may extend past row N.
        """
        elements = elements or PIECE_BYTES // dtype.itemsize
        step = max(TILE_ROWS, elements // self.width // TILE_ROWS * TILE_ROWS)
        space = scratch(min(step, self.height) * self.width * dtype.itemsize).view(dtype)
        for start in range(0, self.height, step):
            yield start, self.spec.rows(self, start, min(start + step, self.height), space)


def dequantize(matrix: QuantMatrix) -> torch.Tensor:
    """Return the whole matrix in float32, (N, K); for tests and embeddings."""
    out = torch.empty(matrix.out_features, matrix.in_features)
    for start, piece in matrix.pieces(torch.float32):
        part = out[start : start + piece.shape[0]]
        part.copy_(piece[: part.shape[0], : matrix.in_features])
    factors = matrix.spec.output_scales(matrix.scales)
    return out if factors is None else out.mul_(factors[: len(out)].unsqueeze(1))
