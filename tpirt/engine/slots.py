"""Which ids' keys and values are in which slot of every rank's KV store."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import NamedTuple


class Place(NamedTuple):
    """Where a sequence goes.

    Attributes:
        slot: its slot.
        shared: number of leading ids that need not be computed.
        source: slot that they are copied from; None if they are in ``slot``, or if there are none.
        handle: of the spilled sequence that is to be read into ``slot`` first; None if there is
            none.
    """

    slot: int
    shared: int
    source: int | None = None
    handle: int | None = None


@dataclass
class Slot:
    """Which ids' keys and values a slot has, and whether a sequence uses it.

    Attributes:
        ids: those that it has, or will have once they are copied.
        rope_length: that their keys were rotated for; see :class:`Sharing`.
        busy: whether a sequence uses it.
        used: when it was taken or released, as a number that grows.
        source: the slot that the ids are copied from in the sequence's first step; None afterwards.
        forget: whether it is freed as soon as it is not needed.
    """

    ids: list[int]
    rope_length: int
    busy: bool
    used: int
    source: int | None = None
    forget: bool = False

    def empty(self) -> None:
        """It has nothing, and nothing is to be copied."""
        self.ids, self.rope_length, self.source = [], 0, None


@dataclass(frozen=True)
class Sharing:
    """Which keys and values another sequence can use.

    Attributes:
        trained_length: up to which keys are rotated alike, whatever length they are rotated for;
            None for no limit.
    """

    trained_length: int | None

    def shared(self, held: Ids[int], held_length: int, ids: Ids[int], length: int) -> int:
        """Number of leading ids that need not be computed.

        Args:
            held: ids whose keys and values there are.
            held_length: that their keys were rotated for.
            ids, length: see :meth:`Slots.find`.
        """
        limit = self.trained_length
        if limit is not None and held_length != length and max(held_length, length) > limit:
            return 0
        return common_prefix(held, ids[:-1])


class Slots:
    """The slots in use: by a running sequence, or idle and kept for a later one.

    A sequence copies what it shares in its first step, which can be many steps after it was given
    its place. Until then the source is not idle: nobody takes it over or frees it.
    """

    def __init__(self, sharing: Sharing):
        self._sharing = sharing
        self._slots: dict[int, Slot] = {}
        self._uses = 0

    @property
    def tokens(self) -> int:
        """Number of ids in all slots."""
        return sum(len(slot.ids) for slot in self._slots.values() if not slot.forget)

    @property
    def idle(self) -> list[int]:
        """Slots that no sequence uses or is to copy from, the longest unused first."""
        needed = {slot.source for slot in self._slots.values()}
        idle = [n for n, slot in self._slots.items() if not slot.busy and n not in needed]
        return sorted(idle, key=lambda number: self._slots[number].used)

    @property
    def to_free(self) -> list[int]:
        """Idle slots that nothing is kept in."""
        return [n for n in self.idle if self._slots[n].forget or not self._slots[n].ids]

    def source(self, slot: int) -> int | None:
        """The slot that a sequence's first positions are still to be copied from."""
        return self._slots[slot].source

    def find(self, ids: Ids[int], length: int, *, copy: bool = True) -> Place:
        """Choose a slot for a sequence.

        An idle slot that shares more of its ids than would be dropped is taken over; else what is
        shared is copied, and the slot is kept.

        Args:
            ids: those of the sequence that may be shared, except the last one.
            length: that its keys are rotated for.
            copy: whether there is memory for a copy; else an idle slot is taken over.
        """
        best = Place(self.free_number, 0)
        idle = self.idle
        for number, slot in self._slots.items():
            if slot.forget or slot.source is not None:
                continue
            shared = self._sharing.shared(slot.ids, slot.rope_length, ids, length)
            if shared <= best.shared:
                continue
            if number in idle and (not copy or worth_taking(slot.ids, shared)):
                best = Place(number, shared)
            elif copy:
                best = Place(self.free_number, shared, number)
        return best

    def take(self, place: Place, ids: Ids[int]) -> None:
        """Give a place to a sequence."""
        origin = self._slots.get(place.slot if place.source is None else place.source)
        rope_length = origin.rope_length if origin is not None and place.shared else 0
        shared = list(ids[: place.shared])
        self._slots[place.slot] = Slot(shared, rope_length, True, self._next(), place.source)

    def extend(self, slot: int, ids: Ids[int], rope_length: int) -> None:
        """Account for a step that computed ``ids`` in a slot."""
        found = self._slots[slot]
        found.source = None
        found.ids.extend(ids)
        found.rope_length = max(found.rope_length, rope_length)

    def release(self, slot: int) -> None:
        """A sequence is done with its slot."""
        found = self._slots[slot]
        found.busy, found.used = False, self._next()
        if found.source is not None:
            found.empty()

    def put(self, slot: int, ids: list[int], rope_length: int) -> None:
        """Keep a sequence that was restored."""
        self._slots[slot] = Slot(ids, rope_length, False, self._next())

    def remove(self, slot: int) -> Slot:
        """A slot is freed; returns what it had."""
        return self._slots.pop(slot)

    def forget(self) -> None:
        """Keep nothing that is not needed by a running sequence."""
        for slot in self._slots.values():
            slot.forget = True

    def discard(self, slot: int) -> None:
        """Keep nothing of a busy slot."""
        self._slots[slot].forget = True

    def without_copy_of(self, slot: int) -> list[int]:
        """Copy nothing from a slot; returns those that were to begin with a copy of it."""
        lacking = [number for number, other in self._slots.items() if other.source == slot]
        for number in lacking:
            self._slots[number].empty()
        return lacking

    def clear(self) -> None:
        """All ranks have lost everything."""
        self._slots.clear()

    @property
    def free_number(self) -> int:
        """The number of a slot that is not in use."""
        return next(n for n in range(len(self._slots) + 1) if n not in self._slots)

    def _next(self) -> int:
        self._uses += 1
        return self._uses


def worth_taking(held: Ids[int], shared: int) -> bool:
    """Whether no more is dropped than shared, by who continues ``held`` in its place."""
    return len(held) - shared <= shared


def common_prefix(one: Ids[int], other: Ids[int]) -> int:
    """Number of leading ids that both have."""
    same, longest = 0, min(len(one), len(other))
    if one[:longest] == other[:longest]:
        return longest
    while longest - same > 1:  # slices are compared much faster than ids are one by one
        middle = (same + longest) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            longest = middle
    return same
