"""Keys and values of the local KV heads, grown as the sequence grows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_STEP_TOKENS = 64


@dataclass
class _Layer:
    keys: torch.Tensor  # (K, capacity, D)
    values: torch.Tensor


class KVCache:
    """All layers' keys and values, (K, S, D) each; ``length`` positions are filled."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype):
        self.length = 0
        self.capacity = 0
        self._token_bytes = 2 * layers * kv_heads * head_dim * dtype.itemsize
        empty = torch.empty(kv_heads, 0, head_dim, dtype=dtype)
        self._layers = [_Layer(empty, empty) for _ in range(layers)]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.capacity * self._token_bytes

    def bytes_for(self, tokens: int) -> int:
        """Bytes that will be held once ``tokens`` positions were asked for, growth included."""
        capacity = self._capacity_for(tokens)
        if capacity == self.capacity:
            return self.nbytes
        # While one layer's keys are copied, its old and its new ones are there.
        return capacity * self._token_bytes + self.nbytes // (2 * len(self._layers))

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` positions; what is filled stays."""
        capacity = self._capacity_for(tokens)
        if capacity == self.capacity:
            return
        for layer in self._layers:
            layer.keys = self._grown(layer.keys, capacity)
            layer.values = self._grown(layer.values, capacity)
        self.capacity = capacity

    def truncate(self, length: int) -> None:
        """Forget the positions from ``length`` on."""
        assert length <= self.length
        self.length = length

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, offset: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (K, T, D) ``offset`` behind the filled positions; return views of all, (K, S, D).

        Every layer appends the same tokens; then :meth:`advance` makes them count.
        """
        start = self.length + offset
        end = start + keys.shape[1]
        slot = self._layers[layer]
        slot.keys[:, start:end] = keys
        slot.values[:, start:end] = values
        return slot.keys[:, :end], slot.values[:, :end]

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` positions that all layers have appended."""
        self.length += tokens

    def _capacity_for(self, tokens: int) -> int:
        if tokens <= self.capacity:
            return self.capacity
        # By half as much again: copying stays linear in the length, waste below a third.
        wanted = max(tokens, min(self.capacity * 3 // 2, tokens + 4096))
        return -(-wanted // _STEP_TOKENS) * _STEP_TOKENS

    def _grown(self, old: torch.Tensor, capacity: int) -> torch.Tensor:
        new = torch.empty(old.shape[0], capacity, old.shape[2], dtype=old.dtype)
        new[:, : self.length] = old[:, : self.length]
        return new
