"""The one task that runs steps: it admits sequences, computes them together, and hands on results.

::

    while there are sequences:
        drop those that ended; admit those that there is room for
        pieces = scheduler.plan(running)
        hidden = group.step(embed(pieces))
        for each answer among them: sample(logits(hidden))
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Ids
from typing import Any

import torch

from tpirt.batch import Batch, Segment
from tpirt.cancellation import finish
from tpirt.cluster.connection import Connection
from tpirt.cluster.group import Group, engine_closed
from tpirt.engine.drafts.base import Drafter
from tpirt.engine.drafts.controller import MOST_GUESSES, DraftController, DraftStats
from tpirt.engine.scheduler import Piece, Scheduler
from tpirt.engine.sequence import Answer, Scoring, Sequence
from tpirt.engine.slots import Place, Sharing, Slots, common_prefix
from tpirt.engine.spilling import Spiller, free
from tpirt.engine.step_costs import StepCosts
from tpirt.errors import (
    LogitsError,
    MemoryLimitError,
    PeerLostError,
    QueueFullError,
    RequestError,
    TpirtError,
)
from tpirt.planning import Deployment
from tpirt.refusals import refused_memory
from tpirt.types import RECONNECTED, Progress

_Any = Sequence[Any]

_LEAST_SHARED = 32  # ids, for which a sequence waits until another one has computed them


class Driver:
    """Computes sequences, many in one step.

    A sequence that fails or is left does not affect the others. If a peer is lost, the same peers
    are connected again, and every sequence is computed again from its ids.

    Args:
        connection: the group, and another one after a loss.
        deployment: the plan, for memory.
        embed: ids to hidden states, (T, H).
        sequences: the most that run at once; others wait.
        waiting: the most that wait.
        spill_bytes: the most that sequences which no request uses take on each rank's disk.
        drafter: guesses tokens; None for none.
        stall_free: see :class:`Scheduler`.
    """

    def __init__(
        self,
        connection: Connection,
        deployment: Deployment,
        embed: Callable[[Ids[int]], torch.Tensor],
        *,
        sequences: int,
        waiting: int,
        spill_bytes: int,
        stall_free: bool,
        drafter: Drafter | None,
    ):
        self._connection = connection
        self._deployment = deployment
        self._embed = embed
        self._most = self._most_now = sequences
        self._most_waiting = waiting
        config = deployment.config
        trained = config.max_position_embeddings if config.rope.kind == "dynamic" else None
        sharing = Sharing(trained)
        self._slots = Slots(sharing)
        self._costs, self._output_costs = StepCosts(), StepCosts()
        self._spiller = Spiller(
            connection,
            deployment,
            self._slots,
            self._costs,
            most_bytes=spill_bytes,
            sharing=sharing,
            wake=self._start,
        )
        self._scheduler = Scheduler(deployment.chunk_tokens, self._costs, stall_free=stall_free)
        self._drafts: DraftController | None = None
        if drafter is not None:
            self._drafts = DraftController(
                drafter,
                self._costs,
                self._output_costs,
                config.vocab_size,
                deployment.chunk_tokens,
                connection.group.exact_rows,
                min(MOST_GUESSES, deployment.logits_tokens - 1),
                trained,
            )
        self._waiting: list[_Any] = []
        self._running: list[_Any] = []  # admitted, in that order
        self._pieces: list[Piece] = []  # of the step under way
        self._forget = False  # reset() was called, and the memory is not free yet
        self._recovering = False  # a peer was lost, and nothing came out since
        self._abandoned = False  # the task was cancelled to end a step that nobody wants
        self._closed = False
        self._first_step = 1
        self._fitting: tuple[int, int, int, int] | None = None  # the last step's memory
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._step_over = asyncio.Event()

    @property
    def cached_tokens(self) -> int:
        """How many tokens' keys and values are kept."""
        return 0 if self._forget else self._slots.tokens

    @property
    def first_step(self) -> int:
        """The step that the latest sequence began with, or all of them after a reconnect."""
        return self._first_step

    def explain_cache(self) -> str:
        """Say what became of conversations that no request uses."""
        return self._spiller.explain()

    def explain_drafts(self) -> str:
        """Say what guesses brought, or why there are none."""
        return "drafts: none asked for" if self._drafts is None else self._drafts.explain()

    @property
    def draft_stats(self) -> DraftStats | None:
        """What guesses brought so far; None without a drafter."""
        return self._drafts.stats if self._drafts is not None else None

    def add(self, sequence: _Any) -> None:
        """Compute a sequence, until it ends; :meth:`leave` it in any case.

        Raises:
            QueueFullError: too many are waiting.
            RequestError: the engine is closed.
        """
        if self._closed:
            raise engine_closed()
        present = len(self._waiting) + len(self._running)
        if present >= self._most + self._most_waiting:
            raise QueueFullError(
                f"{present} requests are under way, and at most {self._most} run and "
                f"{self._most_waiting} wait: try again later"
            )
        sequence.on_read(self._wake.set)
        self._waiting.append(sequence)
        self._start()

    async def leave(self, sequence: _Any) -> None:
        """Compute a sequence no more.

        Waits for the end of a step that no other sequence is in, which ends after the current
        block; others go on.
        """
        sequence.end()
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._wake.set()
        own = [piece.sequence for piece in self._pieces]
        if sequence in own and all(other.ended for other in own):
            assert self._task is not None
            if not self._abandoned and not self._task.done():
                self._abandoned = True
                self._task.cancel()
            await self._step_over.wait()

    def reset(self) -> None:
        """Keep no sequence's keys and values; those of running ones are freed at their end."""
        self._forget = True
        self._start()

    async def aclose(self) -> None:
        """End all sequences; later ones raise RequestError."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._spiller.close()
        self._end_all(engine_closed())

    # -- the readers' side -------------------------------------------------------------------

    def _start(self) -> None:
        if self._closed:
            return
        self._wake.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    # -- the task ----------------------------------------------------------------------------

    @property
    def _group(self) -> Group:
        return self._connection.group

    async def _run(self) -> None:
        try:
            while self._waiting or self._running or self._forget or self._spiller.overdue:
                try:
                    await self._turn()
                except asyncio.CancelledError:
                    if self._closed or not self._abandoned:
                        raise
                    task = asyncio.current_task()
                    assert task is not None
                    task.uncancel()
                    self._recovering = False
                finally:
                    self._pieces, self._abandoned = [], False
                    self._step_over.set()
        except asyncio.CancelledError:
            self._end_all(engine_closed())
            raise
        except Exception as exc:
            self._end_all(exc)

    async def _turn(self) -> None:
        """Run one step, if there is one to run."""
        self._wake.clear()
        await self._tidy()
        if not (self._waiting or self._running):
            return
        if (broken := self._group.broken) is not None:
            await self._recover(broken)
            return
        await self._admit_all()
        pieces = self._scheduler.plan(self._running)
        if self._drafts is not None:
            pieces = await self._drafts.extend(pieces)
        if pieces:
            if await self._make_room(pieces):
                await self._compute(pieces)
            await asyncio.sleep(0)  # readers take their results
        elif self._running:
            await self._wake.wait()

    async def _tidy(self) -> None:
        """Let go of ended sequences, and free what is kept no more."""
        self._waiting = [sequence for sequence in self._waiting if not sequence.ended]
        for sequence in [s for s in self._running if s.ended]:
            self._running.remove(sequence)
            if self._drafts is not None and isinstance(sequence, Answer):
                self._drafts.forget(sequence)
            self._most_now = min(self._most, self._most_now + 1)
            if sequence.slot is not None and self._slots.release(sequence.slot):
                await self._free(sequence.slot)
        if self._forget:
            for slot in self._slots.forget():
                await self._free(slot)
            await self._spiller.clear()
            self._forget = False
        await self._spiller.tidy()

    async def _free(self, slot: int) -> None:
        self._slots.remove(slot)
        await finish(free(self._group, slot))

    # -- admission and memory ----------------------------------------------------------------

    async def _admit_all(self) -> None:
        if self._full:  # before those that wait are sorted
            return
        for sequence in self._scheduler.order(self._waiting, self._running):
            if self._full:
                return
            if self._soon_shared(sequence):
                continue
            if not await self._admit(sequence):
                return

    @property
    def _full(self) -> bool:
        """Whether as many run as may; a sequence that waits for its reader takes no place."""
        return sum(not sequence.paused for sequence in self._running) >= self._most_now

    def _soon_shared(self, sequence: _Any) -> bool:
        """Whether a running prompt will have computed more of its prefix: it waits for that."""
        shared = self._place(sequence, copy=True).shared
        for other in self._running:
            if other.todo > 1 and not other.paused:
                common = common_prefix(other.ids, sequence.ids[: sequence.first_wanted])
                worth = common >= shared + (1 if shared else _LEAST_SHARED)
                if worth and common > other.computed:
                    return True
        return False

    async def _admit(self, sequence: _Any) -> bool:
        """Give a sequence a slot; returns False if it has to wait for memory."""
        copy = True
        while not sequence.ended:  # its reader can leave meanwhile
            place = self._place(sequence, copy=copy)
            own = _rest(sequence, place, self._spiller.length(place))
            need = self._group.kv_need([*map(_rest, self._running), own])
            rows = min(sequence.todo - place.shared, self._deployment.chunk_tokens)
            if not self._deployment.has_room(need, rows, displacing=False):
                if idle := self._idle(place):
                    await self._spiller.spill(idle[0])
                    continue
                if copy and place.source in self._slots.idle:
                    copy = False
                    continue
                if self._running and not self._deployment.has_room(need, rows, displacing=True):
                    return False
            if place.handle is None or await self._spiller.restore(place):
                break
        if not sequence.ended:
            self._begin(sequence, place)
        return True

    def _begin(self, sequence: _Any, place: Place) -> None:
        self._waiting.remove(sequence)
        if place.handle is None:
            self._spiller.passed_over(sequence.ids, place)
        try:
            self._deployment.check_context(len(sequence.ids), cached=place.shared)
        except MemoryLimitError as exc:
            sequence.end(exc)
            return
        self._slots.take(place, sequence.ids)
        sequence.admit(place.slot, place.shared, place.source)
        self._running.append(sequence)
        self._first_step = self._group.next_step

    def _place(self, sequence: _Any, *, copy: bool) -> Place:
        ids, length = sequence.ids[: sequence.first_wanted + 1], len(sequence.ids)
        return self._spiller.better(self._slots.find(ids, length, copy=copy), ids, length)

    def _idle(self, place: Place | None = None) -> list[int]:
        """Slots that may be freed, the longest unused first."""
        needed = {sequence.source for sequence in self._running}
        if place is not None:
            needed |= {place.slot, place.source}
        return [slot for slot in self._slots.idle if slot not in needed]

    async def _make_room(self, pieces: list[Piece]) -> bool:
        """Free idle slots that displace weights; returns False if a sequence was given up.

        Weights are in memory first, then running sequences, then what is kept for later ones.
        """
        batch = Batch(tuple(piece.segment() for piece in pieces))
        rows, logits = batch.tokens, batch.num_logits
        need = self._group.kv_need(batch.segments)
        if (need.held, need.peak, rows, logits) == self._fitting:
            return True
        fits = self._deployment.has_room
        while not fits(need, rows, logits, displacing=False) and (idle := self._idle()):
            await self._spiller.spill(idle[0])
            need = self._group.kv_need(batch.segments)
        if len(self._running) > 1 and not fits(need, rows, logits, displacing=True):
            await self._give_up(self._running[-1])
            return False
        self._fitting = (need.held, need.peak, rows, logits)
        return True

    async def _give_up(self, sequence: _Any) -> None:
        """Free a running sequence's keys and values; it is computed again when there is room."""
        slot = sequence.slot
        self._running.remove(sequence)
        self._waiting.insert(0, sequence)
        self._most_now = max(1, len(self._running))
        sequence.restart()
        assert slot is not None
        await self._free(slot)

    # -- steps -------------------------------------------------------------------------------

    async def _compute(self, pieces: list[Piece]) -> None:
        self._pieces = pieces
        self._step_over.clear()
        began_s = time.perf_counter()
        group = self._group
        ids = [token for piece in pieces for token in (*piece.ids, *piece.guessed)]
        try:
            with refused_memory(f"embeddings of {len(ids)} tokens"):
                hidden = self._embed(ids)
            segments = [piece.segment() for piece in pieces]
            number = group.next_step
            out = await group.step(hidden, segments, any(piece.prefill for piece in pieces))
        except MemoryLimitError as exc:
            _fail_step(pieces)
            await self._relieve(pieces, exc)
        except TpirtError as exc:
            if group.broken is None:  # else the next turn connects again
                _end(pieces, exc)
        else:
            counts = [segment.num_logits for segment in segments]
            computed_s = time.perf_counter()
            self._costs.learn(len(ids), computed_s - began_s)
            self._advance(pieces, number)
            tokens = await self._hand_on(pieces, torch.split(out, counts))
            ended_s = time.perf_counter()
            if len(out):
                self._output_costs.learn(len(out), ended_s - computed_s)
            if self._drafts is not None:
                self._drafts.learn_step(pieces, tokens, ended_s - began_s)

    async def _relieve(self, pieces: list[Piece], exc: MemoryLimitError) -> None:
        """Memory was refused: free what can be, or give up the youngest; alone, one fails."""
        if idle := self._idle():
            await self._spiller.spill(idle[0])
        elif len(self._running) > 1:
            await self._give_up(self._running[-1])
        else:
            _end(pieces, exc)

    def _advance(self, pieces: list[Piece], step: int) -> None:
        for piece in pieces:
            sequence, prefill = piece.sequence, piece.prefill
            assert sequence.slot is not None
            end, kept = sequence.computed + piece.tokens, piece.tokens + len(sequence.keep)
            self._slots.extend(sequence.slot, sequence.ids[end - kept : end], len(sequence.ids))
            sequence.advance(piece.tokens, step)
            if prefill:
                _tell(sequence, sequence.prompt_progress())

    async def _hand_on(self, pieces: list[Piece], hidden: Ids[torch.Tensor]) -> int:
        """Hand hidden states to their sequences; draw for answers. Returns how many tokens."""
        drawing: list[tuple[Piece, torch.Tensor]] = []
        for piece, own in zip(pieces, hidden, strict=True):
            if not len(own) or piece.sequence.ended:
                continue
            if isinstance(piece.sequence, Scoring):
                piece.sequence.take(own)
            else:
                drawing.append((piece, own))
        tokens = 0
        for chosen in _together(drawing, self._deployment.logits_tokens):
            try:
                logits = await self._group.logits(torch.cat([own for _, own in chosen]))
            except MemoryLimitError as exc:
                _end([piece for piece, _ in chosen], exc)
                continue
            counts = [len(own) for _, own in chosen]
            for (piece, _), rows in zip(chosen, torch.split(logits, counts), strict=True):
                tokens += self._draw(piece, rows)
        return tokens

    def _draw(self, piece: Piece, logits: torch.Tensor) -> int:
        answer = piece.sequence
        assert isinstance(answer, Answer)
        assert answer.slot is not None
        drawn: list[int] = []
        try:
            with self._group.sampling(answer.sampled), refused_memory("sampling"):
                if self._drafts is not None:
                    self._drafts.see(piece, logits)
                drawn = answer.draw(logits, piece.guessed, piece.parents)
            in_place = len(drawn) - 1 - len(answer.keep)
            self._slots.extend(answer.slot, drawn[:in_place], len(answer.ids))
            if self._drafts is not None:
                self._drafts.learn(piece, drawn)
        except LogitsError as exc:
            self._slots.discard(answer.slot)  # keys and values may be NaN, too
            answer.end(exc)
        except Exception as exc:  # of its parameters: the others go on
            answer.end(exc)
        self._recovering = False
        return len(drawn)

    # -- losses ------------------------------------------------------------------------------

    async def _recover(self, broken: Exception) -> None:
        """Connect again after a loss, once until something comes out; else end all sequences."""
        for sequence in self._waiting:
            sequence.computed = self._place(sequence, copy=True).shared
        self._slots.clear()
        self._spiller.forget()
        self._waiting[:0] = self._running
        self._running.clear()
        tokens = sum(sequence.computed for sequence in self._waiting)
        for sequence in self._waiting:
            sequence.restart()
        again, self._recovering = self._recovering, True
        if again or not isinstance(broken, PeerLostError):
            self._end_all(broken)
            return
        self._step_over.clear()
        self._pieces = [Piece(sequence, 1) for sequence in self._waiting]
        try:
            await self._connection.reconnect(self._report)
        except TpirtError as exc:
            self._end_all(exc)
            return
        self._first_step = self._group.next_step
        peers = len(self._deployment.ranks) - 1
        detail = f"computing {tokens} tokens again" if tokens else ""
        self._report(Progress(RECONNECTED, peers, peers, "peers", detail))

    def _report(self, report: Progress) -> None:
        for sequence in [*self._running, *self._waiting]:
            _tell(sequence, report)

    def _end_all(self, exc: Exception) -> None:
        """End all sequences; what follows begins afresh."""
        self._recovering = False
        for sequence in [*self._running, *self._waiting]:
            sequence.end(exc)
        self._waiting.clear()


def _rest(sequence: _Any, place: Place | None = None, least: int = 0) -> Segment:
    """All that is still to be computed of a sequence, as a segment; it has ``least`` positions."""
    if place is None:
        assert sequence.slot is not None
        place = Place(sequence.slot, sequence.computed, sequence.source)
    tokens = max(1, len(sequence.ids) - place.shared, least - place.shared)
    return Segment(place.slot, place.shared, tokens, 0, 1, place.source)


def _tell(sequence: _Any, report: Progress) -> None:
    """Report to a sequence's caller; what the callback raises ends that sequence only."""
    try:
        sequence.progress(report)
    except asyncio.CancelledError:  # raised, not received: nothing is awaited here
        sequence.end(RequestError("the progress callback raised CancelledError"))
    except Exception as exc:
        sequence.end(exc)


def _together(
    drawing: Iterable[tuple[Piece, torch.Tensor]], most: int
) -> Iterator[list[tuple[Piece, torch.Tensor]]]:
    """Groups of at most ``most`` rows, but at least one piece's."""
    group: list[tuple[Piece, torch.Tensor]] = []
    rows = 0
    for piece, own in drawing:
        if group and rows + len(own) > most:
            yield group
            group, rows = [], 0
        group.append((piece, own))
        rows += len(own)
    if group:
        yield group


def _fail_step(pieces: Iterable[Piece]) -> None:
    for piece in pieces:
        piece.sequence.fail_step()


def _end(pieces: Iterable[Piece], exc: Exception) -> None:
    for piece in pieces:
        piece.sequence.end(exc)
