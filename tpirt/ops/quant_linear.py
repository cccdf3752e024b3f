"""Products with matrices, by the kernel chosen for their shape and number of rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tpirt.ops.native.bindings import Rounded
from tpirt.ops.nn import padded_rows
from tpirt.ops.plain_kernels import PLAIN_KERNELS
from tpirt.ops.quant_kernels import KERNELS, NATIVE
from tpirt.ops.quant_matrix import ROWS_UNIT, MatrixShape, QuantMatrix, dequantize

__all__ = [
    "FEW_ROWS",
    "ROWS_UNIT",
    "KernelChoice",
    "MatrixShape",
    "QuantMatrix",
    "dequantize",
    "is_as_among_few",
    "linear",
]

# Up to so many rows a matrix has one kernel: then a row's bits do not depend on how many there are,
# and a token is the same whatever guesses and requests share its step. Up to half as many rows take
# hardly longer than one, for the time is that of reading the weights.
FEW_ROWS = 16


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


def kernel_inputs(choice: KernelChoice, rows: int) -> torch.dtype:
    """The dtype of input that the kernel for so many rows works with."""
    name = choice.kernel(rows)
    kernel = KERNELS[name] if name in KERNELS else PLAIN_KERNELS[name]
    return kernel.inputs


def is_as_among_few(choice: KernelChoice, rows: int) -> bool:
    """Whether a row has the bits among ``rows`` rows that it has among a few.

    Those of torch's products in bfloat16 depend on the padded number of rows. Those in float32
    depend on any number of rows, also on one below ``FEW_ROWS``: nothing makes them alike.
    """
    if choice.kernel(rows) != choice.kernel(FEW_ROWS):
        return False
    exact = kernel_inputs(choice, rows) is not torch.bfloat16
    return exact or padded_rows(rows) == padded_rows(FEW_ROWS)


def linear(
    x: torch.Tensor | Rounded, weight: torch.Tensor | QuantMatrix, choice: KernelChoice
) -> torch.Tensor:
    """Return ``x w^T`` for the (dequantized) weights ``w``.

    Bits do not depend on the address of the weights. They are equal for the same number of
    threads; with native kernels for any number, and a row's bits do not depend on the other rows.

    Args:
        x: (T, K), any float dtype; rounded rows are for the native kernel.
        weight: (N, K), quantized, bfloat16 or float16.
        choice: of kernels that this machine has.

    Returns:
        (T, N), float32 from native kernels or for rounded rows; else in the dtype of x
        (quantized weights) or of the kernel. The precision is the kernel's.
    """
    if isinstance(weight, torch.Tensor):
        assert isinstance(x, torch.Tensor)
        return PLAIN_KERNELS[choice.kernel(len(x))](x, weight)
    if isinstance(x, Rounded):
        return NATIVE.rounded(x, weight)
    if not (x.shape[0] and weight.in_features and weight.out_features):
        return x.new_zeros(x.shape[0], weight.out_features)
    return KERNELS[choice.kernel(x.shape[0])](x, weight)
