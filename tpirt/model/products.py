"""The products of a block and what leads to them, plain or quantized.

Axes: T tokens, H hidden, I MLP columns of a block, K inputs and N outputs of a product.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from tpirt.config import ModelConfig
from tpirt.ops.native.bindings import Rounded, native_kernels
from tpirt.ops.nn import ACTIVATIONS, gated_mlp, rms_norm
from tpirt.ops.quant_kernels import NATIVE
from tpirt.ops.quant_linear import KernelChoice, MatrixShape, QuantMatrix, linear
from tpirt.sharding.partition import Span
from tpirt.weights.layout import Weights


class Products:
    """Products with the weights of a block.

    Inputs of the kernels in C are rounded where they are made, so that nothing lies between; those
    of other kernels are in ``dtype``.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        kernels: Mapping[MatrixShape, KernelChoice],
    ):
        self._eps = config.rms_norm_eps
        self._silu = config.hidden_act == "silu"
        self._activation = ACTIVATIONS[config.hidden_act]
        self._dtype = dtype
        self._kernels = kernels

    def normed(self, w: Weights, x: torch.Tensor, into: str) -> torch.Tensor | Rounded:
        """Normalise rows (T, H), float32, as input of the product ``into``."""
        weight = plain(w, "norm.weight")
        assert weight is not None
        if self._rounds(w, into, len(x)):
            native = native_kernels(torch.get_num_threads())
            assert native is not None
            return native.norm(x.contiguous(), weight, self._eps)
        return rms_norm(x, weight, self._eps).to(self._dtype)

    def gated(self, w: Weights, gate_up: torch.Tensor, into: str) -> torch.Tensor | Rounded:
        """``activation(gate) * up`` of (T, 2 I) as input of the product ``into``."""
        if self._silu and gate_up.dtype is torch.float32 and self._rounds(w, into, len(gate_up)):
            native = native_kernels(torch.get_num_threads())
            assert native is not None
            return native.gate(gate_up.contiguous())
        return gated_mlp(gate_up.to(self._dtype), self._activation)

    def project(
        self, x: torch.Tensor | Rounded, w: Weights, name: str, rows: Span | None = None
    ) -> torch.Tensor:
        """``x W^T + b``, (T, N) in x's dtype, or float32 if x is rounded.

        ``rows``, which begin at a multiple of ``ROWS_UNIT``, selects outputs.
        """
        weight, bias = w[f"{name}.weight"], plain(w, f"{name}.bias")
        if rows is not None and bias is not None:
            bias = bias[slice(*rows)]
        if isinstance(weight, torch.Tensor):
            assert isinstance(x, torch.Tensor)
            return F.linear(x, weight if rows is None else weight[slice(*rows)], bias)
        kernel = self._kernels[weight.shape]
        out = linear(x, weight if rows is None else weight.part(*rows), kernel)
        return out if bias is None else out.add_(bias)

    def _rounds(self, w: Weights, name: str, rows: int) -> bool:
        weight = w[f"{name}.weight"]
        return (
            isinstance(weight, QuantMatrix)
            and self._kernels[weight.shape].kernel(rows) == NATIVE.name
        )


def plain(w: Weights, name: str) -> torch.Tensor | None:
    """A tensor that is never quantized (norm or bias); None if the block lacks it."""
    tensor = w.get(name)
    assert not isinstance(tensor, QuantMatrix)
    return tensor
