"""A quantized matrix while units, rectangles of it, are copied out of it or into it.

The bytes of a unit are its codes and scales row by row: tiles do not show. Axes: N rows, K inputs,
G groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch

from tpirt.ops.tiles import (
    TILE_INPUTS,
    pack_bytes,
    pack_groups,
    pack_nibbles,
    unpack_bytes,
    unpack_groups,
    unpack_nibbles,
)


class MatrixUnits(ABC):
    """One matrix, its codes row by row from the first use on; used by one thread at a time."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor):
        self._packed = codes
        self._scales = scales
        self._changed = False

    def get(self, rows: slice, columns: slice, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Copy a unit to ``codes`` and ``scales``, of the shapes of ``Scheme.unit_regions``."""
        self._get_codes(self._rows[rows, columns], codes)
        scales.copy_(self._unit_scales(rows, columns))

    def put(self, rows: slice, columns: slice, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Copy a unit in; it is stored after :meth:`flush`."""
        self._put_codes(self._rows[rows, columns], codes)
        self._unit_scales(rows, columns).copy_(scales)
        self._changed = True

    def clear_rows(self, start: int) -> None:
        """Make the codes of the rows from ``start`` on, which pad, 0 after :meth:`flush`."""
        if start < len(self._rows):
            self._rows[start:] = 0
            self._changed = True

    def flush(self) -> None:
        """Store what was put."""
        if self._changed:
            self._store()
            self._changed = False

    @property
    @abstractmethod
    def _rows(self) -> torch.Tensor:
        """Codes, one byte each (N, K)."""

    @abstractmethod
    def _unit_scales(self, rows: slice, columns: slice) -> torch.Tensor:
        """A view of a unit's scales."""

    @abstractmethod
    def _get_codes(self, codes: torch.Tensor, out: torch.Tensor) -> None: ...

    @abstractmethod
    def _put_codes(self, codes: torch.Tensor, content: torch.Tensor) -> None: ...

    @abstractmethod
    def _store(self) -> None: ...


class Int8Units(MatrixUnits):
    """A matrix in 8 bits: a byte per code, a scale per row."""

    @cached_property
    def _rows(self) -> torch.Tensor:
        return unpack_bytes(self._packed)

    def _unit_scales(self, rows: slice, columns: slice) -> torch.Tensor:
        return self._scales[rows]

    def _get_codes(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(codes)

    def _put_codes(self, codes: torch.Tensor, content: torch.Tensor) -> None:
        codes.copy_(content)

    def _store(self) -> None:
        pack_bytes(self._rows, self._packed)


class Int4Units(MatrixUnits):
    """A matrix in 4 bits: two neighbouring inputs in a byte, a word per row and group."""

    @cached_property
    def _rows(self) -> torch.Tensor:
        return unpack_nibbles(self._packed)

    @cached_property
    def _words(self) -> torch.Tensor:
        """A copy (N, G); of 16 rows, ``unpack_groups`` gives a view."""
        return unpack_groups(self._scales).clone()

    def _unit_scales(self, rows: slice, columns: slice) -> torch.Tensor:
        return self._words[rows, columns.start // TILE_INPUTS : columns.stop // TILE_INPUTS]

    def _get_codes(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        torch.add(codes[:, 0::2], codes[:, 1::2], alpha=16, out=out)

    def _put_codes(self, codes: torch.Tensor, content: torch.Tensor) -> None:
        torch.bitwise_and(content, 15, out=codes[:, 0::2])
        torch.bitwise_right_shift(content, 4, out=codes[:, 1::2])

    def _store(self) -> None:
        pack_nibbles(self._rows, self._packed)
        pack_groups(self._words, self._scales)
