"""Keys and values of the local KV heads, one contiguous cache per sequence.

Axes: K local KV heads, S positions of a sequence, T new tokens, D head_dim.

A layer of a sequence is one buffer::

    dtype    keys, values               (K, capacity, D) each
    or
    int8     codes of keys, of values   (K, capacity, D) each
    bfloat16 their scales               (K, capacity) each; value = scale * code
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tpirt.batch import Segment
from tpirt.ops.buffers import page_buffer, round_up
from tpirt.ops.kv_codes import SCALE_DTYPE, from_codes, round_to_codes
from tpirt.ops.native.bindings import KVRoom

_STEP_TOKENS = 64
_PIECE_ELEMENTS = 1 << 20  # of keys, or of values, that are restored from codes at once


class Cached(NamedTuple):
    """Keys and values of one layer of a sequence; see the module for the layout."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that there are; positions are axis 1 of each."""
        return tuple(tensor for tensor in self if tensor is not None)

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.keys.shape[1]

    @property
    def room(self) -> KVRoom:
        """Where they lie, for C."""
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in self]
        return KVRoom(*addresses, self.length)

    def positions(self, start: int, end: int) -> Cached:
        """A view of the positions from ``start`` to ``end``."""
        return Cached(*(tensor[:, start:end] for tensor in self.tensors))

    def write(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write (K, T, D) from position ``start`` on."""
        for new, old, scales in (
            (keys, self.keys, self.key_scales),
            (values, self.values, self.value_scales),
        ):
            own = slice(start, start + new.shape[1])
            if scales is None:
                old[:, own] = new
            else:
                old[:, own], scales[:, own] = round_to_codes(new)

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Groups of KV heads, with their keys and values in ``dtype``.

        All heads at once without codes; else so many as ``piece_bytes`` of a layout has room for.
        """
        if self.key_scales is None or self.value_scales is None:
            yield slice(None), self.keys, self.values
            return
        count, positions, dim = self.keys.shape
        step = _piece_heads(positions, dim)
        for first in range(0, count, step):
            heads = slice(first, min(first + step, count))
            keys = from_codes(self.keys[heads], self.key_scales[heads], dtype)
            yield heads, keys, from_codes(self.values[heads], self.value_scales[heads], dtype)


@dataclass(frozen=True)
class KVLayout:
    """The layout of one layer of a sequence.

    Attributes:
        heads, dim: K and D.
        dtype: of what attention reads.
        bits: of a cached number; None for those of ``dtype``.
    """

    heads: int
    dim: int
    dtype: torch.dtype
    bits: int | None = None

    @property
    def token_bytes(self) -> int:
        """Bytes of one position."""
        if self.bits is None:
            return 2 * self.heads * self.dim * self.dtype.itemsize
        return 2 * self.heads * (self.dim + SCALE_DTYPE.itemsize)

    def piece_bytes(self, tokens: int) -> int:
        """Bytes of what is restored from codes at once while ``tokens`` positions are read."""
        if self.bits is None:
            return 0
        heads = min(self.heads, _piece_heads(tokens, self.dim))
        return 2 * heads * tokens * self.dim * self.dtype.itemsize

    def allocate(self, capacity: int) -> Cached:
        """Uninitialised room for ``capacity`` positions."""
        buffer = page_buffer(capacity * self.token_bytes)
        shape = (2, self.heads, capacity, self.dim)
        if self.bits is None:
            return Cached(*buffer.view(self.dtype).view(shape))
        codes = math.prod(shape)
        scales = buffer[codes:].view(SCALE_DTYPE).view(shape[:-1])
        return Cached(*buffer[:codes].view(torch.int8).view(shape), *scales)


def _piece_heads(positions: int, dim: int) -> int:
    return max(1, _PIECE_ELEMENTS // max(1, positions * dim))


class KVNeed(NamedTuple):
    """What a step needs of a KV store; the same on every rank.

    Attributes:
        held: positions for which all slots have room once it is prepared.
        peak: most positions of single layers for which there is room meanwhile.
        ends: positions that each segment attends to.
    """

    held: int
    peak: int
    ends: tuple[int, ...] = ()

    def nbytes(self, layout: KVLayout, layers: int) -> int:
        """Peak bytes while the step is prepared and runs."""
        reading = max(map(layout.piece_bytes, self.ends), default=0)
        return max(
            self.peak * layout.token_bytes, self.held * layers * layout.token_bytes + reading
        )


@dataclass
class _Slot:
    """One sequence, of ``capacity`` positions in each layer; ``rooms`` are the layers' for C."""

    layers: list[Cached]
    capacity: int = 0
    length: int = 0
    rooms: ctypes.Array[KVRoom] | None = None


class KVStore:
    """Keys and values of many sequences, each in a slot.

    A slot is created empty on first use. Every layer appends the same tokens in a step; they count
    only after :meth:`commit`, so after a failed step each sequence has the positions before it,
    without what it was to keep of a tree.
    When positions are dropped and a slot has more than twice the needed capacity, its memory is
    returned to the operating system.
    """

    def __init__(self, layers: int, layout: KVLayout):
        self.layout = layout
        self._layers = layers
        self._token_bytes = layers * layout.token_bytes
        self._slots: dict[int, _Slot] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held by all slots."""
        return self._token_bytes * self._capacity

    @property
    def _capacity(self) -> int:
        return sum(slot.capacity for slot in self._slots.values())

    def length(self, slot: int) -> int:
        """Number of positions in ``slot``; 0 if it was never used."""
        found = self._slots.get(slot)
        return 0 if found is None else found.length

    def bytes_for(self, segments: Iterable[Segment]) -> int:
        """Peak bytes while a step of these segments is prepared and runs."""
        return self.need(segments).nbytes(self.layout, self._layers)

    def need(self, segments: Iterable[Segment]) -> KVNeed:
        """What a step of these segments needs."""
        held = self._capacity
        peak = held * self._layers
        ends = []
        for segment in segments:
            slot = self._slots.get(segment.slot) or _Slot([])
            old = slot.capacity
            ends.append(segment.end)
            if segment.source is not None:  # the slot is freed, then created again
                held += grown_capacity(0, segment.end) - old
                peak = max(peak, held * self._layers)
                continue
            new = grown_capacity(old, segment.end, shrink=segment.position < slot.length)
            if new != old:
                # Layers are copied one by one: only one exists twice.
                after = held + new - old
                peak = max(peak, max(held, after) * self._layers + min(old, new))
                held = after
        return KVNeed(held, peak, tuple(ends))

    def prepare(self, segments: Iterable[Segment]) -> None:
        """Drop each sequence's positions from its segment on, and make room for the segment.

        A segment with a source begins with a copy of the source's first positions; one that keeps
        rows of a tree, with moving these together.
        """
        for segment in segments:
            if segment.source is not None:
                self.fork(segment.source, segment.slot, segment.position, room=segment.end)
            slot = self._opened(segment.slot)
            assert segment.position <= slot.length
            if segment.keep:
                _move_together(slot, segment)
            dropped, slot.length = slot.length - segment.position, segment.position
            self._fit(slot, segment.end, shrink=dropped > 0)

    def append(
        self, layer: int, segment: Segment, keys: torch.Tensor, values: torch.Tensor
    ) -> Cached:
        """Write a segment's (K, T, D) at its positions; returns a view of all S."""
        cached = self.layer(layer, segment)
        cached.write(segment.position, keys, values)
        return cached.positions(0, segment.end)

    def layer(self, layer: int, segment: Segment) -> Cached:
        """The room of a segment's sequence, ``capacity`` positions, to append to in place."""
        return self._slots[segment.slot].layers[layer]

    def rooms(self, segment: Segment) -> ctypes.Array[KVRoom]:
        """The room of a segment's sequence in all layers."""
        slot = self._slots[segment.slot]
        if slot.rooms is None:
            slot.rooms = (KVRoom * self._layers)(*(layer.room for layer in slot.layers))
        return slot.rooms

    def commit(self, segments: Iterable[Segment]) -> None:
        """Commit the segments' positions after all layers have appended them."""
        for segment in segments:
            self._slots[segment.slot].length = segment.end

    def views(self, slot: int, tokens: int) -> list[Cached]:
        """The first ``tokens`` positions of every layer, for which there is room, in place."""
        return [layer.positions(0, tokens) for layer in self._opened(slot).layers]

    def fork(self, source: int, target: int, length: int, room: int = 0) -> None:
        """Copy the first ``length`` positions of ``source`` to ``target``, replacing it.

        There is room for ``room`` positions in all.
        """
        origin = self._slots[source]
        assert source != target
        assert length <= origin.length
        self.free(target)
        copy = self._slots[target] = _Slot(origin.layers, length=length)
        self._move(copy, grown_capacity(0, max(length, room)))

    def free(self, slot: int) -> None:
        """Drop a sequence and release its memory; does nothing for an unused slot."""
        self._slots.pop(slot, None)

    def _opened(self, slot: int) -> _Slot:
        found = self._slots.get(slot)
        if found is None:
            found = self._slots[slot] = _Slot([self.layout.allocate(0)] * self._layers)
        return found

    def _fit(self, slot: _Slot, tokens: int, *, shrink: bool = False) -> None:
        capacity = grown_capacity(slot.capacity, tokens, shrink=shrink)
        if capacity != slot.capacity:
            self._move(slot, capacity)

    def _move(self, slot: _Slot, capacity: int) -> None:
        """Copy all positions to buffers of another size, layer by layer."""
        slot.layers, slot.rooms = list(slot.layers), None
        slot.capacity = min(slot.capacity, capacity)  # memory may be refused in between
        for index in range(self._layers):
            slot.layers[index] = self._copied(slot.layers[index], slot.length, capacity)
        slot.capacity = capacity

    def _copied(self, layer: Cached, length: int, capacity: int) -> Cached:
        copy = self.layout.allocate(capacity)
        for old, new in zip(layer.tensors, copy.tensors, strict=True):
            new[:, :length] = old[:, :length]
        return copy


def _move_together(slot: _Slot, segment: Segment) -> None:
    """Move what a segment keeps of a tree to the positions before it.

    If the step fails on another rank before this, its own path is where it was: both agree only on
    the positions before the path.
    """
    start = segment.position - len(segment.keep)
    chosen = torch.tensor(segment.keep).add_(start)
    for layer in slot.layers:
        for rows in layer.tensors:
            rows[:, start : segment.position] = rows[:, chosen]


def grown_capacity(current: int, tokens: int, *, shrink: bool = False) -> int:
    """A slot's new capacity if ``tokens`` positions are needed and it has ``current``."""
    needed = round_up(tokens, _STEP_TOKENS)
    if current == 0 or (shrink and current > 2 * needed):
        return needed
    if current >= needed:
        return current
    # Grow by at least a quarter, so that all copies together stay linear in the length.
    return max(needed, round_up(current * 5 // 4, _STEP_TOKENS))


def most_capacity(tokens: int) -> int:
    """The largest capacity of a slot that has grown to ``tokens`` positions."""
    return round_up(tokens + tokens // 4, _STEP_TOKENS)
