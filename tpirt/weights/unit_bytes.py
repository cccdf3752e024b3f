"""Copy units into and out of blocks, in a form that depends on neither plan nor CPU layout.

The canonical bytes of a unit are its rows in order: values in the stored dtype; in 8 bits codes,
then scales; in 4 bits two codes per byte (neighbouring inputs), then scales and zero points.
Axes of the 4-bit codes: K inputs, N rows, B rows of a layout's block.
"""

from __future__ import annotations

import torch

from tpirt.ops.buffers import Region, page_buffer, tensor_bytes
from tpirt.ops.quant import Int4, Int8
from tpirt.ops.quant_layout import Layout
from tpirt.sharding.blocks import Block, StoredTensor
from tpirt.sharding.partition import Span
from tpirt.sharding.units import Unit


def unit_nbytes(block: Block, unit: Unit) -> int:
    """Size of a unit's canonical bytes."""
    return sum(region.nbytes for region in _canonical(block.tensors[unit.tensor], unit))


class BlockUnits:
    """The units of one block in a buffer; used by one thread at a time.

    4-bit codes are unpacked to one byte each at the first access to a tensor, and packed by
    :meth:`flush`.

    Args:
        block: the block.
        data: uint8 (block.nbytes,), initially zero if units are put.
    """

    def __init__(self, block: Block, data: torch.Tensor):
        self._block = block
        self._data = data
        self._levels: dict[int, torch.Tensor] = {}
        self._changed: set[int] = set()

    def get(self, unit: Unit) -> memoryview:
        """Return a copy of a unit's canonical bytes."""
        regions = _canonical(self._block.tensors[unit.tensor], unit)
        out = torch.empty(sum(region.nbytes for region in regions), dtype=torch.uint8)
        for target, source in zip(_views(regions, out), self._places(unit), strict=True):
            if target.shape == source.shape:
                target.copy_(source)
            else:
                _join(source, target)
        return tensor_bytes(out)

    def put(self, unit: Unit, content: memoryview | bytes) -> None:
        """Write a unit's canonical bytes; complete after :meth:`flush`."""
        regions = _canonical(self._block.tensors[unit.tensor], unit)
        raw = torch.frombuffer(bytearray(content), dtype=torch.uint8)  # aligned, and writable
        for source, target in zip(_views(regions, raw), self._places(unit), strict=True):
            if target.shape == source.shape:
                target.copy_(source)
            else:
                _split(source, target)
                self._changed.add(unit.tensor)

    def clear_padding(self) -> None:
        """Zero all bytes outside of units, as in a block assembled from units."""
        for index, tensor in enumerate(self._block.tensors):
            if tensor.quant.kind == "int4" and tensor.shape[0] % tensor.layout.block:
                codes = tensor.regions[0].view(self._memory(index))
                levels = _unpack(codes, tensor.layout)
                levels[:, tensor.shape[0] :] = 0
                _pack(levels, tensor.layout, codes)

    def flush(self) -> None:
        """Pack the 4-bit codes of all units that were put."""
        for index in self._changed:
            tensor = self._block.tensors[index]
            codes = tensor.regions[0].view(self._memory(index))
            _pack(self._levels[index], tensor.layout, codes)
        self._changed.clear()

    def _memory(self, index: int) -> torch.Tensor:
        start = self._block.offsets[index]
        return self._data[start : start + self._block.tensors[index].nbytes]

    def _places(self, unit: Unit) -> list[torch.Tensor]:
        """Views of a unit's regions in the block, in canonical order."""
        tensor = self._block.tensors[unit.tensor]
        rows = slice(*unit.rows)
        views = [region.view(self._memory(unit.tensor)) for region in tensor.regions]
        if unit.columns is None:
            return [views[0][rows]]
        columns = _stored_columns(tensor, unit.columns)
        if isinstance(tensor.quant, Int8):
            return [views[0][rows, slice(*columns)], views[1][rows]]
        if not isinstance(tensor.quant, Int4):
            return [views[0][rows, slice(*columns)]]
        if unit.tensor not in self._levels:
            self._levels[unit.tensor] = _unpack(views[0], tensor.layout)
        group = tensor.quant.group_size
        groups = slice(columns.start // group, columns.stop // group)
        return [self._levels[unit.tensor][slice(*columns), rows], views[1][groups, rows]]


def _canonical(tensor: StoredTensor, unit: Unit) -> tuple[Region, ...]:
    """The regions of a unit's canonical bytes, without gaps."""
    rows = unit.rows.size
    if unit.columns is None:
        return (Region("values", tensor.dtype, (rows,)),)
    columns = _stored_columns(tensor, unit.columns).size
    match tensor.quant:
        case Int8():
            return (
                Region("codes", torch.int8, (rows, columns)),
                Region("scales", torch.bfloat16, (rows,)),
            )
        case Int4(group_size=group):
            groups = columns // group
            return (
                Region("codes", torch.uint8, (columns // 2, rows)),
                Region("scale_zero", torch.bfloat16, (groups, rows, 2)),
            )
        case _:
            return (Region("values", tensor.dtype, (rows, columns)),)


def _stored_columns(tensor: StoredTensor, columns: Span) -> Span:
    """A unit's columns, with the tensor's padding if they are the last."""
    if columns.stop < tensor.shape[1]:
        return columns
    return Span(columns.start, tensor.quant.padded_in_features(tensor.shape[1]))


def _views(regions: tuple[Region, ...], content: torch.Tensor) -> list[torch.Tensor]:
    views, start = [], 0
    for region in regions:
        raw = content[start : start + region.nbytes]
        views.append(raw.view(region.dtype).view(region.shape))
        start += region.nbytes
    return views


def _join(levels: torch.Tensor, out: torch.Tensor) -> None:
    """Pack codes 0..15 (K, N) to two per byte (K / 2, N)."""
    torch.add(levels[0::2], levels[1::2], alpha=16, out=out)


def _split(codes: torch.Tensor, out: torch.Tensor) -> None:
    """The inverse of :func:`_join`."""
    torch.bitwise_and(codes, 15, out=out[0::2])
    torch.bitwise_right_shift(codes, 4, out=out[1::2])


def _unpack(codes: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Unpack codes (m, K, B / 2) to one per byte, uint8 (K, m B)."""
    blocks, inputs, _ = codes.shape
    size = inputs * blocks * layout.block
    levels = page_buffer(size).view(inputs, blocks, layout.block)
    low, high = layout.split(levels.transpose(0, 1))
    torch.bitwise_and(codes, 15, out=low)
    torch.bitwise_right_shift(codes, 4, out=high)
    return levels.view(inputs, blocks * layout.block)


def _pack(levels: torch.Tensor, layout: Layout, codes: torch.Tensor) -> None:
    """The inverse of :func:`_unpack`."""
    low, high = layout.split(levels.view(len(levels), -1, layout.block).transpose(0, 1))
    torch.add(low, high, alpha=16, out=codes)
