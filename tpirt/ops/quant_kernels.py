"""Kernels for products with quantized matrices.

Axes: T tokens, N out_features, K in_features, Kp padded K.

**Packed**: torch's ``_weight_int4pack_mm_for_cpu`` and ``_weight_int8pack_mm`` read the weights
once for four rows, so their time grows with T. They take and return bfloat16 and sum in float32.
An output's bits depend only on its row of x and its weights. (Both also accept float32, in a
scalar loop about 70 times slower.)

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
from tpirt.ops.buffers import ALIGN
from tpirt.ops.quant import Int4, Int8, Scheme
from tpirt.ops.quant_layout import Layout, find_kernel
from tpirt.ops.quant_matrix import QuantMatrix

INT4_KERNEL = "_weight_int4pack_mm_for_cpu"
INT8_KERNEL = "_weight_int8pack_mm"


class Kernel(Protocol):
    """One way to compute ``x w^T``. Choices on disk refer to kernels by ``name``."""

    @property
    def name(self) -> str: ...

    def accepts(self, spec: Scheme, layout: Layout | None) -> bool:
        """Whether this machine has the kernel for matrices in this form.

        ``layout`` is the result of :func:`~tpirt.ops.quant_layout.local_layout`: None if torch has
        no 4-bit kernel.
        """
        ...

    def __call__(self, x: torch.Tensor, matrix: QuantMatrix) -> torch.Tensor:
        """Return (T, N) in x's dtype for x (T, K) of any float dtype; T, N and K are not 0.

        Bits depend on x, the matrix and the number of threads, not on the matrix's address.
        """
        ...


@dataclass(frozen=True)
class PackedInt4:
    """torch's 4-bit kernel. It takes N from the first axis of the codes."""

    name: ClassVar[str] = "torch-int4"

    def accepts(self, spec: Scheme, layout: Layout | None) -> bool:
        return (
            isinstance(spec, Int4) and layout is not None and find_kernel(INT4_KERNEL) is not None
        )

    def __call__(self, x: torch.Tensor, matrix: QuantMatrix) -> torch.Tensor:
        kernel, spec = find_kernel(INT4_KERNEL), matrix.spec
        assert kernel is not None
        assert isinstance(spec, Int4)
        x16 = _fitted(x, matrix.width, torch.bfloat16)
        out = kernel(x16, matrix.rows, spec.group_size, matrix.scales)
        if out.shape[1] != matrix.out_features:  # slicing costs microseconds
            out = out[:, : matrix.out_features]
        return out.to(x.dtype)


@dataclass(frozen=True)
class PackedInt8:
    """torch's 8-bit kernel."""

    name: ClassVar[str] = "torch-int8"

    def accepts(self, spec: Scheme, layout: Layout | None) -> bool:
        return isinstance(spec, Int8) and find_kernel(INT8_KERNEL) is not None

    def __call__(self, x: torch.Tensor, matrix: QuantMatrix) -> torch.Tensor:
        kernel = find_kernel(INT8_KERNEL)
        assert kernel is not None
        x16 = _fitted(x, matrix.width, torch.bfloat16)
        return kernel(x16, matrix.codes, matrix.scales).to(x.dtype)


@dataclass(frozen=True)
class Dense:
    """Dequantize to ``dtype`` and multiply; for every scheme on every machine.

    Memory beyond the result: x in ``dtype`` and twice a piece of the matrix.
    """

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"dense-{dtype_name(self.dtype)}"

    def accepts(self, spec: Scheme, layout: Layout | None) -> bool:
        return True

    def __call__(self, x: torch.Tensor, matrix: QuantMatrix) -> torch.Tensor:
        fitted = _fitted(x, matrix.width, self.dtype)
        out = torch.empty(x.shape[0], matrix.out_features, dtype=x.dtype)
        factors = matrix.spec.output_scales(matrix.scales)
        for start, piece in matrix.pieces(self.dtype):
            part = out[:, start : start + piece.shape[0]]
            product = torch.mm(fitted, piece.t())[:, : part.shape[1]]
            if factors is not None:
                product = product * factors[start : start + part.shape[1]]
            part.copy_(product)
        return out


DENSE = (Dense(torch.bfloat16), Dense(torch.float32))
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for kernel in (PackedInt4(), PackedInt8(), *DENSE)
}


def _fitted(x: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Convert ``x`` (T, K) to ``dtype``: zero-padded to ``width``, contiguous, aligned."""
    if x.dtype is not dtype:
        x = x.to(dtype)
    if x.shape[1] != width:
        return F.pad(x, (0, width - x.shape[1]))
    x = x.contiguous()
    # The 8-bit kernel loads activations with aligned vector instructions.
    return x if x.data_ptr() % ALIGN == 0 else x.clone()
