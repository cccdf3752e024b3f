"""Which slot a sequence gets, and what it shares."""

from __future__ import annotations

import pytest

from tpirt.engine.slots import Place, Sharing, Slots, common_prefix

TEXT = list(range(100))


def filled(slots: Slots, ids: list[int], *, busy: bool = False) -> int:
    """Compute a sequence of ids; returns its slot."""
    place = slots.find(ids, len(ids))
    slots.take(place, ids)
    slots.extend(place.slot, ids[place.shared :], len(ids))
    if not busy:
        assert not slots.release(place.slot)
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
    assert slots.forget() == [idle]
    assert slots.tokens == 0
    assert slots.find(TEXT, 100).shared == 0
    assert slots.release(busy)  # is to be freed
    slots.remove(busy)
    slots.remove(idle)
    assert slots.idle == []


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


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1), ([4], [5], 0)],
)
def test_common_prefix(one: list[int], other: list[int], length: int) -> None:
    assert common_prefix(one, other) == common_prefix(other, one) == length
