"""Whose keys and values are in memory: sequences begin, give way to others, and are kept for later.

Weights are in memory first, then running sequences, then what is kept of those that have ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Ids
from itertools import pairwise
from typing import Any, NamedTuple

from tpirt.batch import Batch, Segment
from tpirt.cancellation import finish
from tpirt.cluster.connection import Connection
from tpirt.cluster.group import Group
from tpirt.engine.scheduler import Scheduler
from tpirt.engine.sequence import Sequence
from tpirt.engine.slots import Place, Sharing, Slots, common_prefix
from tpirt.engine.spilling import Spiller, free
from tpirt.engine.step_costs import StepCosts
from tpirt.errors import MemoryLimitError
from tpirt.model.kv_store import KVNeed
from tpirt.planning import Deployment

_Any = Sequence[Any]

_LEAST_SHARED = 32  # ids, for which a sequence waits until another one has computed them
_MOST_HELD_BACK = 16  # of those that wait for others' ids a turn: to compare ids takes time


class _Fitting(NamedTuple):
    """What decides whether there is memory for a step; see :class:`KVNeed`."""

    held: int
    peak: int
    ends: list[int]  # in units of 64
    rows: int
    logits: int

    @classmethod
    def of(cls, need: KVNeed, rows: int, logits: int) -> _Fitting:
        """What a step of ``rows`` rows needs, ``logits`` of which are wanted."""
        return cls(need.held, need.peak, [end // 64 for end in need.ends], rows, logits)


class KVManager:
    """Admits sequences, and makes room for them in every rank's KV store.

    What awaits is called by the driver, between steps or before the results of one are used.

    Args:
        connection: the group and its plan.
        scheduler: says who begins next.
        costs: how long steps take.
        sequences: the most that run, besides those that wait for their readers.
        spill_bytes: the most that sequences which no request uses take on each rank's disk.
        wake: called when something is overdue; :meth:`tidy` is to follow.

    Attributes:
        waiting: sequences without a slot.
        running: those with one, in order of admission.
        first_step: the step that the latest of them began with.
    """

    def __init__(
        self,
        connection: Connection,
        scheduler: Scheduler,
        costs: StepCosts,
        *,
        sequences: int,
        spill_bytes: int,
        wake: Callable[[], None],
    ):
        self.waiting: list[_Any] = []
        self.running: list[_Any] = []
        self.first_step = 1
        self._connection = connection
        self._scheduler = scheduler
        self._most = self._most_active = sequences
        config = connection.deployment.config
        dynamic = config.rope.kind == "dynamic"
        self._sharing = Sharing(config.max_position_embeddings if dynamic else None)
        self._slots = Slots(self._sharing)
        self._spiller = Spiller(
            connection,
            self._slots,
            costs,
            most_bytes=spill_bytes,
            sharing=self._sharing,
            wake=wake,
        )
        self._forget = False  # reset() was called, and the memory is not free yet
        self._fitting: _Fitting | None = None  # the last step's memory

    @property
    def tokens(self) -> int:
        """How many tokens' keys and values are kept."""
        return 0 if self._forget else self._slots.tokens

    @property
    def overdue(self) -> bool:
        """Whether :meth:`tidy` has something to free or to delete."""
        return self._forget or self._spiller.overdue

    def explain(self) -> str:
        """Say what became of conversations that no request uses."""
        return self._spiller.explain()

    def held(self, sequence: _Any) -> Place:
        """Where a running sequence is."""
        assert sequence.slot is not None
        return Place(sequence.slot, sequence.computed, self._slots.source(sequence.slot))

    def extend(self, sequence: _Any, ids: Ids[int]) -> None:
        """Account for ids of a running sequence whose keys and values every rank has now."""
        assert sequence.slot is not None
        self._slots.extend(sequence.slot, ids, sequence.prompt)

    def reset(self) -> None:
        """Keep nothing; what running sequences have is freed at their end."""
        self._forget = True

    def close(self) -> None:
        """Wake nobody any more."""
        self._spiller.close()

    async def tidy(self) -> None:
        """Let go of ended sequences, and free what is kept no more."""
        self.waiting = [sequence for sequence in self.waiting if not sequence.ended]
        for sequence in [s for s in self.running if s.ended]:
            self.running.remove(sequence)
            self._most_active = min(self._most, self._most_active + 1)
            if sequence.slot is not None:
                self._slots.release(sequence.slot)
        if self._forget:
            self._slots.forget()
            for sequence in [*self.running, *self.waiting]:
                sequence.forget = sequence.begun
            await self._spiller.clear()
            self._forget = False
        for slot in self._slots.to_free:
            self._slots.remove(slot)
            await finish(free(self._group, slot))
        await self._spiller.tidy()

    def begin_again(self) -> int:
        """All is lost with the group; returns how many tokens have to be computed again."""
        lost = [sequence.ids[: sequence.computed] for sequence in self.running]
        for sequence in self.waiting:
            shared = self._shared(sequence)
            sequence.again = sequence.again or shared > 0
            lost.append(sequence.ids[:shared])
        self._slots.clear()
        self._spiller.forget()
        self._fitting = None
        self._most_active = self._most
        self.waiting[:0] = self.running
        self.running.clear()
        for sequence in self.waiting:
            sequence.restart()
            sequence.steps.clear()  # another group counts its own
        return _distinct(lost)

    def discard(self, slot: int) -> None:
        """Keep and share nothing of a busy slot."""
        self._slots.discard(slot)
        self._copy_nothing_from(slot)

    @property
    def _group(self) -> Group:
        return self._connection.group

    @property
    def _deployment(self) -> Deployment:
        return self._connection.deployment

    # -- admission ---------------------------------------------------------------------------

    async def admit_all(self) -> None:
        """Give slots to those that there is room for."""
        if self._full:  # before those that wait are sorted
            return
        chunk, now_s = self._deployment.chunk_tokens, time.perf_counter()
        held_back = 0
        ordered = self._scheduler.order(self.waiting, self.running, chunk, now_s, self._shared)
        for sequence in ordered:
            if self._full:
                return
            if sequence.fed:
                continue
            place = self._place(sequence, copy=True)
            if self._soon_shared(sequence, place, now_s):
                held_back += 1
                if held_back == _MOST_HELD_BACK:
                    return
                continue
            if not await self._admit(sequence, place):
                return

    @property
    def _active(self) -> int:
        """How many run; a sequence that waits for its reader takes no place."""
        return sum(not sequence.paused for sequence in self.running)

    @property
    def _full(self) -> bool:
        """Whether as many run as may."""
        active = self._active
        return active >= self._most_active or not self._scheduler.admits(active)

    def _soon_shared(self, sequence: _Any, place: Place, now_s: float) -> bool:
        """Whether a running prompt will have computed more of its prefix: it waits for that.

        Not for one that is less urgent, which may be computed much later.
        """
        ids, length = _sharable(sequence), sequence.prompt
        urgency, chunk = self._scheduler.urgency, self._deployment.chunk_tokens
        own = urgency(sequence, chunk, now_s, lambda _: place.shared)
        for other in self.running:
            if other.todo > 1 and not other.paused and urgency(other, chunk, now_s) <= own:
                common = self._sharing.shared(other.ids, other.prompt, ids, length)
                least = 1 if place.source == other.slot else _LEAST_SHARED
                if common >= place.shared + least and common > other.computed:
                    return True
        return False

    async def _admit(self, sequence: _Any, place: Place) -> bool:
        """Give a sequence its place, or a cheaper one; False if it has to wait for memory."""
        copy = True
        while not sequence.ended:  # its reader can leave meanwhile
            own = _rest(sequence, place, self._spiller.length(place))
            others = [_rest(other, self.held(other)) for other in self.running]
            need = self._group.kv_need([*others, own])
            rows = min(sequence.todo - place.shared, self._deployment.chunk_tokens)
            fits = self._deployment.has_room(need, rows, displacing=False)
            if not fits and (idle := self._idle_but(place)):
                await self._spiller.spill(idle[0])
            elif not fits and copy and place.source in self._slots.idle:
                copy = False
            elif (
                not fits
                and self.running
                and not self._deployment.has_room(need, rows, displacing=True)
            ):
                if (paused := self._paused_but(place.source)) is None:
                    return False
                await self._give_up(paused)
            elif place.handle is None or await self._spiller.restore(place):
                break
            place = self._place(sequence, copy=copy)
        if not sequence.ended:
            self._begin(sequence, place)
        return True

    def _begin(self, sequence: _Any, place: Place) -> None:
        self.waiting.remove(sequence)
        if place.handle is None:
            self._spiller.passed_over(_sharable(sequence), sequence.prompt, place)
        try:
            self._deployment.check_context(len(sequence.ids), cached=place.shared)
        except MemoryLimitError as exc:
            sequence.end(exc)
            return
        self._take(sequence, place)
        self.running.append(sequence)
        self.first_step = self._group.next_step

    def _take(self, sequence: _Any, place: Place) -> None:
        self._slots.take(place, sequence.ids)
        if sequence.forget:
            self._slots.discard(place.slot)
        sequence.admit(place.slot, place.shared)

    def _shared(self, sequence: _Any) -> int:
        return self._place(sequence, copy=True).shared

    def _place(self, sequence: _Any, *, copy: bool) -> Place:
        ids, length = _sharable(sequence), sequence.prompt
        return self._spiller.better(self._slots.find(ids, length, copy=copy), ids, length)

    def _idle_but(self, place: Place) -> list[int]:
        """Slots that may be freed for a sequence with this place, the longest unused first."""
        return [slot for slot in self._slots.idle if slot not in (place.slot, place.source)]

    # -- room for a step ---------------------------------------------------------------------

    async def make_room(self, segments: list[Segment]) -> bool:
        """Free idle slots that displace weights; returns False if a sequence was given up."""
        batch = Batch(tuple(segments))
        rows, logits = batch.tokens, batch.num_logits
        need = self._group.kv_need(segments)
        if _Fitting.of(need, rows, logits) == self._fitting:
            return True
        fits = self._deployment.has_room
        while not fits(need, rows, logits, displacing=False) and (idle := self._slots.idle):
            await self._spiller.spill(idle[0])
            need = self._group.kv_need(segments)
        if len(self.running) > 1 and not fits(need, rows, logits, displacing=True):
            await self._give_up(self._least_missed)
            return False
        self._fitting = _Fitting.of(need, rows, logits)
        return True

    async def relieve(self) -> bool:
        """Memory was refused: free what can be, or give one up; returns whether there was any."""
        if await self.free_one():
            return True
        if len(self.running) > 1:
            await self._give_up(self._least_missed)
        elif (source := self.held(self.running[0]).source) is not None:
            self._take_over(self.running[0], source)
        else:
            return False
        return True

    async def free_one(self) -> bool:
        """Free the idle slot that was unused for longest; returns whether there was any."""
        if idle := self._slots.idle:
            await self._spiller.spill(idle[0])
        return bool(idle)

    def _take_over(self, sequence: _Any, source: int) -> None:
        """Continue a slot that nobody else uses in place, instead of copying it."""
        assert sequence.slot is not None
        self._slots.without_copy_of(source)
        self._slots.release(sequence.slot)
        self._take(sequence, Place(source, sequence.computed))

    async def _give_up(self, sequence: _Any) -> None:
        """Move a running sequence out of memory; it goes on when there is room."""
        slot = sequence.slot
        assert slot is not None
        self.running.remove(sequence)
        self.waiting.insert(0, sequence)
        if not sequence.paused:
            self._most_active = max(1, self._active)
        sequence.restart()
        self._copy_nothing_from(slot)
        self._slots.release(slot)
        await self._spiller.spill(slot)

    def _copy_nothing_from(self, slot: int) -> None:
        """Who was to copy from a slot computes all ids instead."""
        lacking = self._slots.without_copy_of(slot)
        for sequence in self.running:
            if sequence.slot in lacking:
                sequence.admit(sequence.slot, 0)

    @property
    def _least_missed(self) -> _Any:
        """The running sequence to give up: one that waits for its reader if any."""
        least = self._paused_but(None) or _youngest(self.running)
        assert least is not None
        return least

    def _paused_but(self, source: int | None) -> _Any | None:
        """One that waits for its reader; that in ``source`` if there is no other."""
        paused = [sequence for sequence in self.running if sequence.paused]
        others = [sequence for sequence in paused if sequence.slot != source]
        return _youngest(others or paused)


def _youngest(sequences: list[_Any]) -> _Any | None:
    """Of those with the lowest priority, the one that was admitted last; None if there are none."""
    return min(reversed(sequences), key=lambda sequence: sequence.priority, default=None)


def _distinct(texts: list[list[int]]) -> int:
    """How many ids of some texts have to be computed, if common prefixes are shared."""
    texts = sorted(texts)
    shared = sum(common_prefix(one, other) for one, other in pairwise(texts))
    return sum(map(len, texts)) - shared


def _sharable(sequence: _Any) -> list[int]:
    """The ids before the first one whose hidden state is wanted, and that one."""
    return list(sequence.ids[: sequence.first_wanted + 1])


def _rest(sequence: _Any, place: Place, least: int = 0) -> Segment:
    """All that is still to be computed of a sequence, as a segment; it has ``least`` positions."""
    tokens = max(1, len(sequence.ids) - place.shared, least - place.shared)
    return Segment(place.slot, place.shared, tokens, 0, 1, place.source)
