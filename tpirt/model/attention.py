"""The attention of a rank's heads over the keys and values of each sequence.

Axes: T tokens, Q local query heads, K local KV heads, D head_dim.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cached_property

import torch

from tpirt.batch import Batch, Segment
from tpirt.config import ModelConfig
from tpirt.model.kv_store import Cached, KVStore
from tpirt.model.products import address, plain
from tpirt.ops.cpu import bfloat16_units
from tpirt.ops.native.bindings import Attention, NativeKernels, SequenceRows, available_kernels
from tpirt.ops.nn import attention, rms_norm
from tpirt.ops.quant_linear import FEW_ROWS
from tpirt.ops.rope import rotate
from tpirt.sharding.partition import Shard
from tpirt.weights.layout import Weights


@dataclass
class Turn:
    """The rotation of rows by their positions.

    Attributes:
        cos, sin: (T, D) float32; see :class:`tpirt.ops.rope.RotaryEmbedding`.
        dtype: of the heads.
        sequences, parents: see :meth:`Heads.sequences`.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    dtype: torch.dtype
    sequences: ctypes.Array[SequenceRows] | None = None
    parents: list[torch.Tensor | None] = field(default_factory=list)

    @cached_property
    def cast(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``cos`` and ``sin`` in the dtype of the heads."""
        return self.cos.to(self.dtype), self.sin.to(self.dtype)


class Heads:
    """Attends with a rank's heads; keys and values are in ``kv``, in ``dtype``."""

    def __init__(self, config: ModelConfig, shard: Shard, kv: KVStore, dtype: torch.dtype):
        self._config = config
        self._kv = kv
        self._dtype = dtype
        self._queries, self._keys = shard.q_heads.size, shard.kv_heads.size
        self._groups = _group_sizes(config, shard)
        self._groups_array = torch.tensor(self._groups, dtype=torch.int32)

    def attend(
        self,
        w: Weights,
        qk: torch.Tensor,
        v: torch.Tensor,
        batch: Batch,
        turn: Turn,
        layer: int,
    ) -> torch.Tensor:
        """Append keys and values and attend within each sequence.

        Args:
            w: the block, for the norms of queries and keys.
            qk: (T, (Q + K) D), queries and keys.
            v: (T, K D).
            batch: the rows' sequences.
            turn: the rows' rotation.
            layer: its number.

        Returns:
            (T, Q D); in the last layer of the wanted rows only.
        """
        runs = batch.by(lambda segment: self._native(segment.tokens))
        if len(runs) == 1:
            return self._attend_alike(runs[0][0], w, qk, v, batch, turn, layer)
        outs = []
        for native, part, rows in runs:  # long segments by torch, the others in C
            own = slice(rows.start, rows.stop)
            turned = Turn(turn.cos[own], turn.sin[own], turn.dtype)
            outs.append(self._attend_alike(native, w, qk[own], v[own], part, turned, layer))
        return torch.cat(outs)  # float32 if one is

    def is_last(self, layer: int) -> bool:
        """Whether it is the last layer, where only the wanted rows go on."""
        return layer == self._config.num_hidden_layers - 1

    def _attend_alike(
        self,
        native: NativeKernels | None,
        w: Weights,
        qk: torch.Tensor,
        v: torch.Tensor,
        batch: Batch,
        turn: Turn,
        layer: int,
    ) -> torch.Tensor:
        """Attend within all sequences in C, or within all by torch; see :meth:`attend`."""
        if native is not None:
            qkv = torch.cat((qk.float(), v.float()), dim=1)
            out = self._attend_native(native, w, qkv, batch, turn, layer)
            return wanted_rows(out, batch) if self.is_last(layer) else out
        q, k = self._turned(w, self._by_head(qk), turn)
        out = self._attend(batch, layer, q, k, self._by_head(v))  # (Q, T, D)
        return out.transpose(0, 1).reshape(out.shape[1], self._queries * self._config.head_dim)

    # -- in C: a few rows, over keys and values in bfloat16 or codes ---------------------------

    def suits_native(self, rows: int) -> bool:
        """Whether the kernel in C can attend with so many rows, and is the faster one.

        For many, torch's is faster, if the CPU has bfloat16 units.
        """
        half = self._dtype is torch.bfloat16
        return (
            (rows <= FEW_ROWS or (half and not bfloat16_units()))
            and (half or self._kv.layout.bits is not None)
            and self._config.head_dim % 16 == 0
        )

    def _native(self, tokens: int) -> NativeKernels | None:
        """For a segment of so many tokens, whatever else is in the step; None if torch attends."""
        return available_kernels() if self.suits_native(tokens) else None

    def arguments(self, w: Weights) -> Attention:
        """What is the same for all layers and rows."""
        return Attention(
            q_norm=address(w, "q_norm.weight"),
            k_norm=address(w, "k_norm.weight"),
            groups=self._groups_array.data_ptr(),
            queries=self._queries,
            keys=self._keys,
            dim=self._config.head_dim,
            eps=self._config.rms_norm_eps,
        )

    def sequences(self, batch: Batch, turn: Turn) -> ctypes.Array[SequenceRows]:
        """The sequences of a step's rows, made once for all of its layers."""
        if turn.sequences is None:
            turn.parents = [_parents(segment) for segment in batch.segments]
            turn.sequences = (SequenceRows * len(batch.segments))(
                *(
                    SequenceRows(
                        ctypes.addressof(self._kv.rooms(segment)),
                        turn.cos[rows.start].data_ptr(),
                        turn.sin[rows.start].data_ptr(),
                        None if parents is None else parents.data_ptr(),
                        segment.tokens,
                        segment.position,
                    )
                    for segment, rows, parents in zip(
                        batch.segments, batch.rows, turn.parents, strict=True
                    )
                )
            )
        return turn.sequences

    def _attend_native(
        self,
        native: NativeKernels,
        w: Weights,
        qkv: torch.Tensor,
        batch: Batch,
        turn: Turn,
        layer: int,
    ) -> torch.Tensor:
        out = torch.empty(len(qkv), self._queries * self._config.head_dim)
        heads = self.arguments(w)
        heads.window = self._config.sliding_windows[layer] or 0
        native.attend_each(heads, self.sequences(batch, turn), layer, qkv, out)
        return out

    # -- with torch ----------------------------------------------------------------------------

    def _by_head(self, rows: torch.Tensor) -> torch.Tensor:
        """Heads (N, T, D) of rows (T, N D)."""
        return rows.to(self._dtype).view(len(rows), -1, self._config.head_dim).transpose(0, 1)

    def _turned(
        self, w: Weights, turning: torch.Tensor, turn: Turn
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, normalised and turned, of heads (Q + K, T, D)."""
        queries, keys = self._queries, self._keys
        q_norm, k_norm = plain(w, "q_norm.weight"), plain(w, "k_norm.weight")
        if q_norm is not None and k_norm is not None:
            q, k = torch.split(turning, [queries, keys])
            eps = self._config.rms_norm_eps
            turning = torch.cat((rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)))
        q, k = torch.split(rotate(turning.to(self._dtype), *turn.cast), [queries, keys])
        return q, k

    def _attend(
        self, batch: Batch, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        window = self._config.sliding_windows[layer]
        if len(batch.segments) == 1 and batch.num_logits == batch.tokens:  # a decoded token
            cached = self._kv.append(layer, batch.segments[0], k, v)
            return self._over(q, cached, batch.segments[0], window)
        outs = []
        for segment, rows in zip(batch.segments, batch.rows, strict=True):
            own = slice(rows.start, rows.stop)
            cached = self._kv.append(layer, segment, k[:, own], v[:, own])
            first = self._first_wanted(segment, rows, layer)
            if first < rows.stop:
                outs.append(self._over(q[:, first : rows.stop], cached, segment, window))
        if len(outs) == 1:
            return outs[0]
        return torch.cat(outs, dim=1) if outs else q[:, :0]

    def _over(
        self, q: torch.Tensor, cached: Cached, segment: Segment, window: int | None
    ) -> torch.Tensor:
        """Attend with q (Q, T, D), a segment's last rows, over what the window sees."""
        seen = cached.length if window is None else min(window - 1 + q.shape[1], cached.length)
        mask = None
        if segment.parents:
            seen = cached.length
            mask = tree_mask(segment, window)[-q.shape[1] :]
        cached = cached.positions(cached.length - seen, cached.length)
        outs, first = [], 0
        for heads, keys, values in cached.pieces(self._dtype):
            groups = self._groups[heads]
            queries = q[first : first + sum(groups)]
            first += sum(groups)
            outs.append(attention(queries, keys, values, groups, window, mask))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _first_wanted(self, segment: Segment, rows: range, layer: int) -> int:
        return rows.stop - segment.num_logits if self.is_last(layer) else rows.start


def wanted_rows(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Select the wanted rows of ``x`` (T, ...); a view if they are contiguous."""
    wanted = batch.wanted_rows
    if not wanted:
        return x[:0]
    first, stop = wanted[0], wanted[-1] + 1
    return x[first:stop] if stop - first == len(wanted) else x[list(wanted)]


def _group_sizes(config: ModelConfig, shard: Shard) -> list[int]:
    """Number of local query heads per local KV head."""
    group = config.num_attention_heads // config.num_key_value_heads
    sizes = [0] * shard.kv_heads.size
    for head in range(*shard.q_heads):
        sizes[head // group - shard.kv_heads.start] += 1
    return sizes


def tree_mask(segment: Segment, window: int | None) -> torch.Tensor:
    """Which positions, cached ones and the rows of the segment, each of its rows sees: (T, S)."""
    rows = torch.tensor(segment.depths).add_(segment.position)
    mask = torch.cat((torch.ones(segment.tokens, segment.position), segment.follows()), 1).bool()
    if window is None:
        return mask
    keys = torch.cat((torch.arange(segment.position), rows))
    return mask & (keys > rows.unsqueeze(1) - window)


def _parents(segment: Segment) -> torch.Tensor | None:
    """For C: how many rows before each row of a tree its parent is."""
    if not segment.parents:
        return None
    before = segment.tokens - len(segment.parents)
    return torch.tensor([1] * before + list(segment.parents), dtype=torch.int32)
