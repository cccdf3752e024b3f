"""Kernels for products with bfloat16 weights, as checkpoints have them.

Axes: T tokens, N out_features, K in_features.

**Native**: :mod:`tpirt.ops.native` widens the weights in registers and multiplies in float32, on
every CPU: as fast as memory for a few rows. An output's bits depend only on its row of x and its
weights. **Torch**: ``F.linear``, fast where the CPU has bfloat16 units. **Widened**: pieces of the
matrix are widened to float32 in a scratch of a few MiB, for many rows on other CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from tpirt.ops.buffers import scratch
from tpirt.ops.native.bindings import Matrix, native_kernels, present_kernels
from tpirt.ops.quant import QuantSpec
from tpirt.ops.quant_matrix import PIECE_BYTES


@dataclass(frozen=True)
class NativeHalf:
    """The kernels in C, with as many threads as torch uses."""

    name: ClassVar[str] = "native-bfloat16"
    inputs: ClassVar[torch.dtype] = torch.float32

    def accepts(self, spec: QuantSpec) -> bool:
        """See :class:`tpirt.ops.quant_kernels.Kernel`."""
        return native_kernels(torch.get_num_threads()) is not None

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
        return F.linear(x.to(weight.dtype), weight)


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
        wide = x.float()
        out = torch.empty(len(x), len(weight))
        step = max(1, PIECE_BYTES // 4 // weight.shape[1])
        count = min(step, len(weight)) * weight.shape[1]
        space = scratch(4 * count).view(torch.float32).view(-1, weight.shape[1])
        for rows in range(0, len(weight), step):
            narrow = weight[rows : rows + step]
            piece = space[: len(narrow)].copy_(narrow)
            torch.mm(wide, piece.t(), out=out[:, rows : rows + step])
        return out


NATIVE_HALF = NativeHalf()
FEW = (NATIVE_HALF,)
MANY = (TorchHalf(), Widened())
PLAIN_KERNELS = {kernel.name: kernel for kernel in (*FEW, *MANY)}
