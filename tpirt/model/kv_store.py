"""Keys and values of the local KV heads, one contiguous cache per sequence.

Axes: K local KV heads, S positions of a sequence, T new tokens, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from tpirt.batch import Segment
from tpirt.ops.buffers import page_buffer, round_up

_STEP_TOKENS = 64


@dataclass
class _Slot:
    """One sequence: ``layers`` holds keys and values, each (K, capacity, D)."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    capacity: int = 0
    length: int = 0


class KVStore:
    """Keys and values of many sequences, each in a slot.

    A slot is created empty on first use. Every layer appends the same tokens in a step; they count
    only after :meth:`commit`, so after a failed step each sequence has the positions before it.
    When positions are dropped and a slot has more than twice the needed capacity, its memory is
    returned to the operating system.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype):
        self._shape = (kv_heads, head_dim)
        self._dtype = dtype
        self._layers = layers
        self._token_bytes = 2 * layers * kv_heads * head_dim * dtype.itemsize
        self._slots: dict[int, _Slot] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held by all slots."""
        return self._token_bytes * sum(slot.capacity for slot in self._slots.values())

    def length(self, slot: int) -> int:
        """Number of positions in ``slot``; 0 if it was never used."""
        found = self._slots.get(slot)
        return 0 if found is None else found.length

    def bytes_for(self, segments: Iterable[Segment]) -> int:
        """Peak bytes while a step of these segments is prepared and runs."""
        held = peak = self.nbytes
        for segment in segments:
            slot = self._slots.get(segment.slot) or _Slot([])
            old = slot.capacity
            new = grown_capacity(old, segment.end, shrink=segment.position < slot.length)
            if new != old:
                # Layers are copied one by one: only one exists twice.
                copied = min(old, new) * self._token_bytes // self._layers
                after = held + (new - old) * self._token_bytes
                peak = max(peak, max(held, after) + copied)
                held = after
        return peak

    def prepare(self, segments: Iterable[Segment]) -> None:
        """Drop each sequence's positions from its segment on, and make room for the segment."""
        for segment in segments:
            slot = self._opened(segment.slot)
            assert segment.position <= slot.length
            dropped, slot.length = slot.length - segment.position, segment.position
            self._fit(slot, segment.end, shrink=dropped > 0)

    def append(
        self, layer: int, segment: Segment, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a segment's (K, T, D) at its positions; returns views of all, (K, S, D)."""
        all_keys, all_values = self._slots[segment.slot].layers[layer]
        start, end = segment.position, segment.end
        all_keys[:, start:end] = keys
        all_values[:, start:end] = values
        return all_keys[:, :end], all_values[:, :end]

    def layer(self, layer: int, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers of a segment's sequence, (K, capacity, D), to append to in place."""
        return self._slots[segment.slot].layers[layer]

    def commit(self, segments: Iterable[Segment]) -> None:
        """Commit the segments' positions after all layers have appended them."""
        for segment in segments:
            self._slots[segment.slot].length = segment.end

    def reserve(self, slot: int, tokens: int) -> None:
        """Make room for ``tokens`` positions in total; existing positions stay."""
        found = self._opened(slot)
        self._fit(found, tokens)

    def truncate(self, slot: int, length: int) -> None:
        """Drop the positions from ``length`` on."""
        found = self._opened(slot)
        assert length <= found.length
        found.length = length
        self._fit(found, length, shrink=True)

    def fork(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of ``source`` to ``target``, replacing it."""
        origin = self._slots[source]
        assert source != target
        assert length <= origin.length
        self.free(target)
        copy = self._slots[target] = _Slot(origin.layers, length=length)
        self._move(copy, grown_capacity(0, length))

    def keep(self, slot: int, start: int, indices: Sequence[int]) -> None:
        """Keep only ``indices``, ascending, of the positions from ``start`` on, without gaps.

        For a verified tree of drafts, ``indices`` is the accepted path.
        """
        found = self._slots[slot]
        end = start + len(indices)
        assert all(start <= index < found.length for index in indices)
        chosen = torch.tensor(indices, dtype=torch.int64)
        for layer in found.layers:
            for rows in layer:
                rows[:, start:end] = rows[:, chosen]
        self.truncate(slot, end)

    def free(self, slot: int) -> None:
        """Drop a sequence and release its memory; does nothing for an unused slot."""
        self._slots.pop(slot, None)

    def _opened(self, slot: int) -> _Slot:
        found = self._slots.get(slot)
        if found is None:
            found = self._slots[slot] = _Slot([self._allocate(0)] * self._layers)
        return found

    def _fit(self, slot: _Slot, tokens: int, *, shrink: bool = False) -> None:
        capacity = grown_capacity(slot.capacity, tokens, shrink=shrink)
        if capacity != slot.capacity:
            self._move(slot, capacity)

    def _move(self, slot: _Slot, capacity: int) -> None:
        """Copy all positions to buffers of another size, layer by layer."""
        slot.layers = list(slot.layers)
        slot.capacity = min(slot.capacity, capacity)  # memory may be refused in between
        for index in range(self._layers):
            slot.layers[index] = self._copied(slot.layers[index], slot.length, capacity)
        slot.capacity = capacity

    def _copied(
        self, layer: tuple[torch.Tensor, torch.Tensor], length: int, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        copy = self._allocate(capacity)
        for old, new in zip(layer, copy, strict=True):
            new[:, :length] = old[:, :length]
        return copy

    def _allocate(self, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Allocate uninitialised keys and values of one layer, in one buffer."""
        heads, dim = self._shape
        shape = (2, heads, capacity, dim)
        buffer = page_buffer(math.prod(shape) * self._dtype.itemsize)
        keys, values = buffer.view(self._dtype).view(shape)
        return keys, values


def grown_capacity(current: int, tokens: int, *, shrink: bool = False) -> int:
    """A slot's new capacity if ``tokens`` positions are needed and it has ``current``."""
    needed = round_up(tokens, _STEP_TOKENS)
    if current == 0 or (shrink and current > 2 * needed):
        return needed
    if current >= needed:
        return current
    # Grow by at least a quarter, so that all copies together stay linear in the length.
    return max(needed, round_up(current * 5 // 4, _STEP_TOKENS))
