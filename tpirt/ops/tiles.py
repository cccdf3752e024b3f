"""The order of quantized codes in memory: tiles of 16 rows and 32 inputs.

The order is the same on every CPU: a line of 64 bytes holds 16 rows and a few neighbouring inputs,
one vector of AVX-512, two of AVX2 and four of NEON (``tpirt/ops/native/native.h``). Axes: N rows, a
multiple of 16; K inputs, a multiple of 32; G = K / 32 groups. A matrix is 16 rows after 16 rows,
each of them tile after tile.
"""

from __future__ import annotations

import torch

TILE_ROWS = 16
TILE_INPUTS = 32


def pack_bytes(codes: torch.Tensor, out: torch.Tensor) -> None:
    """Put one-byte codes (N, K) in order: ``out`` (N / 16, G, 512)."""
    blocks, groups, _ = out.shape
    tiles = codes.view(blocks, TILE_ROWS, groups, 8, 4)
    out.view(blocks, groups, 8, TILE_ROWS, 4).copy_(tiles.permute(0, 2, 3, 1, 4))


def unpack_bytes(packed: torch.Tensor) -> torch.Tensor:
    """Undo :func:`pack_bytes`: (N / 16, G, 512) to (N, K)."""
    blocks, groups, _ = packed.shape
    tiles = packed.view(blocks, groups, 8, TILE_ROWS, 4).permute(0, 3, 1, 2, 4)
    return tiles.reshape(blocks * TILE_ROWS, groups * TILE_INPUTS)


def pack_nibbles(codes: torch.Tensor, out: torch.Tensor) -> None:
    """Put codes 0..15, uint8 (N, K) of any strides, in order: ``out`` uint8 (N / 16, G, 256).

    A line has four inputs in the low and the next four in the high halves of its bytes.
    """
    blocks, groups, _ = out.shape
    rows = _split(_split(codes, 0, blocks, TILE_ROWS), 2, groups, 4, 2, 4)
    low, high = rows.permute(4, 0, 2, 3, 1, 5)  # (2, blocks, groups, 4, 16, 4)
    torch.add(low, high, alpha=16, out=out.view(blocks, groups, 4, TILE_ROWS, 4))


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Undo :func:`pack_nibbles`: uint8 (N / 16, G, 256) to codes uint8 (N, K)."""
    blocks, groups, _ = packed.shape
    lines = packed.view(blocks, groups, 4, TILE_ROWS, 4).permute(0, 3, 1, 2, 4)
    codes = torch.empty(*lines.shape[:4], 2, 4, dtype=torch.uint8)
    torch.bitwise_and(lines, 15, out=codes[..., 0, :])
    torch.bitwise_right_shift(lines, 4, out=codes[..., 1, :])
    return codes.view(blocks * TILE_ROWS, groups * TILE_INPUTS)


def pack_groups(values: torch.Tensor, out: torch.Tensor) -> None:
    """Put a value per row and group (N, G) in order: ``out`` (N / 16, G, 16)."""
    out.copy_(_split(values, 0, len(out), TILE_ROWS).transpose(1, 2))


def unpack_groups(packed: torch.Tensor) -> torch.Tensor:
    """Undo :func:`pack_groups`: (N / 16, G, 16) to (N, G)."""
    return packed.transpose(1, 2).flatten(0, 1)


def _split(x: torch.Tensor, axis: int, *sizes: int) -> torch.Tensor:
    """View one axis as several, for any strides."""
    return x.view(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
