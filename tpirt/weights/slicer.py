"""Cutting one rank's slice out of a checkpoint, byte range by byte range.

Memory stays at a few pieces of at most 4 MiB, whatever the model's size; a matrix that is
quantized on the way is there once, in its stored form and the form before that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tpirt.errors import CheckpointError
from tpirt.ops.buffers import page_buffer, tensor_bytes
from tpirt.ops.quant_layout import (
    canonical_regions,
    quantize_rows,
    regions_nbytes,
    to_local,
    view_regions,
)
from tpirt.parallel.sharding import Block, Piece, StoredTensor
from tpirt.weights.checkpoint import Checkpoint
from tpirt.weights.layout import block_header

PIECE_BYTES = 4 << 20


def block_bytes(checkpoint: Checkpoint, head_name: str, block: Block) -> Iterator[memoryview]:
    """Yield a block file's bytes in order, header first, in pieces of at most 4 MiB.

    Args:
        checkpoint: where the weights come from.
        head_name: checkpoint tensor that serves as the LM head (the embedding when tied).
        block: what to cut.

    Raises:
        CheckpointError: a read failed or came short, or a weight to be quantized is not finite;
            names file and tensor.
    """
    yield memoryview(block_header(block))
    end = 0
    for tensor, offset in zip(block.tensors, block.offsets, strict=True):
        if offset > end:
            yield memoryview(bytes(offset - end))
        cut = _plain if tensor.quant.kind == "none" else _quantized
        yield from cut(checkpoint, head_name, tensor)
        end = offset + tensor.nbytes


def _plain(checkpoint: Checkpoint, head_name: str, tensor: StoredTensor) -> Iterator[memoryview]:
    for _, part in _parts(checkpoint, head_name, tensor):
        yield tensor_bytes(part.to(tensor.dtype).contiguous())


def _quantized(
    checkpoint: Checkpoint, head_name: str, tensor: StoredTensor
) -> Iterator[memoryview]:
    spec, (rows, inputs) = tensor.quant, tensor.shape
    regions = canonical_regions(spec, rows, inputs)
    canonical = page_buffer(regions_nbytes(regions))
    places = view_regions(regions, canonical)
    done = 0
    for source, part in _parts(checkpoint, head_name, tensor):
        try:
            quantize_rows(spec, part, places, done)
        except CheckpointError as exc:
            raise CheckpointError(f"{checkpoint.path}: {source}: {exc}") from exc
        done += len(part)
    local = page_buffer(regions_nbytes(tensor.regions))
    to_local(spec, rows, inputs, tensor.layout, canonical, local)
    data = tensor_bytes(local)[: tensor.nbytes]
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


def _parts(
    checkpoint: Checkpoint, head_name: str, tensor: StoredTensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a stored tensor's rows in order with their source, at most 4 MiB in float32 each."""
    for piece in tensor.pieces:
        name = checkpoint.source_name(piece.source, head_name)
        for part in _read(checkpoint, name, piece):
            yield name, part


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
