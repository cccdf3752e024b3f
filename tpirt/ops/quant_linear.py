"""Products with quantized matrices, each by the kernel chosen for its shape and number of rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tpirt.ops.quant_kernels import KERNELS
from tpirt.ops.quant_matrix import ROWS_UNIT, MatrixShape, QuantMatrix, dequantize

__all__ = ["ROWS_UNIT", "KernelChoice", "MatrixShape", "QuantMatrix", "dequantize", "linear"]


@dataclass(frozen=True)
class KernelChoice:
    """Which kernel multiplies how many rows: with it, the number of threads and x, bits are fixed.

    Attributes:
        steps: (max_rows, kernel name), ascending: the first step whose ``max_rows`` is not
            exceeded applies.
        rest: the kernel for more rows.
        timings_ms: CPU time that the probe measured, by kernel name and rows of input.
    """

    steps: tuple[tuple[int, str], ...]
    rest: str
    timings_ms: dict[str, dict[int, float]] = field(default_factory=dict, compare=False, repr=False)

    def kernel(self, rows: int) -> str:
        """Name of the kernel for ``rows`` rows of input."""
        return next((name for most, name in self.steps if rows <= most), self.rest)


def linear(x: torch.Tensor, matrix: QuantMatrix, choice: KernelChoice) -> torch.Tensor:
    """``x w^T`` for the weights ``w`` that ``matrix`` stands for.

    Bits do not depend on where the matrix lies. They repeat with the same number of threads; with
    packed kernels they do so with any number, and a row's bits do not depend on the other rows.

    Args:
        x: (T, K), any float dtype.
        choice: its kernels are ones that this machine has.

    Returns:
        (T, N) in x's dtype, as exact as the kernel's dtype: bfloat16 (packed, or dense in
        bfloat16) or float32.
    """
    if not (x.shape[0] and matrix.inputs and matrix.rows):
        return x.new_zeros(x.shape[0], matrix.rows)
    return KERNELS[choice.kernel(x.shape[0])](x, matrix)
