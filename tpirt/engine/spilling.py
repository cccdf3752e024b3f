"""Sequences on the ranks' own disks: kept ones that memory is too short for."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ids
from typing import NamedTuple

from tpirt.cancellation import finish
from tpirt.cluster.connection import Connection
from tpirt.cluster.group import Group
from tpirt.engine.slots import Place, Sharing, Slots, common_prefix, worth_taking
from tpirt.engine.step_costs import StepCosts
from tpirt.errors import TpirtError
from tpirt.units import format_bytes

LIFE_S = 3600.0
_LEAST_TOKENS = 32  # below, a sequence is not worth a file on every rank
_MOST_SEQUENCES = 256
_LATE_S = 1.0  # timers may be early by the clock's resolution


class Spilled(NamedTuple):
    """A sequence on disk.

    Attributes:
        handle: by which the ranks know it; nothing else does.
        ids: whose keys and values are there.
        rope_length: that its keys were rotated for.
        until_s: when it is to be deleted.
    """

    handle: int
    ids: list[int]
    rope_length: int
    until_s: float


class SpilledSequences:
    """What is on disk, the oldest first: pure bookkeeping.

    Args:
        most_tokens: the most ids that all sequences have together.
        sharing: what another sequence can use of them.
    """

    def __init__(self, most_tokens: int, sharing: Sharing):
        self.most_tokens = most_tokens
        self._sharing = sharing
        self._all: dict[int, Spilled] = {}

    def __len__(self) -> int:
        return len(self._all)

    @property
    def tokens(self) -> int:
        """Number of ids of all sequences."""
        return sum(len(each.ids) for each in self._all.values())

    @property
    def handles(self) -> list[int]:
        """Of all sequences, the oldest first."""
        return list(self._all)

    @property
    def until_s(self) -> float | None:
        """When the first one is to be deleted; None if there are none."""
        return min((each.until_s for each in self._all.values()), default=None)

    def takes(self, ids: Ids[int]) -> bool:
        """Whether a sequence may go to disk at all."""
        return _LEAST_TOKENS <= len(ids) <= self.most_tokens

    def add(self, spilled: Spilled) -> None:
        """A sequence was written."""
        self._all[spilled.handle] = spilled

    def get(self, handle: int) -> Spilled:
        """The sequence under a handle."""
        return self._all[handle]

    def remove(self, handles: Iterable[int]) -> None:
        """Sequences are no longer on disk."""
        for handle in handles:
            self._all.pop(handle, None)

    def superseded(self, ids: Ids[int]) -> list[int]:
        """What is of no more use once ``ids`` are spilled: prefixes, if ``ids`` serve instead."""
        return [
            each.handle
            for each in self._all.values()
            if _begins(ids, each.ids) and worth_taking(ids, len(each.ids))
        ]

    def in_the_way(self, ids: Ids[int]) -> list[int]:
        """The oldest ones, to delete before ``ids`` are spilled: they take the room."""
        kept = list(self._all.values())
        room = self.most_tokens - len(ids)
        while len(kept) >= _MOST_SEQUENCES or sum(len(each.ids) for each in kept) > room:
            kept.pop(0)
        return self.handles[: len(self._all) - len(kept)]

    def overdue(self, now_s: float) -> list[int]:
        """What has been there for too long."""
        return [each.handle for each in self._all.values() if each.until_s <= now_s]

    def find(self, ids: Ids[int], length: int) -> tuple[Spilled, int] | None:
        """The sequence that shares most of ``ids``, and how many.

        Those are passed over that would lose more than they share: a sequence leaves the disk when
        it is restored, and is continued in its place. See :meth:`Slots.find` for the arguments.
        """
        best: tuple[Spilled, int] | None = None
        for each in self._all.values():
            shared = self._sharing.shared(each.ids, each.rope_length, ids, length)
            if shared > (best[1] if best else 0) and worth_taking(each.ids, shared):
                best = each, shared
        return best


class Spiller:
    """Moves idle slots to the ranks' disks, and back where that is quicker than computing them.

    Nothing here raises because of a disk: what cannot be written or read is computed again.

    Args:
        connection: the group and its plan.
        slots: those in memory.
        costs: how long steps take.
        most_bytes: on the disk of each rank.
        sharing: what another sequence can use of a spilled one.
        wake: called when something is overdue; :meth:`tidy` is to follow.
    """

    def __init__(
        self,
        connection: Connection,
        slots: Slots,
        costs: StepCosts,
        *,
        most_bytes: int,
        sharing: Sharing,
        wake: Callable[[], None],
    ):
        self._connection = connection
        self._most_bytes = most_bytes
        self._slots = slots
        self._costs = costs
        self._wake = wake
        self._spilled = SpilledSequences(most_bytes // self._token_bytes, sharing)
        self._moves = StepCosts()  # seconds to or from disk, by tokens
        self._timer: asyncio.TimerHandle | None = None
        self._written = self._restored = self._dropped = self._recomputed = 0

    @property
    def overdue(self) -> bool:
        """Whether :meth:`tidy` has something to delete."""
        until_s = self._spilled.until_s
        return until_s is not None and until_s <= _now_s()

    def explain(self) -> str:
        """Say what became of conversations that no request uses, or whose request gave way."""
        size = format_bytes(self._spilled.tokens * self._token_bytes)
        return (
            f"conversations: {len(self._slots.idle)} kept in memory, {len(self._spilled)} on disk "
            f"({size} a rank); so far {self._written} spilled, {self._restored} restored, "
            f"{self._recomputed} computed again, {self._dropped} dropped"
        )

    def better(self, place: Place, ids: Ids[int], length: int) -> Place:
        """A place that begins with a spilled sequence, if that is quicker than ``place``.

        See :meth:`Slots.find` for the other arguments.
        """
        found = self._spilled.find(ids, length)
        if found is None or found[1] <= place.shared:
            return place
        spilled, shared = found
        if not self._pays(len(spilled.ids), shared - place.shared):
            return place
        return Place(self._slots.free_number, shared, handle=spilled.handle)

    def length(self, place: Place) -> int:
        """Number of positions that come from disk."""
        return 0 if place.handle is None else len(self._spilled.get(place.handle).ids)

    def passed_over(self, ids: Ids[int], length: int, place: Place) -> None:
        """Count a sequence that is computed although it was spilled."""
        found = self._spilled.find(ids, length)
        self._recomputed += found is not None and found[1] > place.shared

    async def spill(self, slot: int) -> None:
        """Free an idle slot; it goes to disk if it can. Runs to its end also if cancelled."""
        await finish(self._spill(slot))

    async def restore(self, place: Place) -> bool:
        """Fill the place's slot from disk, and keep it as an idle one; returns whether it worked.

        The sequence leaves the disk in any case. Runs to its end also if cancelled.
        """
        return await finish(self._restore(place))

    async def tidy(self) -> None:
        """Delete what has been on disk for too long."""
        if self.overdue:
            overdue = self._spilled.overdue(_now_s())
            self._dropped += len(overdue)
            await finish(self._drop(overdue))

    async def clear(self) -> None:
        """Delete everything."""
        await finish(self._drop(self._spilled.handles))

    def forget(self) -> None:
        """The session is over, and its files with it."""
        self._spilled.remove(self._spilled.handles)
        self.close()

    def close(self) -> None:
        """Wake nobody any more."""
        if self._timer is not None:
            self._timer.cancel()

    @property
    def _group(self) -> Group:
        return self._connection.group

    @property
    def _token_bytes(self) -> int:
        return self._connection.deployment.kv_token_bytes

    def _pays(self, tokens: int, instead_of: int) -> bool:
        """Whether reading ``tokens`` is quicker than computing ``instead_of``."""
        computing_s = self._costs.prompt_seconds(
            instead_of, self._connection.deployment.chunk_tokens
        )
        reading_s = self._moves.seconds(tokens)
        return computing_s is None or reading_s is None or reading_s < computing_s

    async def _spill(self, slot: int) -> None:
        kept = self._slots.remove(slot)
        self._spilled.most_tokens = self._most_bytes // self._token_bytes
        if kept.forget or not self._spilled.takes(kept.ids):
            self._dropped += bool(kept.ids)
            await free(self._group, slot)
            return
        superseded = self._spilled.superseded(kept.ids)
        self._spilled.remove(superseded)
        in_the_way = self._spilled.in_the_way(kept.ids)
        self._dropped += len(in_the_way)
        await self._drop([*superseded, *in_the_way])
        handle = secrets.randbits(64)
        began_s = time.perf_counter()
        try:
            await self._group.spill(slot, handle, len(kept.ids))
        except TpirtError:
            self._dropped += 1
            await self._drop([handle])  # other ranks have it
            return
        self._written += 1
        self._moves.learn(len(kept.ids), time.perf_counter() - began_s)
        self._spilled.add(Spilled(handle, kept.ids, kept.rope_length, _now_s() + LIFE_S))
        self._set_timer()

    async def _restore(self, place: Place) -> bool:
        assert place.handle is not None
        spilled = self._spilled.get(place.handle)
        self._spilled.remove([spilled.handle])
        self._set_timer()
        began_s = time.perf_counter()
        try:
            await self._group.restore(place.slot, spilled.handle)
        except TpirtError:
            self._recomputed += 1
            await free(self._group, place.slot)  # other ranks have it
            return False
        self._restored += 1
        self._moves.learn(len(spilled.ids), time.perf_counter() - began_s)
        self._slots.put(place.slot, spilled.ids, spilled.rope_length)
        return True

    async def _drop(self, handles: Ids[int]) -> None:
        self._spilled.remove(handles)
        if handles:
            with contextlib.suppress(TpirtError):  # a broken group's files are gone
                await self._group.drop_spilled(handles)
        self._set_timer()

    def _set_timer(self) -> None:
        self.close()
        if (until_s := self._spilled.until_s) is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(until_s + _LATE_S, self._wake)


async def free(group: Group, slot: int) -> None:
    """Drop a sequence on every rank; a broken group is reported by its next user."""
    with contextlib.suppress(TpirtError):
        await group.free(slot)


def _begins(ids: Ids[int], prefix: Ids[int]) -> bool:
    return common_prefix(ids, prefix) == len(prefix)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
