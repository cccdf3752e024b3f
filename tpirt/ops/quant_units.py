"""A matrix's codes while units, rectangles of it, are copied out of it or into it.

The codes of a unit have one form, in which a layout does not show. Axes: K inputs, N rows, B rows
of a layout's block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from tpirt.ops.quant_layout import Layout


class UnitCodes(Protocol):
    """The codes of one matrix; used by one thread at a time."""

    def get(self, rows: slice, columns: slice, out: torch.Tensor) -> None:
        """Copy a unit's codes to ``out``, of the shape of ``Scheme.unit_regions``."""

    def put(self, rows: slice, columns: slice, content: torch.Tensor) -> None:
        """Copy a unit's codes in; they are stored after :meth:`flush`."""

    def clear_rows(self, start: int) -> None:
        """Make the codes of the rows from ``start`` on, which pad, 0 after :meth:`flush`."""

    def flush(self) -> None:
        """Store what was put."""


class RowCodes:
    """Codes (N, K) that are stored row by row, an element each."""

    def __init__(self, codes: torch.Tensor):
        self._codes = codes

    def get(self, rows: slice, columns: slice, out: torch.Tensor) -> None:
        """See :class:`UnitCodes`."""
        out.copy_(self._codes[rows, columns])

    def put(self, rows: slice, columns: slice, content: torch.Tensor) -> None:
        """See :class:`UnitCodes`."""
        self._codes[rows, columns] = content

    def clear_rows(self, start: int) -> None:
        """See :class:`UnitCodes`."""
        self._codes[start:] = 0

    def flush(self) -> None:
        """See :class:`UnitCodes`."""


class NibbleCodes:
    """4-bit codes (m, K, B / 2) in a layout; in a unit two neighbouring inputs share a byte.

    They are unpacked to one byte each when they are first used.
    """

    def __init__(self, codes: torch.Tensor, layout: Layout):
        self._codes = codes
        self._layout = layout
        self._unpacked: torch.Tensor | None = None
        self._changed = False

    def get(self, rows: slice, columns: slice, out: torch.Tensor) -> None:
        """See :class:`UnitCodes`."""
        codes = self._levels()[columns, rows]
        torch.add(codes[0::2], codes[1::2], alpha=16, out=out)

    def put(self, rows: slice, columns: slice, content: torch.Tensor) -> None:
        """See :class:`UnitCodes`."""
        codes = self._levels()[columns, rows]
        torch.bitwise_and(content, 15, out=codes[0::2])
        torch.bitwise_right_shift(content, 4, out=codes[1::2])
        self._changed = True

    def clear_rows(self, start: int) -> None:
        """See :class:`UnitCodes`."""
        if start < self._codes.shape[0] * self._layout.block:
            self._levels()[:, start:] = 0
            self._changed = True

    def flush(self) -> None:
        """See :class:`UnitCodes`."""
        if self._changed:
            self._layout.pack(self._levels(), self._codes)
            self._changed = False

    def _levels(self) -> torch.Tensor:
        """Codes 0..15, one byte each, uint8 (K, m B)."""
        if self._unpacked is None:
            self._unpacked = self._layout.levels(self._codes)
        return self._unpacked
