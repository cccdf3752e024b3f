"""Whose keys and values are in memory, with a group that only counts positions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tpirt.batch import Segment
from tpirt.engine import spilling
from tpirt.engine.kv_manager import KVManager
from tpirt.engine.scheduler import Scheduler
from tpirt.engine.sequence import Scoring
from tpirt.engine.step_costs import StepCosts
from tpirt.engine.targets import NO_TARGETS, Targets
from tpirt.errors import PeerError
from tpirt.model.kv_store import KVNeed
from tpirt.types import ignore_progress

PREFIX = list(range(100, 200))


class Memory:
    """A group and its plan at once: positions of slots in memory and on disk.

    Attributes:
        tokens: the most in memory.
        held: positions of each slot.
        disk: those of each spilled sequence.
        spilled: how many sequences have been.
    """

    chunk_tokens, next_step = 512, 1
    config = SimpleNamespace(rope=SimpleNamespace(kind="default"), max_position_embeddings=4096)

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.held: dict[int, int] = {}
        self.disk: dict[int, int] = {}
        self.spilled = 0
        self.kv_token_bytes = 1
        self.group = self.deployment = self

    def kv_need(self, segments: Iterable[Segment]) -> KVNeed:
        after = self.held | {each.slot: each.position + each.tokens for each in segments}
        return KVNeed(sum(after.values()), 0)

    def has_room(self, need: KVNeed, rows: int, logits: int = 0, *, displacing: bool) -> bool:
        return need.held <= self.tokens

    def check_context(self, tokens: int, *, cached: int) -> None: ...

    async def spill(self, slot: int, handle: int, tokens: int) -> None:
        self.disk[handle] = self.held.pop(slot)
        self.spilled += 1

    async def restore(self, slot: int, handle: int) -> None:
        self.held[slot] = self.disk.pop(handle)

    async def drop_spilled(self, handles: Iterable[int]) -> None:
        for handle in handles:
            self.disk.pop(handle, None)

    async def free(self, slot: int) -> None:
        self.held.pop(slot, None)


class Unanswered(Scoring):
    """A prompt whose first token is to come in time."""

    unanswered = True


class Scene:
    """A manager, and steps of its running sequences."""

    def __init__(self, tokens: int, targets: Targets = NO_TARGETS):
        self.memory = Memory(tokens)
        costs = StepCosts()
        for rows in (1, 512):
            costs.learn(rows, rows * 1.0)  # a disk is quicker than that
        self.kv = KVManager(
            cast(Any, self.memory),
            Scheduler(costs, StepCosts(), sequences=8, stall_free=False, targets=targets),
            costs,
            sequences=8,
            spill_bytes=1000,
            wake=lambda: None,
        )

    def ask(self, ids: list[int], kind: type[Scoring] = Scoring) -> Scoring:
        """Ask for the last id's hidden state."""
        made = kind(ids, ignore_progress, delivered=len(ids) - 1)
        self.kv.waiting.append(made)
        return made

    async def begin(self, ids: list[int]) -> Scoring:
        """Ask, and compute all ids if there is room."""
        made = self.ask(ids)
        await self.turn()
        return made

    async def turn(self) -> None:
        await self.kv.tidy()
        await self.kv.admit_all()
        if not await self.kv.make_room(self.segments):
            return
        for each in self.kv.running:
            assert each.slot is not None
            new = each.ids[each.computed :]
            self.memory.held[each.slot] = len(each.ids)
            self.kv.extend(each, new)
            each.advance(len(new), 1)

    @property
    def due_s(self) -> float:
        """When something on disk is to be deleted, by the loop's clock."""
        timer = self.kv._spiller._timer
        assert timer is not None
        return timer.when()

    @property
    def segments(self) -> list[Segment]:
        """The next step's."""
        todo = [each for each in self.kv.running if each.todo]
        places = [self.kv.held(each) for each in todo]
        return [
            Segment(place.slot, place.shared, each.todo, 0, 1, place.source)
            for place, each in zip(places, todo, strict=True)
        ]

    @property
    def next_ids(self) -> list[Segment]:
        """One more id of each."""
        return [Segment(each.slot or 0, each.computed, 1, 0, 1) for each in self.kv.running]


def pause(*sequences: Scoring) -> None:
    """Their readers have something to read."""
    for each in sequences:
        each.put(torch.zeros(1, 1))


async def test_of_paused_ones_the_one_that_is_to_be_copied_from_is_the_last_to_give_way() -> None:
    scene = Scene(400)
    other = await scene.begin(list(range(150)))
    source = await scene.begin([*PREFIX, 1, 2])
    pause(other, source)
    copied = await scene.begin([*PREFIX, 3, *range(100)])
    assert scene.kv.running == [source, copied]
    assert scene.kv.waiting == [other]


async def test_what_is_to_be_copied_from_gives_way_if_nothing_else_can() -> None:
    scene = Scene(250)
    source = await scene.begin([*PREFIX, 1, 2])
    pause(source)
    copied = await scene.begin([*PREFIX, 3, *range(100)])
    assert scene.kv.running == [copied]
    assert copied.todo == 0


@pytest.mark.parametrize(("priorities", "gone"), [((0, 0, 0), 2), ((0, -9, 0), 1), ((0, 0, 9), 1)])
async def test_the_youngest_of_the_lowest_priority_gives_way(
    priorities: tuple[int, ...], gone: int
) -> None:
    scene = Scene(1000)
    asked = [scene.ask(list(range(first, first + 90))) for first in (0, 100, 200)]
    for sequence, priority in zip(asked, priorities, strict=True):
        sequence.priority = priority
    await scene.turn()
    scene.memory.tokens = 200
    assert not await scene.kv.make_room(scene.next_ids)
    assert scene.kv.waiting == [asked[gone]]


async def test_a_kept_prefix_is_continued_in_place_where_memory_is_short() -> None:
    """It is neither copied nor freed to make room for who begins with it."""
    scene = Scene(350)
    (await scene.begin([*PREFIX, *range(200, 400)])).end()
    second = await scene.begin([*PREFIX, *range(50, 150)])
    assert scene.memory.spilled == 0
    assert (second.slot, second.computed) == (0, 200)
    assert scene.memory.held == {0: 200}


async def test_who_was_given_up_waits_until_its_reader_wants_more() -> None:
    scene = Scene(200)
    first = await scene.begin(PREFIX)
    pause(first)
    second = await scene.begin(list(range(150)))
    assert scene.kv.running == [second]
    second.end()
    await scene.turn()
    assert scene.kv.waiting == [first]
    await anext(first)
    await scene.turn()
    assert scene.kv.running == [first]


async def test_one_that_waited_for_its_reader_took_no_place_that_others_lose() -> None:
    scene = Scene(250)
    pause(await scene.begin(PREFIX))
    second = await scene.begin(list(range(150)))
    third = await scene.begin(list(range(300, 390)))
    assert scene.kv.running == [second, third]


async def test_after_a_loss_memory_is_asked_again() -> None:
    """The new group may have less, for the same step."""
    scene = Scene(250)
    scene.ask(PREFIX)
    scene.ask(list(range(100)))
    await scene.turn()
    scene.kv.begin_again()
    assert [each.steps for each in scene.kv.waiting] == [{}, {}]  # of the group that is gone
    scene.memory.held.clear()
    await scene.kv.admit_all()
    scene.memory.tokens = 150
    assert not await scene.kv.make_room(scene.segments)


async def test_what_cannot_be_read_on_one_rank_is_freed_on_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if nobody wants its slot any more."""
    scene = Scene(200)
    (await scene.begin(PREFIX)).end()
    await scene.turn()
    await scene.kv.free_one()
    again = scene.ask([*PREFIX, 1])

    async def restore(self: Memory, slot: int, handle: int) -> None:
        self.held[slot] = self.disk.pop(handle)
        again.end()
        raise PeerError("one rank cannot read it")

    monkeypatch.setattr(Memory, "restore", restore)
    await scene.turn()
    assert (scene.memory.held, scene.memory.disk) == ({}, {})


@pytest.mark.parametrize(("priority", "begins"), [(0, False), (1, True)])
async def test_nobody_waits_for_what_one_of_lower_priority_computes(
    priority: int, begins: bool
) -> None:
    """That can take as long as others of more priority come."""
    scene = Scene(1000)
    scene.ask([*PREFIX, 1])
    await scene.kv.admit_all()
    other = scene.ask([*PREFIX, 2])
    other.priority = priority
    await scene.kv.admit_all()
    assert (other in scene.kv.running) == begins


@pytest.mark.parametrize(("target_s", "begins"), [(1000.0, False), (150.0, True), (10.0, False)])
async def test_one_in_time_does_not_wait_for_what_a_late_one_computes(
    target_s: float, begins: bool
) -> None:
    """An id takes a second: of 110 and 210 ids both are in time, the first or none."""
    scene = Scene(1000, Targets(ttft_s=target_s))
    scene.ask([*PREFIX, *range(110)], Unanswered)
    await scene.kv.admit_all()
    other = scene.ask([*PREFIX, *range(200, 210)], Unanswered)
    await scene.kv.admit_all()
    assert (other in scene.kv.running) == begins


async def test_few_ids_are_not_waited_for_whatever_is_kept() -> None:
    scene = Scene(1000)
    (await scene.begin([1, *range(10, 20)])).end()
    scene.ask([1, 5, *PREFIX])
    await scene.kv.admit_all()
    other = scene.ask([1, 5, *range(100)])
    await scene.kv.admit_all()
    assert other in scene.kv.running


async def test_the_last_ids_of_a_prefix_are_waited_for() -> None:
    """As those before them were."""
    scene = Scene(1000)
    first = scene.ask([*PREFIX, 1, 2])
    await scene.kv.admit_all()
    scene.kv.extend(first, first.ids[:90])
    first.advance(90, 1)
    other = scene.ask([*PREFIX, 3])
    await scene.kv.admit_all()
    assert other in scene.kv.waiting


async def lose(scene: Scene, asked: Scoring) -> None:
    scene.kv.begin_again()
    scene.memory.held.clear()
    await scene.turn()


async def give_up(scene: Scene, asked: Scoring) -> None:
    pause(asked)
    (await scene.begin(list(range(150)))).end()
    assert asked not in scene.kv.running
    await anext(asked)
    await scene.turn()


@pytest.mark.parametrize("meanwhile", [lose, give_up])
@pytest.mark.parametrize("reset", [False, True])
async def test_a_reset_holds_for_who_begins_again(
    meanwhile: Callable[[Scene, Scoring], Awaitable[None]], reset: bool
) -> None:
    scene = Scene(200)
    asked = await scene.begin(PREFIX)
    if reset:
        scene.kv.reset()
        await scene.turn()
    await meanwhile(scene, asked)
    assert asked in scene.kv.running
    asked.end()
    await scene.turn()
    assert (not scene.memory.held) == reset


async def test_what_is_on_disk_has_its_time_also_if_an_older_one_was_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(1000)
    until_s = []
    for ids in (PREFIX, list(range(100))):
        (await scene.begin(ids)).end()
        await scene.turn()
        await scene.kv.free_one()
        until_s.append(scene.due_s)
        monkeypatch.setattr(spilling, "LIFE_S", 2 * spilling.LIFE_S)
    assert until_s[0] == until_s[1]
    await scene.begin([*PREFIX, 1])
    assert len(scene.memory.disk) == 1
    assert scene.due_s > until_s[0]


async def test_the_limit_on_disk_is_that_of_the_plan_after_a_loss() -> None:
    """A token takes more of it on fewer ranks."""
    scene = Scene(1000)
    scene.kv.begin_again()
    scene.memory.kv_token_bytes = 20
    (await scene.begin(PREFIX)).end()
    await scene.turn()
    await scene.kv.free_one()
    assert (scene.memory.held, scene.memory.disk) == ({}, {})
