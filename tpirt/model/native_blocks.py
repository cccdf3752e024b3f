"""Blocks of a few tokens in one call of C each.

A decoded token's own numbers are few, and while gigabytes of weights pass the caches, every Python
operation between two products costs tens of microseconds. The results are those of the operations
that :class:`~tpirt.model.products.Products` and :class:`~tpirt.model.attention.Heads` call one by
one, bit for bit: the same functions of C in the same order.

Axes: T tokens, H hidden, Q local query heads, K local KV heads, D head_dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Generic, TypeVar, cast

import torch

from tpirt.batch import Batch
from tpirt.config import ModelConfig
from tpirt.model.attention import Heads, Turn
from tpirt.model.products import FEW_ROWS, Products, address
from tpirt.ops.native.bindings import (
    AttentionBlock,
    Matrix,
    MlpBlock,
    Rounded,
    present_kernels,
)
from tpirt.ops.quant_matrix import QuantMatrix
from tpirt.weights.layout import Weights

_Block = TypeVar("_Block", AttentionBlock, MlpBlock)


@dataclass(slots=True)
class _Prepared(Generic[_Block]):
    """Arguments of a block; those that differ from call to call are set by each.

    Attributes:
        rows: the most rows that it takes; 0 if it takes single operations.
    """

    rows: int
    block: _Block


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
        prepared = cast("_Prepared[AttentionBlock]", w.prepared or self._prepare_attention(w))
        if batch.tokens > prepared.rows or len(batch.segments) > 1:
            return None
        if self._heads.is_last(layer) and batch.num_logits < batch.tokens:
            return None
        hidden = hidden.contiguous()
        out = torch.empty(batch.tokens, self._hidden)
        block = prepared.block
        block.hidden, block.partial = hidden.data_ptr(), out.data_ptr()
        self._heads.place(block.heads, batch.segments[0], turn, 0, layer)
        present_kernels().attention_block(block)
        return out

    def mlp(
        self, blocks: Sequence[Weights], x: torch.Tensor | Rounded, total: torch.Tensor | None
    ) -> tuple[torch.Tensor | Rounded, torch.Tensor] | None:
        """Add the columns of some blocks to ``total`` (T, H); None if it takes single operations.

        Args:
            blocks: one after another of the same MLP.
            x: (T, H), float32 for the first block of an MLP, then what that one returned.

        Returns:
            The normalised rows, and the sum.
        """
        prepared = [cast("_Prepared[MlpBlock]", w.prepared or self._prepare_mlp(w)) for w in blocks]
        block, rows = prepared[0].block, x.shape[0]
        if any(rows > p.rows or p.block.gate_up.rounds != block.gate_up.rounds for p in prepared):
            return None
        for before, after in pairwise(prepared):
            before.block.next = ctypes.addressof(after.block)
        prepared[-1].block.next = None
        block.tokens, block.add = rows, total is not None
        if total is None:
            assert isinstance(x, torch.Tensor)
            hidden = x.contiguous()
            normed = torch.empty_like(hidden)
            block.hidden, block.normed = hidden.data_ptr(), normed.data_ptr()
            x = Rounded.empty(*x.shape) if block.gate_up.rounds else normed
            total = torch.empty(rows, self._hidden)
        elif not (_is_input(x, block.gate_up) and total.is_contiguous()):
            return None  # another kernel had the first block, and only that one has the norm
        if isinstance(x, Rounded):
            block.codes, block.scales, block.sums = x.pointers
        else:
            block.normed = x.data_ptr()
        block.partial = total.data_ptr()
        present_kernels().mlp_block(block)
        return x, total

    def _prepare_attention(self, w: Weights) -> _Prepared[AttentionBlock]:
        rows = self._rows(w, "qk_proj", "v_proj", "o_proj") if self._heads.suits_native(1) else 0
        block = AttentionBlock(eps=self._eps)
        if rows:
            block.norm = address(w, "norm.weight")
            block.qk, block.v = _matrix(w, "qk_proj"), _matrix(w, "v_proj")
            assert block.qk.rounds == block.v.rounds  # they share their input
            block.out = _matrix(w, "o_proj")
            block.heads = self._heads.arguments(w)
        w.prepared = prepared = _Prepared(rows, block)
        return prepared

    def _prepare_mlp(self, w: Weights) -> _Prepared[MlpBlock]:
        rows = self._rows(w, "gate_up_proj", "down_proj") if self._silu else 0
        block = MlpBlock(eps=self._eps)
        if rows:
            block.norm = address(w, "norm.weight")
            block.gate_up, block.down = _matrix(w, "gate_up_proj"), _matrix(w, "down_proj")
            block.groups = block.gate_up.groups
            rows = 0 if block.gate_up.rows % 16 else rows
        w.prepared = prepared = _Prepared(rows, block)
        return prepared

    def _rows(self, w: Weights, *names: str) -> int:
        """Up to how many rows these products are those in C."""
        native = self._products.native
        in_c = (all(native(w, name, rows) for name in names) for rows in range(1, FEW_ROWS + 1))
        return sum(takewhile(bool, in_c))


def _is_input(x: torch.Tensor | Rounded, matrix: Matrix) -> bool:
    """Whether the product with ``matrix`` takes rows of this kind."""
    if isinstance(x, Rounded):
        return matrix.rounds
    return x.dtype is torch.float32 and not matrix.rounds


def _matrix(w: Weights, name: str) -> Matrix:
    """The weights of a product, with its bias."""
    weight = w[f"{name}.weight"]
    if isinstance(weight, QuantMatrix):
        matrix = Matrix.from_buffer_copy(weight.native)
    else:
        matrix = Matrix.of_rows(weight)
    matrix.bias = address(w, f"{name}.bias")
    return matrix
