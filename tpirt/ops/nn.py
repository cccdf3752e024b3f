"""Transformer functions: normalisation, activation, attention.

Axes: T new tokens, S cached and new tokens, H hidden, D head_dim, Q query heads, K KV heads,
G query heads per KV head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tpirt.ops.buffers import round_up

# Maximum elements of an attention mask: bounds a chunk's memory for any context length.
MASK_ELEMENTS = 1 << 22

# Queries and keys of attention in bfloat16 are rounded up to multiples of these.
_TILE_ROWS, _TILE_KEYS = 32, 64

# By ``ModelConfig.hidden_act``.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def padded_rows(rows: int) -> int:
    """The number of rows that torch's products in bfloat16 are computed with.

    oneDNN compiles kernels for every number that it has seen, for each shape of matrix, and keeps
    them: almost a MiB each. With prompts' chunks of all lengths that was several hundred MiB.
    """
    for most, step in ((128, 32), (256, 64)):
        if rows <= most:
            return round_up(rows, step)
    return round_up(rows, 128)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last axis, computed in float32; returns float32."""
    return F.rms_norm(x.float(), weight.shape, weight, eps)


def gated_mlp(
    gate_up: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``activation(gate) * up`` of ``gate_up`` (T, 2 I); returns (T, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: list[int],
    window: int | None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the last T of S positions, ``softmax(q k^T / sqrt(D)) v``.

    Memory is linear in S: queries are computed in pieces whose mask is at most 4 Mi elements.

    Args:
        q: (Q, T, D), queries of the newest positions.
        k: (K, S, D), keys of all positions; ``v`` likewise.
        groups: number of query heads per KV head, length K, summing to Q.
        window: a query sees itself and the ``window - 1`` positions before it; None for all.
        mask: what each query sees instead, (T, S); for a few queries.

    Returns:
        (Q, T, D).
    """
    tokens, past = q.shape[1], k.shape[1] - q.shape[1]
    if mask is not None:
        return _grouped(q, k, v, groups, mask)
    if tokens == 1:
        seen = k.shape[1] if window is None else min(window, k.shape[1])
        return _grouped(q, k[:, -seen:], v[:, -seen:], groups, None)
    piece = max(1, MASK_ELEMENTS // k.shape[1])
    piece = min(tokens, piece // _TILE_ROWS * _TILE_ROWS or piece)
    out = torch.empty_like(q)
    for start in range(0, tokens, piece):
        stop = min(start + piece, tokens)
        first = 0 if window is None else max(0, past + start - window + 1)
        keys = slice(first, past + stop)
        mask = _mask(past + start, stop - start, first, window)
        out[:, start:stop] = _grouped(q[:, start:stop], k[:, keys], v[:, keys], groups, mask)
    return out


def _mask(start: int, tokens: int, first: int, window: int | None) -> torch.Tensor | None:
    """True where the query at ``start + row`` sees the key at ``first + column``.

    None if plain causality suffices: a single query, or no keys before the queries.
    """
    if tokens == 1 or (first == start and (window is None or window >= tokens)):
        return None
    query = torch.arange(start, start + tokens).unsqueeze(1)
    key = torch.arange(first, start + tokens).unsqueeze(0)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _grouped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: list[int],
    mask: torch.Tensor | None,
) -> torch.Tensor:
    if len(set(groups)) == 1:
        return _attend(q, k, v, groups[0], mask)
    # More ranks than KV heads: KV heads have different numbers of local query heads.
    parts, start = [], 0
    for kv, count in enumerate(groups):
        heads = q[start : start + count]
        parts.append(_attend(heads, k[kv : kv + 1], v[kv : kv + 1], count, mask))
        start += count
    return torch.cat(parts)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: int, mask: torch.Tensor | None
) -> torch.Tensor:
    kv_heads, tokens, dim = k.shape[0], q.shape[1], q.shape[2]
    if tokens == 1:
        # A group's queries take the place of tokens, so each KV head is read once.
        grouped = q.view(1, kv_heads, group, dim)
        out = F.scaled_dot_product_attention(grouped, k.unsqueeze(0), v.unsqueeze(0))
        return out.reshape(q.shape)
    if q.dtype is torch.bfloat16:
        q, k, v, mask = _tiled(q, k, v, mask)
    grouped = q.view(kv_heads, group, q.shape[1], dim)
    shape = (kv_heads, group, k.shape[1], dim)
    # expand, not repeat: keys and values are not copied per query head.
    out = F.scaled_dot_product_attention(
        grouped,
        k.unsqueeze(1).expand(shape),
        v.unsqueeze(1).expand(shape),
        attn_mask=mask,
        is_causal=mask is None,
    )
    return out.reshape(q.shape)[:, :tokens]


def _tiled(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Round the numbers of queries and keys up, with keys that no query sees.

    torch keeps the kernels that it compiles for the rest of each number, for ever: 0.3 MiB for each
    length of a prompt.
    """
    tokens, past = q.shape[1], k.shape[1]
    rows, seen = round_up(tokens, _TILE_ROWS), round_up(past, _TILE_KEYS)
    if mask is None:  # causal, from the first key on: later ones are not seen
        rows = seen
    else:
        mask = F.pad(mask, (0, 0, 0, rows - tokens), value=True)
        mask = F.pad(mask, (0, seen - past), value=False)
    return F.pad(q, (0, 0, 0, rows - tokens)), _longer(k, seen), _longer(v, seen), mask


def _longer(x: torch.Tensor, length: int) -> torch.Tensor:
    """``x`` (K, S, D) with more positions of any content: what follows in its buffer, or a copy."""
    heads, positions, dim = x.shape
    end = x.storage_offset() + (heads - 1) * x.stride(0) + (length - 1) * x.stride(1) + dim
    if end * x.itemsize <= x.untyped_storage().nbytes():
        return x.as_strided((heads, length, dim), x.stride())
    return F.pad(x, (0, 0, 0, length - positions))
