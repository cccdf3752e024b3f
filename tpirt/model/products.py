"""The products of a block and what leads to them, plain or quantized.

Axes: T tokens, H hidden, I MLP columns of a block, K inputs and N outputs of a product.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from tpirt.config import ModelConfig
from tpirt.ops.native.bindings import NativeKernels, Rounded, available_kernels
from tpirt.ops.nn import ACTIVATIONS, gated_mlp, rms_norm
from tpirt.ops.plain_kernels import NATIVE_HALF
from tpirt.ops.quant import AS_THEY_ARE
from tpirt.ops.quant_kernels import NATIVE
from tpirt.ops.quant_linear import (
    KernelChoice,
    MatrixShape,
    QuantMatrix,
    is_as_among_few,
    kernel_inputs,
    linear,
)
from tpirt.sharding.partition import Span
from tpirt.weights.layout import Weights


class Products:
    """Products with the weights of a block.

    Inputs of the kernels in C are made in C. For quantized weights they are rounded there, once for
    all products that take them.
    """

    def __init__(self, config: ModelConfig, kernels: Mapping[MatrixShape, KernelChoice]):
        self._eps = config.rms_norm_eps
        self._silu = config.hidden_act == "silu"
        self._activation = ACTIVATIONS[config.hidden_act]
        self._kernels = kernels

    def normed(self, w: Weights, x: torch.Tensor, into: str) -> torch.Tensor | Rounded:
        """Normalise rows (T, H), float32, as input of the product ``into``."""
        weight = plain(w, "norm.weight")
        assert weight is not None
        native = self.native(w, into, len(x))
        if native is None:
            return rms_norm(x, weight, self._eps).to(self._inputs(w, into, len(x)))
        return _rounded(native, native.norm(x.contiguous(), weight, self._eps), w, into)

    def gated(self, w: Weights, gate_up: torch.Tensor, into: str) -> torch.Tensor | Rounded:
        """``activation(gate) * up`` of (T, 2 I) as input of the product ``into``."""
        native = self.native(w, into, len(gate_up))
        if native is None or not self._silu or gate_up.dtype is not torch.float32:
            return gated_mlp(gate_up.to(self._inputs(w, into, len(gate_up))), self._activation)
        return _rounded(native, native.gate(gate_up.contiguous()), w, into)

    def project(
        self, x: torch.Tensor | Rounded, w: Weights, name: str, rows: Span | None = None
    ) -> torch.Tensor:
        """``x W^T + b``, (T, N), in a dtype that depends on the kernel.

        ``rows``, which begin at a multiple of ``ROWS_UNIT``, selects outputs.
        """
        weight, bias = w[f"{name}.weight"], plain(w, f"{name}.bias")
        kernel = self._kernels.get(_shape(weight))
        if rows is not None:
            weight = weight.part(*rows) if isinstance(weight, QuantMatrix) else weight[slice(*rows)]
            bias = None if bias is None else bias[slice(*rows)]
        if kernel is None:  # float32
            assert isinstance(x, torch.Tensor)
            assert isinstance(weight, torch.Tensor)
            return F.linear(x, weight, bias)
        out = linear(x, weight, kernel)
        return out if bias is None else out.add_(bias)

    def native(self, w: Weights, name: str, rows: int) -> NativeKernels | None:
        """The kernels in C if the product ``name`` of so many rows is theirs."""
        choice = self._kernels.get(_shape(w[f"{name}.weight"]))
        if choice is None or choice.kernel(rows) not in (NATIVE.name, NATIVE_HALF.name):
            return None
        return available_kernels()

    def alike(self, rows: int) -> bool:
        """Whether each of so many rows has the bits that it has among a few."""
        return all(is_as_among_few(choice, rows) for choice in self._kernels.values())

    def _inputs(self, w: Weights, name: str, rows: int) -> torch.dtype:
        choice = self._kernels.get(_shape(w[f"{name}.weight"]))
        return torch.float32 if choice is None else kernel_inputs(choice, rows)


def plain(w: Weights, name: str) -> torch.Tensor | None:
    """A tensor that is never quantized (norm or bias); None if the block lacks it."""
    tensor = w.get(name)
    assert not isinstance(tensor, QuantMatrix)
    return tensor


def address(w: Weights, name: str) -> int | None:
    """Where a tensor that is never quantized lies; None if the block lacks it."""
    tensor = plain(w, name)
    return None if tensor is None else tensor.data_ptr()


def _rounded(
    native: NativeKernels, x: torch.Tensor, w: Weights, into: str
) -> torch.Tensor | Rounded:
    return native.round(x) if isinstance(w[f"{into}.weight"], QuantMatrix) else x


def _shape(weight: torch.Tensor | QuantMatrix) -> MatrixShape:
    if isinstance(weight, QuantMatrix):
        return weight.shape
    return MatrixShape(AS_THEY_ARE, *weight.shape)
