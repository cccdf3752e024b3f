"""Units: the parts of a block that do not depend on the plan.

A unit is a rectangle of one checkpoint tensor, cut at fixed places. Slices of one model in one
format have equal bytes for units with equal keys, so a new plan needs only the units that no
stored slice contains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tpirt.config import ModelConfig
from tpirt.sharding.blocks import HEAD_ROWS, Block, Piece, Split, StoredTensor
from tpirt.sharding.partition import Span

_COLUMNS = (128, 64, 32, 16, 8)
_MIN_UNITS = 32  # of an MLP, if its size allows


@dataclass(frozen=True)
class Unit:
    """A rectangle of a checkpoint tensor, and its position in a block.

    Attributes:
        key: source tensor and rectangle. In slices of one model in one dtype and quantization,
            equal keys mean equal bytes.
        tensor: index of its tensor in the block.
        rows: its rows in that tensor.
        columns: its columns in that tensor; None for a vector.
    """

    key: str
    tensor: int
    rows: Span
    columns: Span | None

    def piece(self, tensor: StoredTensor) -> Piece:
        """The same rectangle in its checkpoint tensor."""
        start = 0
        for piece in tensor.pieces:
            if self.rows.start < start + piece.rows.size:
                rows = _moved(self.rows, piece.rows.start - start)
                columns = piece.columns
                if columns is not None and self.columns is not None:
                    columns = _moved(self.columns, columns.start)
                return Piece(piece.source, rows, columns, piece.split)
            start += piece.rows.size
        raise AssertionError(self)


def block_units(config: ModelConfig, block: Block) -> tuple[Unit, ...]:
    """List a block's units by tensor, in the order of their rows or columns.

    Matrices are cut along the axis that plans split, at multiples of an attention head, of
    128 MLP columns (fewer in small models), or of 64 rows of the LM head. Vectors are one unit.
    Columns whose codes depend on each other stay together: see ``Scheme.column_step``.
    """
    units: list[Unit] = []
    for index, tensor in enumerate(block.tensors):
        first = 0
        for piece in tensor.pieces:
            units += _piece_units(config, index, tensor, piece, first)
            first += piece.rows.size
    return tuple(units)


def unit_columns(config: ModelConfig) -> int:
    """MLP columns per unit; depends on the model only, not on the plan."""
    size = config.intermediate_size
    return next((c for c in _COLUMNS if size % c == 0 and size // c >= _MIN_UNITS), _COLUMNS[-1])


def most_units(config: ModelConfig) -> int:
    """An upper bound of the number of units of all ranks, from sizes only."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    columns = 3 * (config.intermediate_size // unit_columns(config) + 1)
    extra = 16 + config.intermediate_size // 128  # vectors and the ends of blocks
    return config.num_hidden_layers * (heads + columns + extra) + config.vocab_size // HEAD_ROWS + 1


def _piece_units(
    config: ModelConfig, index: int, tensor: StoredTensor, piece: Piece, first: int
) -> Iterator[Unit]:
    rows = Span(first, first + piece.rows.size)
    if piece.columns is None:
        yield Unit(_key(piece.source, piece.rows, None), index, rows, None)
        return
    whole = Span(0, piece.columns.size)
    step = _step(config, piece.split)
    if piece.split not in (Split.Q_COLUMNS, Split.MLP_COLUMNS):
        for part in _cut(piece.rows, step):
            key = _key(piece.source, part, piece.columns)
            yield Unit(key, index, _moved(part, first - piece.rows.start), whole)
        return
    for part in _cut(piece.columns, tensor.quant.column_step(piece.columns.start, step)):
        key = _key(piece.source, piece.rows, part)
        yield Unit(key, index, rows, _moved(part, -piece.columns.start))


def _step(config: ModelConfig, split: Split) -> int:
    match split:
        case Split.Q_ROWS | Split.KV_ROWS | Split.Q_COLUMNS:
            return config.head_dim
        case Split.MLP_ROWS | Split.MLP_COLUMNS:
            return unit_columns(config)
        case _:
            return HEAD_ROWS


def _cut(span: Span, step: int) -> Iterator[Span]:
    """Cut a span at the multiples of ``step`` inside it."""
    start = span.start
    while start < span.stop:
        stop = min((start // step + 1) * step, span.stop) if step else span.stop
        yield Span(start, stop)
        start = stop


def _moved(span: Span, by: int) -> Span:
    return Span(span.start + by, span.stop + by)


def _key(source: str, rows: Span, columns: Span | None) -> str:
    place = f"{rows.start}:{rows.stop}"
    return (
        f"{source}[{place}]" if columns is None else f"{source}[{place},{columns[0]}:{columns[1]}]"
    )
