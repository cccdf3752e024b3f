"""Cutting one rank's slice out of a checkpoint, byte range by byte range.

Memory stays at a few pieces of at most 4 MiB, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tpirt.ops.buffers import tensor_bytes
from tpirt.parallel.sharding import Block, Piece
from tpirt.weights.checkpoint import Checkpoint
from tpirt.weights.layout import block_header
from tpirt.weights.names import source_name

PIECE_BYTES = 4 << 20


def block_pieces(checkpoint: Checkpoint, head_name: str, block: Block) -> Iterator[torch.Tensor]:
    """Yield a block's data in file order, each piece in its stored dtype and at most 4 MiB.

    Args:
        checkpoint: where the weights come from.
        head_name: checkpoint tensor that serves as the LM head (the embedding when tied).
        block: what to cut.

    Raises:
        CheckpointError: a read failed or came short; names file and tensor.
    """
    for tensor in block.tensors:
        for piece in tensor.pieces:
            name = source_name(checkpoint, piece.source, head_name)
            for part in _read(checkpoint, name, piece):
                yield part.to(tensor.dtype).contiguous()


def block_bytes(checkpoint: Checkpoint, head_name: str, block: Block) -> Iterator[memoryview]:
    """Yield a block file's bytes, header first; see :func:`block_pieces`."""
    yield memoryview(block_header(block))
    for piece in block_pieces(checkpoint, head_name, block):
        yield tensor_bytes(piece)


def _read(checkpoint: Checkpoint, name: str, piece: Piece) -> Iterator[torch.Tensor]:
    width = checkpoint.tensors[name].shape[-1] if piece.columns else 1
    row_bytes = (piece.columns.size if piece.columns else 1) * 4
    step = max(1, PIECE_BYTES // row_bytes)
    for start in range(piece.rows.start, piece.rows.stop, step):
        stop = min(start + step, piece.rows.stop)
        if piece.columns is None or piece.columns.size == width:
            yield checkpoint.read_rows(name, start, stop)
        else:
            yield checkpoint.read_columns(name, start, stop, *piece.columns)
