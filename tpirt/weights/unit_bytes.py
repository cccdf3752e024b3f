"""Copy units into and out of blocks, in a form that does not depend on the plan.

The canonical bytes of a unit are its values in the stored dtype, row by row; of a quantized matrix
its codes and then its scales, as :meth:`tpirt.ops.quant.Scheme.unit_regions` has them.
"""

from __future__ import annotations

import torch

from tpirt.ops.buffers import Region, tensor_bytes
from tpirt.ops.quant import Scheme
from tpirt.ops.quant_units import MatrixUnits
from tpirt.sharding.blocks import Block, StoredTensor
from tpirt.sharding.partition import Span
from tpirt.sharding.units import Unit


def unit_nbytes(block: Block, unit: Unit) -> int:
    """Size of a unit's canonical bytes."""
    return sum(region.nbytes for region in _canonical(block.tensors[unit.tensor], unit))


class BlockUnits:
    """The units of one block in a buffer; used by one thread at a time.

    Matrices may be kept unpacked until :meth:`flush`: :class:`tpirt.ops.quant_units.MatrixUnits`.

    Args:
        block: the block.
        data: uint8 (block.nbytes,), initially zero if units are put.
    """

    def __init__(self, block: Block, data: torch.Tensor):
        self._block = block
        self._data = data
        self._matrices: dict[int, MatrixUnits] = {}  # those that were used, by index

    def get(self, unit: Unit) -> memoryview:
        """Return a copy of a unit's canonical bytes."""
        regions = _canonical(self._block.tensors[unit.tensor], unit)
        out = torch.empty(sum(region.nbytes for region in regions), dtype=torch.uint8)
        first, *scales = _views(regions, out)
        if scales:
            self._opened(unit.tensor).get(*self._rectangle(unit), first, scales[0])
        else:
            first.copy_(self._values(unit))
        return tensor_bytes(out)

    def put(self, unit: Unit, content: memoryview | bytes) -> None:
        """Write a unit's canonical bytes; complete after :meth:`flush`."""
        regions = _canonical(self._block.tensors[unit.tensor], unit)
        raw = torch.frombuffer(bytearray(content), dtype=torch.uint8)  # aligned, and writable
        first, *scales = _views(regions, raw)
        if scales:
            self._opened(unit.tensor).put(*self._rectangle(unit), first, scales[0])
        else:
            self._values(unit).copy_(first)

    def clear_padding(self) -> None:
        """Zero all bytes outside of units, as in a block assembled from units."""
        for index, tensor in enumerate(self._block.tensors):
            if isinstance(tensor.quant, Scheme):
                matrix = tensor.quant.units(*self._views(index))
                matrix.clear_rows(tensor.shape[0])
                matrix.flush()

    def flush(self) -> None:
        """Store what was put into quantized matrices."""
        for matrix in self._matrices.values():
            matrix.flush()

    def _views(self, index: int) -> list[torch.Tensor]:
        """A tensor's regions: values, or codes and scales."""
        tensor, start = self._block.tensors[index], self._block.offsets[index]
        memory = self._data[start : start + tensor.nbytes]
        return [region.view(memory) for region in tensor.regions]

    def _values(self, unit: Unit) -> torch.Tensor:
        values = self._views(unit.tensor)[0][slice(*unit.rows)]
        return values if unit.columns is None else values[:, slice(*unit.columns)]

    def _opened(self, index: int) -> MatrixUnits:
        matrix = self._matrices.get(index)
        if matrix is None:
            quant = self._block.tensors[index].quant
            assert isinstance(quant, Scheme)
            matrix = self._matrices[index] = quant.units(*self._views(index))
        return matrix

    def _rectangle(self, unit: Unit) -> tuple[slice, slice]:
        """A matrix unit's rows and stored columns."""
        assert unit.columns is not None
        columns = _stored_columns(self._block.tensors[unit.tensor], unit.columns)
        return slice(*unit.rows), slice(*columns)


def _canonical(tensor: StoredTensor, unit: Unit) -> tuple[Region, ...]:
    """The parts of a unit's canonical bytes, without gaps: values, or codes and scales."""
    rows = unit.rows.size
    if unit.columns is None:
        return (Region("values", tensor.dtype, (rows,)),)
    if isinstance(tensor.quant, Scheme):
        return tensor.quant.unit_regions(rows, _stored_columns(tensor, unit.columns).size)
    return (Region("values", tensor.dtype, (rows, unit.columns.size)),)


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
