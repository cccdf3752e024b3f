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
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Generic, TypeVar, cast

import torch

from tpirt.batch import Batch
from tpirt.config import ModelConfig
from tpirt.model.attention import Heads, Turn
from tpirt.model.products import Products, address
from tpirt.ops.native.bindings import (
    AttentionBlock,
    HeadBlock,
    Layer,
    LayerRun,
    Matrix,
    MlpBlock,
    Rounded,
    present_kernels,
)
from tpirt.ops.quant_linear import FEW_ROWS
from tpirt.ops.quant_matrix import QuantMatrix
from tpirt.weights.layout import Weights

# A layer's attention, and the blocks of its MLP.
LayerWeights = tuple[Weights, Sequence[Weights]]

_Block = TypeVar("_Block", AttentionBlock, MlpBlock, Matrix)


@dataclass(slots=True)
class _Prepared(Generic[_Block]):
    """Arguments of a block; those that differ from call to call are set by each.

    Attributes:
        rows: the most rows that it takes; 0 if it takes single operations.
        rounds: whether its first product takes rounded rows.
        address: of the block.
    """

    rows: int
    block: _Block
    rounds: bool
    address: int = field(init=False)

    def __post_init__(self) -> None:
        self.address = ctypes.addressof(self.block)


class NativeBlocks:
    """Runs blocks in C where they, the batch and this machine allow it."""

    def __init__(self, config: ModelConfig, products: Products, heads: Heads):
        self._config = config
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
        prepared = self._attention(w)
        if batch.tokens > prepared.rows or not self._suits(batch, layer):
            return None
        hidden = hidden.contiguous()
        out = torch.empty(batch.tokens, self._hidden)
        block = prepared.block
        block.hidden, block.partial = hidden.data_ptr(), out.data_ptr()
        block.heads.window = self._config.sliding_windows[layer] or 0
        self._place(block, batch, turn, layer)
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
        rows = x.shape[0]
        prepared = self._mlp(blocks, rows)
        if prepared is None:
            return None
        block = prepared.block
        block.tokens, block.add = rows, total is not None
        if total is None:
            assert isinstance(x, torch.Tensor)
            hidden = x.contiguous()
            normed = torch.empty_like(hidden)
            block.hidden, block.normed = hidden.data_ptr(), normed.data_ptr()
            x = Rounded.empty(*x.shape) if prepared.rounds else normed
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

    def chain(
        self, weights: Sequence[LayerWeights], batch: Batch, turn: Turn, first: int
    ) -> LayerRun | None:
        """Prepare a run of layers; None if one of them takes single operations.

        Args:
            weights: of the layers from number ``first`` on.
        """
        if not self._suits(batch, first + len(weights) - 1):
            return None
        rounds = set()
        for number, (attention, pieces) in enumerate(weights, first):
            heads, mlp = self._attention(attention), self._mlp(pieces, batch.tokens)
            if mlp is None or batch.tokens > heads.rows:
                return None
            layer = self._layers[number]
            layer.attention, layer.mlp = heads.address, mlp.address
            rounds.add(mlp.rounds)
        if len(rounds) > 1:
            return None
        block = self._attention(weights[0][0]).block
        self._place(block, batch, turn, first)
        return LayerRun(self._layers, first, len(weights), block)

    def layers(self, run: LayerRun, hidden: torch.Tensor) -> torch.Tensor:
        """Run layers in turn where no sum over ranks lies between their blocks.

        Args:
            run: from :meth:`chain`, for the same rows.
            hidden: (T, H) float32, contiguous; all results are added to it but the last MLP's.

        Returns:
            The last MLP's result, (T, H).
        """
        out = torch.empty_like(hidden)
        run.attention.partial = out.data_ptr()
        present_kernels().layers(run, hidden)
        return out

    def suits_head(self, pieces: Sequence[Weights], tokens: int) -> bool:
        """Whether :meth:`head` takes these pieces and so many rows."""
        prepared = [self._head(w) for w in pieces]
        return all(
            0 < tokens <= each.rows and each.rounds == prepared[0].rounds for each in prepared
        ) and not any(each.block.rows % 16 for each in prepared[:-1])

    def head(self, pieces: Sequence[Weights], hidden: torch.Tensor) -> torch.Tensor:
        """Logits (T, V) of all pieces of the LM head.

        Args:
            hidden: (T, H) float32.
        """
        matrices, tokens = [self._head(w).block for w in pieces], len(hidden)
        hidden = hidden.contiguous()
        width = sum(16 * matrix.blocks for matrix in matrices)
        out = torch.empty(tokens, width)
        array = (Matrix * len(matrices))(*matrices)
        block = HeadBlock(
            hidden=hidden.data_ptr(),
            norm=address(pieces[0], "norm.weight"),
            pieces=ctypes.addressof(array),
            out=out.data_ptr(),
            count=len(matrices),
            tokens=tokens,
            width=width,
            eps=self._eps,
        )
        present_kernels().head(block)
        return out[:, : sum(matrix.rows for matrix in matrices)]

    @cached_property
    def _layers(self) -> ctypes.Array[Layer]:
        windows = self._config.sliding_windows
        return (Layer * len(windows))(*(Layer(window=window or 0) for window in windows))

    def _suits(self, batch: Batch, layer: int) -> bool:
        """Whether the attention up to that of ``layer`` keeps its rows."""
        return not self._heads.is_last(layer) or batch.num_logits == batch.tokens

    def _place(self, block: AttentionBlock, batch: Batch, turn: Turn, layer: int) -> None:
        """Set the sequences of an attention, and its layer."""
        sequences = self._heads.sequences(batch, turn)
        block.sequences, block.count = ctypes.addressof(sequences), len(sequences)
        block.tokens, block.layer = batch.tokens, layer

    def _attention(self, w: Weights) -> _Prepared[AttentionBlock]:
        return cast("_Prepared[AttentionBlock]", w.prepared or self._prepare_attention(w))

    def _mlp(self, blocks: Sequence[Weights], rows: int) -> _Prepared[MlpBlock] | None:
        """The first block, linked to the others; None if one takes single operations."""
        prepared = [cast("_Prepared[MlpBlock]", w.prepared or self._prepare_mlp(w)) for w in blocks]
        first = prepared[0]
        if any(rows > each.rows or each.rounds != first.rounds for each in prepared):
            return None
        for before, after in pairwise(prepared):
            before.block.next = after.address
        prepared[-1].block.next = None
        return first

    def _prepare_attention(self, w: Weights) -> _Prepared[AttentionBlock]:
        rows = self._rows(w, "qk_proj", "v_proj", "o_proj") if self._heads.suits_native(1) else 0
        block = AttentionBlock(eps=self._eps)
        if rows:
            block.norm = address(w, "norm.weight")
            block.qk, block.v = _matrix(w, "qk_proj"), _matrix(w, "v_proj")
            assert block.qk.rounds == block.v.rounds  # they share their input
            block.out = _matrix(w, "o_proj")
            block.heads = self._heads.arguments(w)
        w.prepared = prepared = _Prepared(rows, block, block.qk.rounds)
        return prepared

    def _prepare_mlp(self, w: Weights) -> _Prepared[MlpBlock]:
        rows = self._rows(w, "gate_up_proj", "down_proj") if self._silu else 0
        block = MlpBlock(eps=self._eps)
        if rows:
            block.norm = address(w, "norm.weight")
            block.gate_up, block.down = _matrix(w, "gate_up_proj"), _matrix(w, "down_proj")
            block.groups = block.gate_up.groups
            rows = 0 if block.gate_up.rows % 16 else rows
        w.prepared = prepared = _Prepared(rows, block, block.gate_up.rounds)
        return prepared

    def _head(self, w: Weights) -> _Prepared[Matrix]:
        return cast("_Prepared[Matrix]", w.prepared or self._prepare_head(w))

    def _prepare_head(self, w: Weights) -> _Prepared[Matrix]:
        rows = self._rows(w, "lm_head")
        matrix = _matrix(w, "lm_head") if rows else Matrix()
        w.prepared = prepared = _Prepared(rows, matrix, matrix.rounds)
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
