"""Blocks of a few tokens in one call of C each.

A decoded token's own numbers are few, and while gigabytes of weights pass the caches, every Python
operation between two products costs tens of microseconds. The results are those of the operations
that :class:`~tpirt.model.products.Products` and :class:`~tpirt.model.attention.Heads` call one by
one, bit for bit: the same functions of C in the same order.

Axes: T tokens, H hidden, Q local query heads, K local KV heads, D head_dim.
"""

from __future__ import annotations

import torch

from tpirt.batch import Batch
from tpirt.config import ModelConfig
from tpirt.model.attention import Heads, Turn
from tpirt.model.products import Products, plain
from tpirt.ops.native.bindings import (
    AttentionBlock,
    Matrix,
    MlpBlock,
    NativeKernels,
    Rounded,
    native_kernels,
)
from tpirt.ops.quant_matrix import QuantMatrix
from tpirt.weights.layout import Weights

# Rows of input for which one call pays.
_ROWS = 8


class NativeBlocks:
    """Runs blocks in C where they, the batch and this machine allow it."""

    def __init__(self, config: ModelConfig, products: Products, heads: Heads):
        self._eps = config.rms_norm_eps
        self._hidden = config.hidden_size
        self._silu = config.hidden_act == "silu"
        self._products = products
        self._heads = heads

    def attention(
        self, w: Weights, hidden: torch.Tensor, batch: Batch, turn: Turn, layer: int
    ) -> torch.Tensor | None:
        """The partial sum (T, H) of the local heads; None if it takes single operations.

        Args:
            hidden: (T, H) float32.
        """
        rows = batch.tokens
        native = self._suits(w, rows, "qkv_proj", "o_proj")
        if native is None or len(batch.segments) > 1 or not self._heads.suits_native(rows):
            return None
        if self._heads.is_last(layer) and batch.num_logits < rows:
            return None
        hidden = hidden.contiguous()
        out = torch.empty(rows, self._hidden)
        block = AttentionBlock(
            hidden=hidden.data_ptr(),
            norm=_address(w, "norm.weight"),
            qkv=_matrix(w, "qkv_proj"),
            out=_matrix(w, "o_proj"),
            heads=self._heads.arguments(w, layer),
            partial=out.data_ptr(),
            eps=self._eps,
        )
        self._heads.place(block.heads, batch.segments[0], turn, 0, layer)
        native.attention_block(block)
        return out

    def mlp(
        self, w: Weights, x: torch.Tensor | Rounded, total: torch.Tensor | None
    ) -> tuple[Rounded, torch.Tensor] | None:
        """Add the columns of a block to ``total`` (T, H); None if it takes single operations.

        Args:
            x: (T, H), float32 for the first block of an MLP, then what that one returned.

        Returns:
            The normalised rows, and the sum.
        """
        rows = x.codes.shape[0] if isinstance(x, Rounded) else x.shape[0]
        native = self._suits(w, rows, "gate_up_proj", "down_proj")
        if native is None or not self._silu:
            return None
        gate_up = _matrix(w, "gate_up_proj")
        if gate_up.rows % 16:
            return None
        if total is not None and not (isinstance(x, Rounded) and total.is_contiguous()):
            return None  # another kernel had the first block, and only that one has the norm
        if isinstance(x, Rounded):
            hidden, rounded = None, x
        else:
            hidden, rounded = x.contiguous(), Rounded.empty(*x.shape)
        add = total is not None
        out = torch.empty(rows, self._hidden) if total is None else total
        codes, scales, sums = rounded.pointers
        block = MlpBlock(
            hidden=None if hidden is None else hidden.data_ptr(),
            norm=None if hidden is None else _address(w, "norm.weight"),
            codes=codes,
            scales=scales,
            sums=sums,
            groups=rounded.scales.shape[1],
            gate_up=gate_up,
            down=_matrix(w, "down_proj"),
            partial=out.data_ptr(),
            tokens=rows,
            add=add,
            eps=self._eps,
        )
        native.mlp_block(block)
        return rounded, out

    def _suits(self, w: Weights, rows: int, first: str, second: str) -> NativeKernels | None:
        rounds = self._products.rounds
        if rows > _ROWS or not (rounds(w, first, rows) and rounds(w, second, rows)):
            return None
        return native_kernels(torch.get_num_threads())


def _matrix(w: Weights, name: str) -> Matrix:
    matrix, bias = w[f"{name}.weight"], plain(w, f"{name}.bias")
    assert isinstance(matrix, QuantMatrix)
    native = matrix.native
    native.bias = None if bias is None else bias.data_ptr()
    return native


def _address(w: Weights, name: str) -> int:
    tensor = plain(w, name)
    assert tensor is not None
    return tensor.data_ptr()
