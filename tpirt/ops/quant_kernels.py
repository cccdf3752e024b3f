"""The kernels that multiply by a quantized matrix.

Axes: T tokens, N out_features, K in_features, Kp padded K.

**Packed**: torch's ``_weight_int4pack_mm_for_cpu`` and ``_weight_int8pack_mm`` read the weights
once for four rows, so their time grows with T. They take and return bfloat16 and sum in float32,
each output by itself: its bits depend on nothing but its inputs. (Both also accept float32, in a
scalar loop some 70 times slower.)

**Dense**: pieces of the matrix are de-quantised into a scratch of a few MiB and multiplied by
torch's matrix product. MKL (float32), and oneDNN on CPUs with AMX (bfloat16), may split the sum
over K among threads: the last bits then depend on the number of threads, never on addresses.

A further kernel is a class with the three members of :class:`Kernel` and an entry in ``KERNELS``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F

from tpirt.ops.buffers import ALIGN
from tpirt.ops.quant import Int4, Int8, Scheme
from tpirt.ops.quant_layout import Layout, find_kernel
from tpirt.ops.quant_matrix import QuantMatrix

INT4_KERNEL = "_weight_int4pack_mm_for_cpu"
INT8_KERNEL = "_weight_int8pack_mm"


class Kernel(Protocol):
    """One way to compute ``x w^T``. ``name`` is kept on disk with the choice that names it."""

    @property
    def name(self) -> str: ...

    def accepts(self, spec: Scheme, layout: Layout | None) -> bool:
        """Whether this machine has the kernel for matrices stored so.

        ``layout`` is the one of :func:`~tpirt.ops.quant_layout.local_layout`: None where torch has
        no 4-bit kernel.
        """
        ...

    def __call__(self, x: torch.Tensor, matrix: QuantMatrix) -> torch.Tensor:
        """(T, N) in x's dtype, for x (T, K) of any float dtype; T, N and K are not 0.

        Bits depend on x, the matrix and the number of threads, not on where the matrix lies.
        """
        ...


@dataclass(frozen=True)
class PackedInt4:
    """torch's 4-bit kernel. It takes N from the codes' first axis and knows its own blocks."""

    name: ClassVar[str] = "torch-int4"

    def accepts(self, spec: Scheme, layout: Layout | None) -> bool:
        return (
            isinstance(spec, Int4) and layout is not None and find_kernel(INT4_KERNEL) is not None
        )

    def __call__(self, x: torch.Tensor, matrix: QuantMatrix) -> torch.Tensor:
        kernel, spec = find_kernel(INT4_KERNEL), matrix.spec
        assert kernel is not None
        assert isinstance(spec, Int4)
        codes = matrix.codes.view(matrix.scales.shape[1], -1)
        x16 = _fitted(x, matrix.width, torch.bfloat16)
        out = kernel(x16, codes, spec.group_size, matrix.scales)
        if out.shape[1] != matrix.rows:  # slicing costs microseconds
            out = out[:, : matrix.rows]
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
    """De-quantise to ``dtype`` and multiply: every scheme, every machine.

    Beyond its result it takes x in ``dtype`` and twice a piece of the matrix.
    """

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"dense-{str(self.dtype).removeprefix('torch.')}"

    def accepts(self, spec: Scheme, layout: Layout | None) -> bool:
        return True

    def __call__(self, x: torch.Tensor, matrix: QuantMatrix) -> torch.Tensor:
        fitted = _fitted(x, matrix.width, self.dtype)
        out = torch.empty(x.shape[0], matrix.rows, dtype=x.dtype)
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
    """``x`` (T, K) in ``dtype``: padded with zeros to ``width``, contiguous, aligned."""
    x = x.to(dtype)
    if x.shape[1] != width:
        return F.pad(x, (0, width - x.shape[1]))
    x = x.contiguous()
    # The 8-bit kernel loads whole vectors of activations by aligned instructions.
    return x if x.data_ptr() % ALIGN == 0 else x.clone()
