"""What a memory budget holds of a rank's blocks: resident ones, and a ring for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tpirt.errors import MemoryLimitError
from tpirt.units import format_bytes

MIN_SLOTS = 2  # one block in use, one being read
_BEST_SLOTS = 4  # and one more for each of two readers; further ones were not faster


@dataclass(frozen=True)
class StreamPlan:
    """Which blocks stay in memory (``resident``), and how many buffers the others pass through."""

    resident: frozenset[int]
    slots: int
    slot_bytes: int

    def held_bytes(self, sizes: Sequence[int]) -> int:
        """Most bytes held at once, given the blocks' sizes."""
        return sum(sizes[i] for i in self.resident) + self.slots * self.slot_bytes


def plan_streaming(
    sizes: Sequence[int], max_blocks: int | None = None, budget_bytes: int | None = None
) -> StreamPlan:
    """Divide a budget between resident blocks and the ring.

    Args:
        sizes: bytes of each block in the order of use.
        max_blocks: most blocks held at once; None for no bound.
        budget_bytes: most bytes held at once; None for no bound.

    Raises:
        MemoryLimitError: fewer than two blocks fit; says how much is needed.
    """
    everything = StreamPlan(frozenset(range(len(sizes))), 0, 0)
    if max_blocks is not None and max_blocks >= len(sizes):
        max_blocks = None
    if max_blocks is None and (budget_bytes is None or sum(sizes) <= budget_bytes):
        return everything
    slot = max(sizes)
    slots = _BEST_SLOTS if max_blocks is None else max_blocks
    if slots < MIN_SLOTS:
        raise MemoryLimitError(
            f"window of {max_blocks} blocks: at least {MIN_SLOTS} are needed, "
            "one in use and one being read"
        )
    if budget_bytes is None:
        return StreamPlan(frozenset(), slots, slot)
    slots = min(slots, budget_bytes // slot)
    if slots < MIN_SLOTS:
        raise MemoryLimitError(
            f"{format_bytes(max(0, budget_bytes))} are left for weights, but two blocks of up to "
            f"{format_bytes(slot)} need {format_bytes(MIN_SLOTS * slot)}"
        )
    # Fewer than the best number of slots leave less than a slot over. Using that little for
    # resident blocks would make a smaller budget keep what a larger one does not.
    spare = budget_bytes - slots * slot if slots == _BEST_SLOTS and max_blocks is None else 0
    return StreamPlan(_choose_resident(sizes, spare), slots, slot)


def least_budget(sizes: Sequence[int], max_blocks: int | None = None) -> int:
    """The lowest ``budget_bytes`` that :func:`plan_streaming` takes."""
    two = MIN_SLOTS * max(sizes)
    held_whole = max_blocks is None or max_blocks >= len(sizes)
    return min(two, sum(sizes)) if held_whole else two


def _choose_resident(sizes: Sequence[int], spare_bytes: int) -> frozenset[int]:
    """Choose blocks to keep, spread over the step so that reading never pauses for long.

    The order is that of bit-reversed indices: any prefix of it is spread evenly, and a smaller
    budget keeps a subset of what a larger one keeps.
    """
    bits = max(1, (len(sizes) - 1).bit_length())
    order = sorted(range(len(sizes)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    resident: set[int] = set()
    for index in order:
        spare_bytes -= sizes[index]
        if spare_bytes < 0:
            break
        resident.add(index)
    return frozenset(resident)
