"""Kernels for products with weights in bfloat16 or float16, as checkpoints have them.

Axes: T tokens, N out_features, K in_features.

**Native**: :mod:`tpirt.ops.native` widens the weights in registers and multiplies in float32, on
every CPU: as fast as memory for a few rows. An output's bits depend only on its row of x and its
weights. **Torch**: torch's product in bfloat16, fast where the CPU has units for it; float16
weights are rounded to it. **Widened**: weights are widened to float32, for many rows on other CPUs.
Both convert pieces of the matrix in a scratch of a few MiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from tpirt.ops.buffers import scratch
from tpirt.ops.native.bindings import Matrix, available_kernels, present_kernels
from tpirt.ops.nn import padded_rows
from tpirt.ops.quant import QuantSpec
from tpirt.ops.quant_matrix import PIECE_BYTES


@dataclass(frozen=True)
class NativeHalf:
    """The kernels in C, with as many threads as torch uses."""

    name: ClassVar[str] = "native-half"
    inputs: ClassVar[torch.dtype] = torch.float32

    def accepts(self, spec: QuantSpec) -> bool:
        """See :class:`tpirt.ops.quant_kernels.Kernel`."""
        return available_kernels() is not None

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return (T, N) float32."""
        return present_kernels().product(Matrix.of_rows(weight), x.float().contiguous())


@dataclass(frozen=True)
class TorchHalf:
    """torch's product in bfloat16."""

    name: ClassVar[str] = "torch-bfloat16"
    inputs: ClassVar[torch.dtype] = torch.bfloat16

    def accepts(self, spec: QuantSpec) -> bool:
        """See :class:`tpirt.ops.quant_kernels.Kernel`."""
        return True

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return (T, N) bfloat16."""
        rows = len(x)
        x = x.bfloat16()
        if missing := padded_rows(rows) - rows:
            x = F.pad(x, (0, 0, 0, missing))
        out = F.linear(x, weight) if weight.dtype is x.dtype else _by_pieces(x, weight)
        return out[:rows]


@dataclass(frozen=True)
class Widened:
    """torch's product in float32, with pieces of the weights."""

    name: ClassVar[str] = "widened-float32"
    inputs: ClassVar[torch.dtype] = torch.float32

    def accepts(self, spec: QuantSpec) -> bool:
        """See :class:`tpirt.ops.quant_kernels.Kernel`."""
        return True

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return (T, N) float32."""
        return _by_pieces(x.float(), weight)


def _by_pieces(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product in x's dtype, (T, N), with pieces of the weights converted to it."""
    out = x.new_empty(len(x), len(weight))
    row_bytes = weight.shape[1] * x.dtype.itemsize
    step = max(1, PIECE_BYTES // row_bytes)
    space = scratch(min(step, len(weight)) * row_bytes).view(x.dtype).view(-1, weight.shape[1])
    for rows in range(0, len(weight), step):
        stored = weight[rows : rows + step]
        piece = space[: len(stored)]
        _convert(stored, piece)
        torch.mm(x, piece.t(), out=out[:, rows : rows + step])
    return out


def _convert(weight: torch.Tensor, out: torch.Tensor) -> None:
    native = available_kernels()
    if native is not None and (weight.dtype, out.dtype) == (torch.float16, torch.bfloat16):
        native.narrow(weight, out)  # eight times as fast
    else:
        out.copy_(weight)


NATIVE_HALF = NativeHalf()
FEW = (NATIVE_HALF,)
MANY = (TorchHalf(), Widened())
PLAIN_KERNELS = {kernel.name: kernel for kernel in (*FEW, *MANY)}
