"""Which slot a sequence gets, and what it shares."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpirt.engine.slots import Place, Sharing, Slots, common_prefix

TEXT = list(range(100))


def filled(slots: Slots, ids: list[int], *, busy: bool = False) -> int:
    """Compute a sequence of ids; returns its slot."""
    place = slots.find(ids, len(ids))
    slots.take(place, ids)
    slots.extend(place.slot, ids[place.shared :], len(ids))
    if not busy:
        slots.release(place.slot)
    assert not slots.to_free
    return place.slot


def test_an_idle_slot_that_shares_most_is_taken_over() -> None:
    slots = Slots(Sharing(None))
    kept = filled(slots, TEXT)
    assert slots.find([*TEXT, 7, 8], 102) == Place(kept, 100)
    assert slots.find(TEXT[:80], 80) == Place(kept, 79)  # the last id is always computed


def test_a_short_prefix_is_copied_so_that_the_conversation_stays() -> None:
    slots = Slots(Sharing(None))
    kept = filled(slots, TEXT)
    other = [*TEXT[:20], 500, 501]
    place = slots.find(other, len(other))
    assert (place.shared, place.source) == (20, kept)
    assert place.slot != kept
    assert slots.find(other, len(other), copy=False) == Place(kept, 20)


def test_what_a_running_sequence_has_computed_is_copied() -> None:
    slots = Slots(Sharing(None))
    busy = filled(slots, TEXT, busy=True)
    place = slots.find([*TEXT, 1], 101)
    assert (place.shared, place.source) == (100, busy)
    assert slots.find([*TEXT, 1], 101, copy=False).shared == 0


def test_slots_are_freed_and_forgotten() -> None:
    slots = Slots(Sharing(None))
    idle, busy = filled(slots, TEXT), filled(slots, [9, *TEXT], busy=True)
    assert slots.tokens == 201
    slots.forget()
    assert slots.to_free == [idle]
    assert slots.tokens == 0
    assert slots.find(TEXT, 100).shared == 0
    slots.release(busy)
    assert slots.to_free == [idle, busy]
    slots.remove(busy)
    slots.remove(idle)
    assert slots.idle == []


def test_what_is_still_to_be_copied_is_used() -> None:
    """Nobody takes it over or frees it."""
    slots = Slots(Sharing(None))
    kept = filled(slots, TEXT)
    waiting = slots.find([*TEXT[:20], 500], 21)
    slots.take(waiting, TEXT)
    assert (slots.source(waiting.slot), slots.idle) == (kept, [])
    assert slots.find(TEXT, 100) == Place(2, 99, kept)
    assert slots.find(TEXT, 100, copy=False) == Place(2, 0)
    slots.forget()
    assert slots.to_free == []
    slots.extend(waiting.slot, [500], 21)
    assert slots.to_free == [kept]


def test_nothing_is_copied_from_a_place_that_has_no_copy_yet() -> None:
    slots = Slots(Sharing(64))
    running = filled(slots, TEXT[:40], busy=True)
    slots.take(slots.find([*TEXT[:20], 500], 21), TEXT)
    slots.extend(running, TEXT[40:70], 70)  # is rotated differently now, so it is not shared
    assert slots.find(TEXT[:30], 30) == Place(2, 0)


def test_a_copy_that_was_not_made_is_not_kept() -> None:
    slots = Slots(Sharing(None))
    filled(slots, TEXT)
    waiting = slots.find([*TEXT[:20], 500], 21)
    slots.take(waiting, TEXT)
    slots.release(waiting.slot)
    assert slots.to_free == [waiting.slot]


def test_what_may_be_damaged_is_not_copied() -> None:
    slots = Slots(Sharing(None))
    damaged = filled(slots, TEXT, busy=True)
    waiting = slots.find([*TEXT[:20], 500], 21)
    slots.take(waiting, TEXT)
    slots.discard(damaged)
    assert slots.without_copy_of(damaged) == [waiting.slot]
    assert slots.source(waiting.slot) is None
    assert slots.find(TEXT, 100).shared == 0


class Ranks:
    """Sequences in slots, and what every rank has in them."""

    def __init__(self) -> None:
        self.slots = Slots(Sharing(None))
        self.held: dict[int, list[int]] = {}
        # Slot, ids, and how many are computed; the latest are the last.
        self.running: list[tuple[int, list[int], int]] = []

    def admit(self, number: int) -> None:
        ids = [*TEXT[: number % 7 * 3], *([number] * (number % 5 + 1))]
        place = self.slots.find(ids, len(ids), copy=number % 3 > 0)
        self.slots.take(place, ids)
        self.running.append((place.slot, ids, place.shared))

    def step(self, number: int) -> None:
        if self.running:
            index = number % len(self.running)
            slot, ids, computed = self.running[index]
            source = self.slots.source(slot)
            before = self.held.get(slot if source is None else source, [])[:computed]
            assert before == ids[:computed]
            self.held[slot] = ids
            self.slots.extend(slot, ids[computed:], len(ids))
            self.running[index] = slot, [*ids, number], len(ids)

    def leave(self, number: int) -> None:
        if self.running:
            slot, *_ = self.running.pop(number % len(self.running))
            self.slots.release(slot)
            self.free(self.slots.to_free)

    def fail(self, number: int) -> None:
        if self.running:
            slot, *_ = self.running[number % len(self.running)]
            self.slots.discard(slot)
            self.copy_nothing_from(slot)

    def give_up(self, _: int) -> None:
        if self.running:
            slot, *_rest = self.running.pop()
            self.copy_nothing_from(slot)
            self.slots.release(slot)
            self.free([slot])

    def copy_nothing_from(self, slot: int) -> None:
        lacking = self.slots.without_copy_of(slot)
        self.running = [
            (s, ids, 0 if s in lacking else computed) for s, ids, computed in self.running
        ]

    def make_room(self, _: int) -> None:
        self.free(self.slots.idle[:1])

    def reset(self, _: int) -> None:
        self.slots.forget()
        self.free(self.slots.to_free)

    def free(self, slots: list[int]) -> None:
        for slot in slots:
            self.slots.remove(slot)
            self.held.pop(slot, None)


EVENTS = st.sampled_from(
    [
        *(Ranks.admit, Ranks.step, Ranks.admit, Ranks.step),
        *(Ranks.leave, Ranks.give_up, Ranks.fail, Ranks.make_room, Ranks.reset),
    ]
)


@given(st.lists(st.tuples(EVENTS, st.integers(0, 99)), max_size=40))
def test_every_step_finds_what_it_begins_with(
    events: list[tuple[Callable[[Ranks, int], None], int]],
) -> None:
    ranks = Ranks()
    for event, number in events:
        event(ranks, number)
    while ranks.running:
        ranks.leave(0)
    ranks.reset(0)
    assert not ranks.held


def test_the_longest_unused_is_first() -> None:
    slots = Slots(Sharing(None))
    texts = [[n] * 10 for n in range(3)]
    first, second, third = (filled(slots, text) for text in texts)
    filled(slots, [*texts[0], 5])
    assert slots.idle == [second, third, first]


def test_dynamically_rotated_keys_are_shared_up_to_the_trained_length() -> None:
    slots = Slots(Sharing(64))
    filled(slots, TEXT[:40])
    assert slots.find(TEXT[:50], 50).shared == 40
    assert slots.find(TEXT[:50], 65).shared == 0
    filled(slots, TEXT[:70])
    assert slots.find(TEXT[:80], 70).shared == 70
    assert slots.find(TEXT[:80], 71).shared == 0


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1), ([4], [5], 0)],
)
def test_common_prefix(one: list[int], other: list[int], length: int) -> None:
    assert common_prefix(one, other) == common_prefix(other, one) == length


@given(*[st.lists(st.integers(0, 1), max_size=12)] * 2)
def test_a_common_prefix_ends_at_the_first_difference(one: list[int], other: list[int]) -> None:
    differ = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    assert common_prefix(one, other) == next(differ, min(len(one), len(other)))
