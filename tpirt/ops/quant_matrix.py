"""A quantized matrix in memory: codes and scales, viewed or de-quantised.

Axes: N out_features, K in_features, Kp padded K.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tpirt.ops.buffers import ALIGN
from tpirt.ops.quant import Scheme
from tpirt.ops.quant_layout import Layout, local_regions, view_regions

# Elements de-quantised at once: 2 MiB in bfloat16; a single block of rows may be more.
PIECE_ELEMENTS = 1 << 20

# A multiple of every layout's block: where a matrix can be cut.
ROWS_UNIT = 64


class MatrixShape(NamedTuple):
    """What a kernel is chosen for: how a matrix is stored, its out_features and in_features."""

    spec: Scheme
    rows: int
    inputs: int


@dataclass(frozen=True)
class QuantMatrix:
    """An (N, K) matrix as two tensors, codes and scales (see :mod:`tpirt.ops.quant`)."""

    spec: Scheme
    rows: int
    inputs: int
    layout: Layout
    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of_buffer(
        cls, spec: Scheme, rows: int, inputs: int, layout: Layout, buffer: torch.Tensor
    ) -> QuantMatrix:
        """View a matrix in flat uint8 memory that starts at a multiple of 64 bytes: no copy."""
        assert buffer.data_ptr() % ALIGN == 0
        codes, scales = view_regions(local_regions(spec, rows, inputs, layout), buffer)
        return cls(spec, rows, inputs, layout, codes, scales)

    @property
    def width(self) -> int:
        """Inputs as stored, Kp."""
        return self.spec.padded_inputs(self.inputs)

    @property
    def shape(self) -> MatrixShape:
        """The key of this matrix's kernel choice."""
        return MatrixShape(self.spec, self.rows, self.inputs)

    def part(self, start: int, stop: int) -> QuantMatrix:
        """Rows ``start``, a multiple of ``ROWS_UNIT``, to ``stop``; codes are a view."""
        codes, scales = self.spec.part(self, start, stop)
        return QuantMatrix(self.spec, stop - start, self.inputs, self.layout, codes, scales)

    def pieces(
        self, dtype: torch.dtype, elements: int = PIECE_ELEMENTS
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """De-quantise rows from ``start`` on, piece after piece, into one scratch.

        A product with a piece is still to be multiplied by the scheme's ``output_scales``.

        Yields:
            ``start`` and a view (n, Kp) that the next piece overwrites, of at most ``elements``
            weights or one block of rows. The last one may go past row N, with zeros.
        """
        return self.spec.pieces(self, dtype, elements)


def dequantize(matrix: QuantMatrix) -> torch.Tensor:
    """The whole matrix in float32, (N, K): for tests and for embeddings, not for products."""
    out = torch.empty(matrix.rows, matrix.inputs)
    for start, piece in matrix.pieces(torch.float32):
        part = out[start : start + piece.shape[0]]
        part.copy_(piece[: part.shape[0], : matrix.inputs])
    factors = matrix.spec.output_scales(matrix.scales)
    return out if factors is None else out.mul_(factors.unsqueeze(1))
