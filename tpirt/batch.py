"""The description of a step, equal on all ranks: rows of sequences, and how to combine partials.

Plain data. The master creates a :class:`Batch` for every step. The group sends it to the workers;
the decoder and the communicator of every rank read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import TypeVar

import torch

_K = TypeVar("_K")

# Elements of a row that share a scale in int8. Scales are 3% more bytes and limit the effect of
# outliers. A scale never covers two rows: a row's bits would depend on its neighbour's.
SCALE_BLOCK = 128

MOST_TREE_ROWS = 64  # of a segment with a tree; C has room for a path of so many


class Algorithm(Enum):
    """All-reduce algorithms for R ranks and partials of n bytes. Values are those of the option.

    There is no ring: it moves as many bytes over each link as ``TWO_SHOT`` and needs 2 (R - 1)
    hops, so it is never faster if every pair of ranks is connected.
    """

    STAR = "star"  # via the master: 2 hops, 2 (R - 1) n bytes, all over the master's link
    ONE_SHOT = "one-shot"  # all to all: 1 hop, (R - 1) n bytes in and out of every rank
    TWO_SHOT = "two-shot"  # reduce-scatter, all-gather: 2 hops, 2 (R - 1) / R n bytes per rank


class CommDtype(Enum):
    """Dtype of partial sums on the wire. Values are those of the option."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"  # codes, then one float32 scale per SCALE_BLOCK elements of a row

    @classmethod
    def keeping(cls, dtype: torch.dtype) -> CommDtype:
        """The comm dtype that keeps a float32 or bfloat16 tensor exactly."""
        return cls.BFLOAT16 if dtype is torch.bfloat16 else cls.FLOAT32

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of a received tensor."""
        return torch.bfloat16 if self is CommDtype.BFLOAT16 else torch.float32

    def nbytes(self, rows: int, columns: int) -> int:
        """Size of so many rows on the wire."""
        if self is CommDtype.INT8:
            return rows * (columns + 4 * math.ceil(columns / SCALE_BLOCK))
        return rows * columns * (4 if self is CommDtype.FLOAT32 else 2)


@dataclass(frozen=True, slots=True)
class Collective:
    """How the partial sums of one step are combined.

    With ``micro_batches`` the rows pass the layers as two micro-batches; one computes while the
    other's sum is in flight (two-batch overlap). Rank 0 broadcasts the rows of each.
    """

    algorithm: Algorithm = Algorithm.STAR
    comm_dtype: CommDtype = CommDtype.FLOAT32
    micro_batches: bool = False


DEFAULT_COLLECTIVE = Collective()


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's rows of a step.

    Attributes:
        slot: the sequence's slot in the KV store.
        position: position of the first token; cached positions from here on are dropped first.
        tokens: number of tokens, at least 1.
        num_logits: number of last tokens whose hidden states are wanted, 0 to ``tokens``. In the
            last layer, the other tokens only need keys and values.
        rope_length: length that dynamic rope scaling rotates the rows for; those beyond it for
            the length up to each.
        source: another sequence's slot, whose first ``position`` positions are copied first; None
            if the slot has them.
        parents: of the last tokens, if they are a tree of guesses: how many rows before each of
            them its parent is. Without, each token follows the one before.
        keep: which of the last step's tokens are kept, if that had a tree: they are cached at
            ``position - len(keep)`` plus these, ascending, and are moved together first.
        prompt: whether the rows are a prompt's, or are scored. The others are an answer's: they
            have the bits that they have without any prompts.
    """

    slot: int
    position: int
    tokens: int
    num_logits: int
    rope_length: int
    source: int | None = None
    parents: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()
    prompt: bool = False

    @property
    def depths(self) -> list[int]:
        """How many positions after ``position`` each token is."""
        first = self.tokens - len(self.parents)
        depths = list(range(first))
        for row, back in enumerate(self.parents, first):
            depths.append(depths[row - back] + 1)
        return depths

    def follows(self) -> torch.Tensor:
        """Whether each token (row) is after or at another one (column) of its path, (T, T)."""
        seen = torch.eye(self.tokens, dtype=torch.bool)
        first = self.tokens - len(self.parents)
        for row in range(1, self.tokens):
            back = self.parents[row - first] if row >= first else 1
            seen[row] |= seen[row - back]
        return seen

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.position + self.tokens

    def split(self, at: int) -> tuple[Segment, Segment]:
        """Split into the first ``at`` tokens and the rest; wanted rows stay with their tokens."""
        rest = self.tokens - at
        late = min(self.num_logits, rest)
        first = replace(self, tokens=at, num_logits=self.num_logits - late)
        return first, replace(self, position=self.position + at, tokens=rest, num_logits=late)


@dataclass(frozen=True)
class Batch:
    """One step, as all ranks must agree on it.

    The rows of the hidden states (T, H) are those of the segments, in order.

    Attributes:
        segments: at least one.
        prefill: whether some rows are a prompt's; for statistics.
        collective: how partial sums are combined.
    """

    segments: tuple[Segment, ...]
    prefill: bool = False
    collective: Collective = DEFAULT_COLLECTIVE

    @cached_property
    def tokens(self) -> int:
        """T, the number of rows of all segments."""
        return sum(segment.tokens for segment in self.segments)

    @cached_property
    def num_logits(self) -> int:
        """Number of wanted rows."""
        return sum(segment.num_logits for segment in self.segments)

    @cached_property
    def rows(self) -> tuple[range, ...]:
        """Row indices of each segment."""
        ends = tuple(accumulate(segment.tokens for segment in self.segments))
        return tuple(range(low, high) for low, high in pairwise((0, *ends)))

    @cached_property
    def wanted_rows(self) -> tuple[int, ...]:
        """Indices of the rows whose hidden states are wanted."""
        return tuple(
            row
            for segment, rows in zip(self.segments, self.rows, strict=True)
            for row in rows[len(rows) - segment.num_logits :]
        )

    def by(self, kind: Callable[[Segment], _K]) -> list[tuple[_K, Batch, range]]:
        """Runs of segments of the same kind: the kind, the segments, and their rows."""
        parts = []
        together = zip(self.segments, self.rows, strict=True)
        for same, run in groupby(together, key=lambda pair: kind(pair[0])):
            segments, rows = zip(*run, strict=True)
            part = replace(self, segments=segments)
            parts.append((same, part, range(rows[0].start, rows[-1].stop)))
        return parts

    def micro_batches(self) -> tuple[Batch, ...]:
        """The batch itself, or two micro-batches if the collective has ``micro_batches``.

        The first one has ``tokens // 2`` rows; a segment across the cut is split, but not a tree.
        """
        if not self.collective.micro_batches or self.tokens < 2:
            return (self,)
        cut = self._cut(self.tokens // 2)
        if not 0 < cut < self.tokens:
            return (self,)
        first: list[Segment] = []
        second: list[Segment] = []
        for segment, rows in zip(self.segments, self.rows, strict=True):
            if rows.stop <= cut:
                first.append(segment)
            elif rows.start >= cut:
                second.append(segment)
            else:
                before, after = segment.split(cut - rows.start)
                first.append(before)
                second.append(after)
        return tuple(replace(self, segments=tuple(segments)) for segments in (first, second))

    def _cut(self, row: int) -> int:
        """The first row of the second micro-batch: ``row``, or the next that is not in a tree."""
        for segment, rows in zip(self.segments, self.rows, strict=True):
            if segment.parents and row in rows[1:]:
                return rows.stop
        return row
