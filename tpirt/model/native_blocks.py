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
from tpirt.model.products import Products, address
from tpirt.ops.native.bindings import (
    AttentionBlock,
    Matrix,
    MlpBlock,
    NativeKernels,
    Rounded,
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
            norm=address(w, "norm.weight"),
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
    ) -> tuple[torch.Tensor | Rounded, torch.Tensor] | None:
        """Add the columns of a block to ``total`` (T, H); None if it takes single operations.

        Args:
            x: (T, H), float32 for the first block of an MLP, then what that one returned.

        Returns:
            The normalised rows, and the sum.
        """
        rows = len(x)
        native = self._suits(w, rows, "gate_up_proj", "down_proj")
        if native is None or not self._silu:
            return None
        block = MlpBlock(
            gate_up=_matrix(w, "gate_up_proj"),
            down=_matrix(w, "down_proj"),
            tokens=rows,
            eps=self._eps,
        )
        if block.gate_up.rows % 16:
            return None
        if total is None:
            assert isinstance(x, torch.Tensor)
            hidden = x.contiguous()
            normed = torch.empty_like(hidden)
            block.hidden, block.norm = hidden.data_ptr(), address(w, "norm.weight")
            block.normed = normed.data_ptr()
            x = Rounded.empty(*x.shape) if block.gate_up.rounds else normed
            total = torch.empty(rows, self._hidden)
        else:
            # Where another kernel had the first block, x may be of another kind.
            if block.gate_up.rounds != isinstance(x, Rounded) or not total.is_contiguous():
                return None
            block.add = True
        if isinstance(x, Rounded):
            block.codes, block.scales, block.sums = x.pointers
            block.groups = x.groups
        elif x.dtype is torch.float32:
            block.normed = x.data_ptr()
        else:
            return None
        block.partial = total.data_ptr()
        native.mlp_block(block)
        return x, total

    def _suits(self, w: Weights, rows: int, first: str, second: str) -> NativeKernels | None:
        if rows > _ROWS or self._products.native(w, first, rows) is None:
            return None
        return self._products.native(w, second, rows)


def _matrix(w: Weights, name: str) -> Matrix:
    """The weights of a product, with its bias; a copy."""
    weight = w[f"{name}.weight"]
    if isinstance(weight, QuantMatrix):
        matrix = Matrix.from_buffer_copy(weight.native)
    else:
        matrix = Matrix.of_rows(weight)
    matrix.bias = address(w, f"{name}.bias")
    return matrix
