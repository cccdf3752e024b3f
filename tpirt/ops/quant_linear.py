"""Products with quantized matrices, by the kernel chosen for their shape and number of rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tpirt.ops.native.bindings import Rounded
from tpirt.ops.quant_kernels import KERNELS, NATIVE
from tpirt.ops.quant_matrix import ROWS_UNIT, MatrixShape, QuantMatrix, dequantize

__all__ = ["ROWS_UNIT", "KernelChoice", "MatrixShape", "QuantMatrix", "dequantize", "linear"]


@dataclass(frozen=True)
class KernelChoice:
    """The kernel by number of rows. With x and the number of threads, it determines the bits.

    Attributes:
        steps: (max_rows, kernel name), ascending; the first step with enough rows applies.
        rest: the kernel for more rows.
        timings_ms: CPU time in the probe, by kernel name and rows of input.
    """

    steps: tuple[tuple[int, str], ...]
    rest: str
    timings_ms: dict[str, dict[int, float]] = field(default_factory=dict, compare=False, repr=False)

    def kernel(self, rows: int) -> str:
        """Name of the kernel for ``rows`` rows of input."""
        for most, name in self.steps:
            if rows <= most:
                return name
        return self.rest


def linear(x: torch.Tensor | Rounded, matrix: QuantMatrix, choice: KernelChoice) -> torch.Tensor:
    """Return ``x w^T`` for the dequantized weights ``w`` of ``matrix``.

    Bits do not depend on the matrix's address. They are equal for the same number of threads; with
    the native kernel for any number, and a row's bits do not depend on the other rows.

    Args:
        x: (T, K), any float dtype; rounded rows are for the native kernel.
        choice: of kernels that this machine has.

    Returns:
        (T, N) in x's dtype, float32 for rounded rows; with the precision of the kernel: inputs of
        8 bits (native), bfloat16 or float32 (dense).
    """
    if isinstance(x, Rounded):
        return NATIVE.rounded(x, matrix)
    if not (x.shape[0] and matrix.in_features and matrix.out_features):
        return x.new_zeros(x.shape[0], matrix.out_features)
    return KERNELS[choice.kernel(x.shape[0])](x, matrix)
