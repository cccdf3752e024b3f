"""Tables of how each weight is split, and the blocks that follow from them.

Slicing, loading, block files and memory estimates read the two tables below. A *stored* tensor is
kept by a rank on disk and in memory: one or several checkpoint tensors, sliced and concatenated
along their rows, so that projections of the same input are one matrix product. Values are a
product of their own, because they can be in more bits than queries and keys.

The unit of streaming is the *block*: one layer's attention, a piece of one layer's MLP (some of
its columns; pieces add up like ranks), or a piece of the LM head (rank 0 only). With small blocks,
more weights stay resident under a memory limit; reads are still long and sequential.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import pairwise

import torch

from tpirt.config import ModelConfig
from tpirt.ops.buffers import ALIGN, Region, round_up
from tpirt.ops.quant import AS_THEY_ARE, QuantSpec, Scheme
from tpirt.ops.quant_regions import matrix_regions
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import Shard, Span, make_partition

# Size of an MLP piece, before rounding to whole ``_PIECE_COLUMNS``. Half of it was not faster
# streamed, and slower resident, because every piece is two more matrix products.
_MLP_PIECE_BYTES = 16 << 20

# Blocks of the LM head begin at multiples of this many rows if their size allows, so that plans
# can share units of it.
HEAD_ROWS = 64

# MLP pieces begin at multiples of this many columns: whole groups of 4-bit codes, whole vectors.
_PIECE_COLUMNS = 128


class Split(Enum):
    """The part of a weight ``(out_features, in_features)`` on a rank."""

    Q_ROWS = "colwise by query head"
    KV_ROWS = "colwise by KV head"
    MLP_ROWS = "colwise by MLP column"
    Q_COLUMNS = "rowwise by query head"
    MLP_COLUMNS = "rowwise by MLP column"
    VOCABULARY_ROWS = "colwise by token, on rank 0"
    REPLICATED = "whole on every rank"
    FIRST_RANK = "whole on rank 0: a row-parallel bias is added once"


Condition = Callable[[ModelConfig], bool]
LayerCondition = Callable[[ModelConfig, int], bool]


def _always(_: ModelConfig) -> bool:
    return True


def _nowhere(_: ModelConfig, layer: int) -> bool:
    return False


def _first_layer(_: ModelConfig, layer: int) -> bool:
    return layer == 0


def _few_values(config: ModelConfig, layer: int) -> bool:
    """Whether values are at most a 32nd of a layer's weights: many queries share few KV heads."""
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    heads = 2 * (queries + keys) * config.head_dim
    return 32 * keys * config.head_dim <= heads + 3 * config.intermediate_size


@dataclass(frozen=True)
class Rule:
    """A stored tensor: its name, and its checkpoint tensors with their splits.

    ``present`` tells which models have it, ``sensitive`` in which layers it is kept in at least
    8 bits: where that saves the most per bit (docs/quantization.md).
    """

    name: str
    parts: tuple[tuple[str, Split], ...]
    present: Condition = _always
    sensitive: LayerCondition = _nowhere


_Q, _K, _V, _O = (f"self_attn.{p}_proj" for p in "qkvo")
_GATE, _UP, _DOWN = (f"mlp.{p}_proj" for p in ("gate", "up", "down"))


def _qk(kind: str) -> tuple[tuple[str, Split], ...]:
    return ((f"{_Q}.{kind}", Split.Q_ROWS), (f"{_K}.{kind}", Split.KV_ROWS))


def _v(kind: str) -> tuple[tuple[str, Split], ...]:
    return ((f"{_V}.{kind}", Split.KV_ROWS),)


def _gate_up(kind: str) -> tuple[tuple[str, Split], ...]:
    return ((f"{_GATE}.{kind}", Split.MLP_ROWS), (f"{_UP}.{kind}", Split.MLP_ROWS))


ATTENTION = (
    Rule("norm.weight", (("input_layernorm.weight", Split.REPLICATED),)),
    Rule("q_norm.weight", (("self_attn.q_norm.weight", Split.REPLICATED),), lambda c: c.qk_norm),
    Rule("k_norm.weight", (("self_attn.k_norm.weight", Split.REPLICATED),), lambda c: c.qk_norm),
    Rule("qk_proj.weight", _qk("weight")),
    Rule("qk_proj.bias", _qk("bias"), lambda c: c.qkv_bias),
    Rule("v_proj.weight", _v("weight"), sensitive=_few_values),
    Rule("v_proj.bias", _v("bias"), lambda c: c.qkv_bias),
    Rule("o_proj.weight", ((f"{_O}.weight", Split.Q_COLUMNS),)),
    Rule("o_proj.bias", ((f"{_O}.bias", Split.FIRST_RANK),), lambda c: c.o_bias),
)

MLP = (
    Rule("norm.weight", (("post_attention_layernorm.weight", Split.REPLICATED),)),
    Rule("gate_up_proj.weight", _gate_up("weight")),
    Rule("gate_up_proj.bias", _gate_up("bias"), lambda c: c.mlp_bias),
    Rule("down_proj.weight", ((f"{_DOWN}.weight", Split.MLP_COLUMNS),), sensitive=_first_layer),
    Rule("down_proj.bias", ((f"{_DOWN}.bias", Split.FIRST_RANK),), lambda c: c.mlp_bias),
)

# Later pieces of an MLP: only columns. The first piece has the norm and the row-parallel bias.
MLP_FURTHER = tuple(rule for rule in MLP if rule.parts[0][1] in (Split.MLP_ROWS, Split.MLP_COLUMNS))


@dataclass(frozen=True)
class Piece:
    """A rectangle of a checkpoint tensor; ``columns`` is None for a vector.

    ``source`` is the name without the ``model.`` prefix; ``lm_head.weight`` and ``norm.weight``
    are global, the others begin with ``layers.N.``. ``split`` is how its tensor is divided.
    """

    source: str
    rows: Span
    columns: Span | None
    split: Split = Split.REPLICATED

    @property
    def stops(self) -> tuple[int, ...]:
        """Its end per axis, a lower bound of the tensor's shape."""
        return (self.rows.stop,) if self.columns is None else (self.rows.stop, self.columns.stop)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a block as stored; ``dtype`` applies if it is not quantized."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    quant: QuantSpec = AS_THEY_ARE

    @property
    def regions(self) -> tuple[Region, ...]:
        """Its regions, relative to its start: one region, or codes and scales."""
        if not isinstance(self.quant, Scheme):
            return (Region(self.name, self.dtype, self.shape),)
        out_features, in_features = self.shape
        parts = matrix_regions(self.quant, out_features, in_features)
        return tuple(replace(part, name=f"{self.name}.{part.name}") for part in parts)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.regions[-1].end


@dataclass(frozen=True)
class Block:
    """The unit of streaming: some tensors of one rank."""

    name: str
    tensors: tuple[StoredTensor, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each tensor, a multiple of 64, so that every row is aligned for the kernels."""
        offsets, end = [], 0
        for tensor in self.tensors:
            offsets.append(round_up(end, ALIGN))
            end = offsets[-1] + tensor.nbytes
        return tuple(offsets)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors and the gaps between them."""
        return self.offsets[-1] + self.tensors[-1].nbytes


def rank_blocks(config: ModelConfig, shard: Shard, form: WeightFormat) -> tuple[Block, ...]:
    """List the blocks of one rank in order of use.

    Every layer is its attention and then its MLP in the pieces of :func:`mlp_pieces`; on rank 0
    the LM head's pieces follow. Norms and biases are float32, matrices are in ``form``.
    """
    blocks = layer_blocks(config, shard, form)
    if shard.first:
        blocks += tuple(_head_blocks(config, form, max(block.nbytes for block in blocks)))
    return blocks


def layer_blocks(config: ModelConfig, shard: Shard, form: WeightFormat) -> tuple[Block, ...]:
    """List the blocks of the decoder layers only; see :func:`rank_blocks`."""
    blocks: list[Block] = []
    for layer in range(config.num_hidden_layers):
        pieces = mlp_pieces(config, shard, form, layer)
        names = ["mlp"] if len(pieces) == 1 else [f"mlp.{i}" for i in range(len(pieces))]
        prefix = f"layers.{layer}"
        blocks.append(Block(f"{prefix}.attention", _stored(config, shard, form, layer, ATTENTION)))
        for name, columns in zip(names, pieces, strict=True):
            part = replace(shard, columns=columns)
            rules = MLP if columns is pieces[0] else MLP_FURTHER
            blocks.append(Block(f"{prefix}.{name}", _stored(config, part, form, layer, rules)))
    return tuple(blocks)


def weight_bits(config: ModelConfig, form: WeightFormat) -> float:
    """Bits of a weight in the layers' matrices on average, with scales and padding."""
    (whole,) = make_partition(config, 1).shards
    tensors = [tensor for block in layer_blocks(config, whole, form) for tensor in block.tensors]
    matrices = [tensor for tensor in tensors if len(tensor.shape) == 2]
    weights = sum(math.prod(matrix.shape) for matrix in matrices)
    return 8 * sum(matrix.nbytes for matrix in matrices) / weights


def mlp_pieces(
    config: ModelConfig, shard: Shard, form: WeightFormat, layer: int
) -> tuple[Span, ...]:
    """Split a layer's MLP columns into pieces, one per block, equal to within 128 columns."""
    nbytes = sum(tensor.nbytes for tensor in _stored(config, shard, form, layer, MLP_FURTHER))
    units = shard.columns.size // _PIECE_COLUMNS
    count = max(1, min(units, math.ceil(nbytes / _MLP_PIECE_BYTES)))
    start, stop = shard.columns
    cuts = [start + units * i // count * _PIECE_COLUMNS for i in range(count)] + [stop]
    return tuple(Span(low, high) for low, high in pairwise(cuts))


def _stored(
    config: ModelConfig, shard: Shard, form: WeightFormat, layer: int, rules: tuple[Rule, ...]
) -> tuple[StoredTensor, ...]:
    tensors = []
    for rule in rules:
        if not rule.present(config) or (rule.parts[0][1] is Split.FIRST_RANK and not shard.first):
            continue
        pieces = tuple(
            _piece(config, shard, f"layers.{layer}.{source}", split) for source, split in rule.parts
        )
        rows = sum(piece.rows.size for piece in pieces)
        columns = pieces[0].columns
        shape = (rows,) if columns is None else (rows, columns.size)
        kept, quant = torch.float32, AS_THEY_ARE
        if columns is not None:
            kept = form.dtype
            quant = form.sensitive_quant if rule.sensitive(config, layer) else form.quant
        tensors.append(StoredTensor(rule.name, shape, kept, pieces, quant))
    return tuple(tensors)


def _piece(config: ModelConfig, shard: Shard, source: str, split: Split) -> Piece:
    head = config.head_dim
    rows, columns = _whole(config, source)
    match split:
        case Split.Q_ROWS:
            rows = shard.q_heads.scaled(head)
        case Split.KV_ROWS:
            rows = shard.kv_heads.scaled(head)
        case Split.MLP_ROWS:
            rows = shard.columns
        case Split.Q_COLUMNS:
            columns = shard.q_heads.scaled(head)
        case Split.MLP_COLUMNS:
            columns = shard.columns
    vector = source.endswith((".bias", "norm.weight"))
    return Piece(source, rows, None if vector else columns, split)


def _whole(config: ModelConfig, source: str) -> tuple[Span, Span]:
    """Rows and columns of a tensor along the axes that are not split."""
    if source.endswith(("q_norm.weight", "k_norm.weight")):
        return Span(0, config.head_dim), Span(0, 0)
    return Span(0, config.hidden_size), Span(0, config.hidden_size)


def _head_blocks(config: ModelConfig, form: WeightFormat, limit_bytes: int) -> Iterator[Block]:
    whole = Span(0, config.hidden_size)
    norm = StoredTensor(
        "norm.weight", (config.hidden_size,), torch.float32, (Piece("norm.weight", whole, None),)
    )

    def head(rows: Span) -> StoredTensor:
        pieces = (Piece("lm_head.weight", rows, whole, Split.VOCABULARY_ROWS),)
        shape = (rows.size, config.hidden_size)
        return StoredTensor("lm_head.weight", shape, form.dtype, pieces, form.sensitive_quant)

    spare = limit_bytes - round_up(norm.nbytes, ALIGN)
    # A single row takes as much as the tile that it is padded to.
    rows_per_block = max(1, HEAD_ROWS * spare // head(Span(0, HEAD_ROWS)).nbytes)
    if rows_per_block > HEAD_ROWS:
        rows_per_block -= rows_per_block % HEAD_ROWS
    for index, start in enumerate(range(0, config.vocab_size, rows_per_block)):
        weight = head(Span(start, min(start + rows_per_block, config.vocab_size)))
        yield Block(f"head.{index}", (norm, weight) if index == 0 else (weight,))
