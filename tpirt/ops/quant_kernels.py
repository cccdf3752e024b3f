"""Kernels for products with quantized matrices.

Axes: T tokens, N out_features, K in_features, Kp padded K.

**Native**: :mod:`tpirt.ops.native` reads the weights once for up to eight rows, so its time grows
with T beyond that. Inputs are rounded to 8 bits per 32, sums are exact within those and float32
beyond. An output's bits depend only on its row of x and its weights.

**Dense**: pieces of the matrix are dequantized into a scratch of a few MiB and multiplied by
torch's matrix product. MKL (float32), and oneDNN on CPUs with AMX (bfloat16), may split the sum
over K among threads: the last bits then depend on the number of threads, never on addresses.

To add a kernel, implement :class:`Kernel` and add it to ``KERNELS``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F

from tpirt.dtypes import dtype_name
from tpirt.ops.native.bindings import Rounded, available_kernels, present_kernels
from tpirt.ops.nn import padded_rows
from tpirt.ops.quant import Int4, Int8, QuantSpec
from tpirt.ops.quant_matrix import QuantMatrix


class Kernel(Protocol):
    """One way to compute ``x w^T``. Choices on disk refer to kernels by ``name``."""

    @property
    def name(self) -> str: ...

    @property
    def inputs(self) -> torch.dtype:
        """The dtype that it works with; x in another one is converted."""
        ...

    def accepts(self, spec: QuantSpec) -> bool:
        """Whether this machine has the kernel, and it reads weights in this form."""
        ...

    def __call__(self, x: torch.Tensor, matrix: QuantMatrix) -> torch.Tensor:
        """Return (T, N) in x's dtype for x (T, K) of any float dtype; T, N and K are not 0.

        Bits depend on x, the matrix and the number of threads, not on the matrix's address.
        """
        ...


@dataclass(frozen=True)
class Native:
    """The kernels in C, with as many threads as torch uses."""

    name: ClassVar[str] = "native"
    inputs: ClassVar[torch.dtype] = torch.float32

    def accepts(self, spec: QuantSpec) -> bool:
        known = isinstance(spec, Int8 | Int4)
        return known and available_kernels() is not None

    def __call__(self, x: torch.Tensor, matrix: QuantMatrix) -> torch.Tensor:
        native = present_kernels()
        return self.rounded(native.round(x.float().contiguous()), matrix).to(x.dtype)

    @staticmethod
    def rounded(x: Rounded, matrix: QuantMatrix) -> torch.Tensor:
        """Return (T, N) float32 for rows that are rounded already."""
        return present_kernels().product(matrix.native, x)


@dataclass(frozen=True)
class Dense:
    """Dequantize to ``dtype`` and multiply; for every scheme on every machine.

    Memory beyond the result: x in ``dtype`` and twice a piece of the matrix.
    """

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"dense-{dtype_name(self.dtype)}"

    @property
    def inputs(self) -> torch.dtype:
        return self.dtype

    def accepts(self, spec: QuantSpec) -> bool:
        return True

    def __call__(self, x: torch.Tensor, matrix: QuantMatrix) -> torch.Tensor:
        fitted = _fitted(x, matrix.width, self.dtype)
        out = torch.empty(x.shape[0], matrix.out_features, dtype=x.dtype)
        factors = matrix.spec.output_scales(matrix.scales)
        for start, piece in matrix.pieces(self.dtype):
            part = out[:, start : start + piece.shape[0]]
            product = torch.mm(fitted, piece.t())[: len(x), : part.shape[1]]
            if factors is None:
                part.copy_(product)
            else:
                torch.mul(product, factors[start : start + part.shape[1]], out=part)
        return out


EXACT = Dense(torch.float32)
DENSE = (Dense(torch.bfloat16), EXACT)
NATIVE = Native()
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (NATIVE, *DENSE)}


def _fitted(x: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Convert ``x`` (T, K) to ``dtype``, zero-padded to ``width`` and for bfloat16's rows."""
    rows = padded_rows(len(x)) if dtype is torch.bfloat16 else len(x)
    if x.shape != (rows, width):
        return F.pad(x.to(dtype), (0, width - x.shape[1], 0, rows - len(x)))
    return x.to(dtype).contiguous()
