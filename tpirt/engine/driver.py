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
from collections.abc import Awaitable, Callable, Iterable, Iterator
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
from tpirt.engine.slots import Place, Sharing, Slots
from tpirt.engine.spilling import Spiller, free
from tpirt.engine.step_costs import StepCosts
from tpirt.engine.targets import Goodput, Targets
from tpirt.errors import (
    LogitsError,
    MemoryLimitError,
    PeerLostError,
    QueueFullError,
    RequestError,
    TpirtError,
)
from tpirt.ops.buffers import join_rows, split_rows
from tpirt.ops.quant_linear import FEW_ROWS
from tpirt.planning import Deployment
from tpirt.refusals import refused_memory
from tpirt.types import LOST, RECONNECTED, RESUMED, Progress, ProgressCallback, Recovery
from tpirt.units import format_bytes

_Any = Sequence[Any]

_MOST_LOSSES = 4  # in a row, with nothing in between
_RETRY_S, _LATEST_RETRY_S = 2.0, 60.0  # to form a group again while there are no sequences
_LEAST_SHARED = 32  # ids, for which a sequence waits until another one has computed them


class Driver:
    """Computes sequences, many in one step.

    A sequence that fails or is left does not affect the others. If a peer is lost, another group is
    formed, and every sequence is computed again from its ids. Without sequences, a group is formed
    of the same peers or spares only: a new plan costs more than may be needed.

    Args:
        connection: the group and its plan, and others after a loss.
        embed: ids to hidden states, (T, H).
        progress: told what happens while there are no sequences.
        sequences: the most in one step, and the most that run besides those that wait for their
            readers; others wait.
        waiting: the most that wait.
        spill_bytes: the most that sequences which no request uses take on each rank's disk.
        drafter: guesses tokens; None for none.
        stall_free, targets: see :class:`Scheduler`.

    Attributes:
        goodput: how many answers met the targets.
    """

    def __init__(
        self,
        connection: Connection,
        embed: Callable[[Ids[int]], Awaitable[torch.Tensor]],
        progress: ProgressCallback,
        *,
        sequences: int,
        waiting: int,
        spill_bytes: int,
        stall_free: bool,
        targets: Targets,
        drafter: Drafter | None,
    ):
        self._connection = connection
        self._embed = embed
        self._progress = progress
        self._most = self._most_active = sequences
        self._most_waiting = waiting
        config = self._deployment.config
        dynamic = config.rope.kind == "dynamic"
        self._sharing = Sharing(config.max_position_embeddings if dynamic else None)
        self._slots = Slots(self._sharing)
        self._costs, self._output_costs = StepCosts(), StepCosts()
        self._spiller = Spiller(
            connection,
            self._slots,
            self._costs,
            most_bytes=spill_bytes,
            sharing=self._sharing,
            wake=self._start,
        )
        self._scheduler = Scheduler(
            self._costs,
            self._output_costs,
            sequences=sequences,
            stall_free=stall_free,
            targets=targets,
        )
        self.goodput = Goodput(targets)
        self._drafts: DraftController | None = None
        if drafter is not None:
            self._drafts = DraftController(
                drafter,
                self._costs,
                self._output_costs,
                config.vocab_size,
                FEW_ROWS,
            )
        self._waiting: list[_Any] = []
        self._running: list[_Any] = []  # admitted, in that order
        self._served: list[_Any] = []  # by the step, or the reconnect, that is under way
        self._forget = False  # reset() was called, and the memory is not free yet
        self._losses = 0  # of peers, since something came out
        self._recovery: Recovery | None = None  # until something comes out
        self._mended_s = 0.0  # when the last group was formed again
        self._mending = _Backoff(self._start)
        self._abandoned = False  # the task was cancelled to end what nobody wants
        self._reconnecting = False  # for those that wait, also who comes meanwhile
        self._closed = False
        self._first_step = 1
        self._fitting: tuple[int, int, int, int] | None = None  # the last step's memory
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._step_over = asyncio.Event()
        connection.on_broken = self._start

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
        if self._reconnecting:
            self._served.append(sequence)
        self._start()

    async def leave(self, sequence: _Any) -> None:
        """Compute a sequence no more.

        Waits for the end of a step that no other sequence is in, which ends after the current
        block, or of a reconnect that no other one waits for; others go on.
        """
        sequence.end()
        if self._drafts is not None and isinstance(sequence, Answer):
            self._drafts.forget(sequence)
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._wake.set()
        if sequence in self._served and all(other.ended for other in self._served):
            assert self._task is not None
            if not self._abandoned and not self._task.done():
                self._abandoned = True
                self._task.cancel()
            await self._step_over.wait()

    def reset(self) -> None:
        """Keep no sequence's keys and values; those of running ones are freed at their end."""
        self._forget = True
        if self._drafts is not None:
            self._drafts.reset()
        self._start()

    async def aclose(self) -> None:
        """End all sequences; later ones raise RequestError."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._spiller.close()
        self._mending.reset()
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

    @property
    def _deployment(self) -> Deployment:
        return self._connection.deployment

    @property
    def _to_mend(self) -> bool:
        """Whether to form another group although there are no sequences."""
        return isinstance(self._group.broken, PeerLostError) and self._mending.due

    async def _run(self) -> None:
        try:
            while self._waiting or self._running or self._overdue:
                try:
                    await self._turn()
                except asyncio.CancelledError:
                    if self._closed or not self._abandoned:
                        raise
                    task = asyncio.current_task()
                    assert task is not None
                    task.uncancel()
                    self._losses = 0
                finally:
                    self._served, self._abandoned = [], False
                    self._step_over.set()
        except asyncio.CancelledError:
            self._end_all(engine_closed())
            raise
        except Exception as exc:
            self._end_all(exc)

    @property
    def _overdue(self) -> bool:
        """Whether there is something to do without sequences."""
        return self._forget or self._spiller.overdue or self._to_mend

    async def _turn(self) -> None:
        """Run one step, if there is one to run."""
        self._wake.clear()
        await self._tidy()
        busy = bool(self._waiting or self._running)
        if (broken := self._group.broken) is not None and (busy or self._to_mend):
            await self._recover(broken)
            return
        if not busy:
            return
        await self._admit_all()
        chunk = self._deployment.chunk_tokens
        pieces = self._scheduler.plan(self._running, chunk, time.perf_counter())
        if self._drafts is not None:
            most = min(MOST_GUESSES, self._deployment.logits_tokens - 1)
            pieces = await self._drafts.extend(pieces, chunk, most)
        if pieces:
            segments = [piece.segment(self._held(piece.sequence).source) for piece in pieces]
            if await self._make_room(segments):
                await self._compute(pieces, segments)
            await asyncio.sleep(0)  # readers take their results
        elif self._running or self._waiting:
            await self._wake.wait()

    async def _tidy(self) -> None:
        """Let go of ended sequences, and free what is kept no more."""
        self._waiting = [sequence for sequence in self._waiting if not sequence.ended]
        for sequence in [s for s in self._running if s.ended]:
            self._running.remove(sequence)
            self._most_active = min(self._most, self._most_active + 1)
            if sequence.slot is not None:
                self._slots.release(sequence.slot)
        if self._forget:
            self._slots.forget()
            await self._spiller.clear()
            self._forget = False
        for slot in self._slots.to_free:
            await self._free(slot)
        await self._spiller.tidy()

    async def _free(self, slot: int) -> None:
        self._slots.remove(slot)
        await finish(free(self._group, slot))

    # -- admission and memory ----------------------------------------------------------------

    async def _admit_all(self) -> None:
        if self._full:  # before those that wait are sorted
            return
        chunk, now_s = self._deployment.chunk_tokens, time.perf_counter()
        for sequence in self._scheduler.order(self._waiting, self._running, chunk, now_s):
            if self._full:
                return
            if sequence.fed:
                continue
            place = self._place(sequence, copy=True)
            if self._soon_shared(sequence, place):
                continue
            if not await self._admit(sequence, place):
                return

    @property
    def _active(self) -> int:
        """How many run; a sequence that waits for its reader takes no place."""
        return sum(not sequence.paused for sequence in self._running)

    @property
    def _full(self) -> bool:
        """Whether as many run as may."""
        active = self._active
        return active >= self._most_active or not self._scheduler.admits(active)

    def _soon_shared(self, sequence: _Any, place: Place) -> bool:
        """Whether a running prompt will have computed more of its prefix: it waits for that."""
        for other in self._running:
            if other.todo > 1 and not other.paused:
                ids, length = _sharable(sequence), sequence.prompt
                common = self._sharing.shared(other.ids, other.prompt, ids, length)
                worth = common >= place.shared + (1 if place.shared else _LEAST_SHARED)
                if worth and common > other.computed:
                    return True
        return False

    async def _admit(self, sequence: _Any, place: Place) -> bool:
        """Give a sequence its place, or a cheaper one; False if it has to wait for memory."""
        copy = True
        while not sequence.ended:  # its reader can leave meanwhile
            own = _rest(sequence, place, self._spiller.length(place))
            others = [_rest(other, self._held(other)) for other in self._running]
            need = self._group.kv_need([*others, own])
            rows = min(sequence.todo - place.shared, self._deployment.chunk_tokens)
            fits = self._deployment.has_room(need, rows, displacing=False)
            if not fits and (idle := self._idle_but(place)):
                await self._spiller.spill(idle[0])
            elif not fits and copy and place.source in self._slots.idle:
                copy = False
            elif (
                not fits
                and self._running
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
        self._waiting.remove(sequence)
        if place.handle is None:
            self._spiller.passed_over(_sharable(sequence), sequence.prompt, place)
        try:
            self._deployment.check_context(len(sequence.ids), cached=place.shared)
        except MemoryLimitError as exc:
            sequence.end(exc)
            return
        self._slots.take(place, sequence.ids)
        sequence.admit(place.slot, place.shared)
        self._running.append(sequence)
        self._first_step = self._group.next_step

    def _place(self, sequence: _Any, *, copy: bool) -> Place:
        ids, length = _sharable(sequence), sequence.prompt
        return self._spiller.better(self._slots.find(ids, length, copy=copy), ids, length)

    def _idle_but(self, place: Place) -> list[int]:
        """Slots that may be freed for a sequence with this place, the longest unused first."""
        return [slot for slot in self._slots.idle if slot not in (place.slot, place.source)]

    def _held(self, sequence: _Any) -> Place:
        """Where a running sequence is."""
        assert sequence.slot is not None
        return Place(sequence.slot, sequence.computed, self._slots.source(sequence.slot))

    async def _make_room(self, segments: list[Segment]) -> bool:
        """Free idle slots that displace weights; returns False if a sequence was given up.

        Weights are in memory first, then running sequences, then what is kept for later ones.
        """
        batch = Batch(tuple(segments))
        rows, logits = batch.tokens, batch.num_logits
        need = self._group.kv_need(segments)
        if (need.held, need.peak, rows, logits) == self._fitting:
            return True
        fits = self._deployment.has_room
        while not fits(need, rows, logits, displacing=False) and (idle := self._slots.idle):
            await self._spiller.spill(idle[0])
            need = self._group.kv_need(segments)
        if len(self._running) > 1 and not fits(need, rows, logits, displacing=True):
            await self._give_up(self._least_missed)
            return False
        self._fitting = (need.held, need.peak, rows, logits)
        return True

    async def _give_up(self, sequence: _Any) -> None:
        """Move a running sequence out of memory; it goes on when there is room."""
        slot = sequence.slot
        assert slot is not None
        self._running.remove(sequence)
        self._waiting.insert(0, sequence)
        if not sequence.paused:
            self._most_active = max(1, self._active)
        sequence.restart()
        self._copy_nothing_from(slot)
        self._slots.release(slot)
        await self._spiller.spill(slot)

    @property
    def _least_missed(self) -> _Any:
        """The running sequence to give up: the youngest, of those that wait for readers if any."""
        return self._paused_but(None) or self._running[-1]

    def _paused_but(self, source: int | None) -> _Any | None:
        """The youngest one that waits for its reader; that in ``source`` if there is no other."""
        paused = [sequence for sequence in self._running if sequence.paused]
        others = [sequence for sequence in paused if sequence.slot != source]
        return next(reversed(others or paused), None)

    # -- steps -------------------------------------------------------------------------------

    async def _compute(self, pieces: list[Piece], segments: list[Segment]) -> None:
        if all(piece.sequence.ended for piece in pieces):  # left since the step was planned
            return
        self._served = [piece.sequence for piece in pieces]
        self._step_over.clear()
        began_s = time.perf_counter()
        group = self._group
        ids = [token for piece in pieces for token in (*piece.ids, *piece.guessed)]
        try:
            with refused_memory(f"embeddings of {len(ids)} tokens"):
                hidden = await self._embed(ids)
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
            tokens = await self._hand_on(pieces, split_rows(out, counts))
            ended_s = time.perf_counter()
            learning_s = 0.0
            if self._drafts is not None:
                learning_s = self._drafts.learning_s
                self._drafts.learn_step(pieces, tokens, ended_s - began_s)
            if len(out):
                self._output_costs.learn(len(out), ended_s - computed_s - learning_s)

    async def _relieve(self, pieces: list[Piece], exc: MemoryLimitError) -> None:
        """Memory was refused: free what can be, or give one up; alone, one fails."""
        if idle := self._slots.idle:
            await self._spiller.spill(idle[0])
        elif len(self._running) > 1:
            await self._give_up(self._least_missed)
        elif (source := self._held(self._running[0]).source) is not None:
            self._take_over(self._running[0], source)
        else:
            _end(pieces, exc)

    def _take_over(self, sequence: _Any, source: int) -> None:
        """Continue a slot that nobody else uses in place, instead of copying it."""
        assert sequence.slot is not None
        self._slots.without_copy_of(source)
        self._slots.release(sequence.slot)
        place = Place(source, sequence.computed)
        self._slots.take(place, sequence.ids)
        sequence.admit(source, place.shared)

    def _advance(self, pieces: list[Piece], step: int) -> None:
        for piece in pieces:
            sequence = piece.sequence
            assert sequence.slot is not None
            end, kept = sequence.computed + piece.tokens, piece.tokens + len(sequence.keep)
            self._slots.extend(sequence.slot, sequence.ids[end - kept : end], sequence.prompt)
            sequence.advance(piece.tokens, step)
            if piece.prefill:
                _tell(sequence, sequence.prompt_progress())

    async def _hand_on(self, pieces: list[Piece], hidden: Ids[torch.Tensor]) -> int:
        """Hand hidden states to their sequences; draw for answers.

        Returns how many tokens answers under way got, without the first ones after prompts.
        """
        drawing: list[tuple[Piece, torch.Tensor]] = []
        for piece, own in zip(pieces, hidden, strict=True):
            if not len(own) or piece.sequence.ended:
                continue
            if isinstance(piece.sequence, Scoring):
                piece.sequence.take(own)
                self._came_out()
            else:
                drawing.append((piece, own))
        tokens = 0
        for chosen in _together(drawing, self._deployment.logits_tokens):
            try:
                logits = await self._group.logits(join_rows([own for _, own in chosen]))
            except TpirtError as exc:
                if self._group.broken is None:  # else the next turn connects again
                    _end([piece for piece, _ in chosen], exc)
                continue
            counts = [len(own) for _, own in chosen]
            for (piece, _), rows in zip(chosen, split_rows(logits, counts), strict=True):
                if not piece.sequence.ended:  # it may have been left meanwhile
                    drawn = self._draw(piece, rows)
                    tokens += drawn * (not piece.prompt)
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
            if answer.ended:
                self.goodput.count(answer.ttft_s, answer.tpot_s)
            in_place = len(drawn) - 1 - len(answer.keep)
            self._slots.extend(answer.slot, drawn[:in_place], answer.prompt)
            if self._drafts is not None:
                self._drafts.learn(piece, drawn)
        except LogitsError as exc:
            self._discard(answer.slot)  # keys and values may be NaN, too
            answer.end(exc)
        except Exception as exc:  # of its parameters: the others go on
            answer.end(exc)
        self._came_out()
        return len(drawn)

    def _discard(self, slot: int) -> None:
        """Keep and share nothing of a busy slot."""
        self._slots.discard(slot)
        self._copy_nothing_from(slot)

    def _copy_nothing_from(self, slot: int) -> None:
        """Who was to copy from a slot computes all ids instead."""
        lacking = self._slots.without_copy_of(slot)
        for sequence in self._running:
            if sequence.slot in lacking:
                sequence.admit(sequence.slot, 0)

    # -- losses ------------------------------------------------------------------------------

    async def _recover(self, broken: Exception) -> None:
        """Form another group after a loss, and begin all sequences again; else end them."""
        tokens = self._begin_again()
        self._losses += 1
        if self._group.broken_s - self._mended_s > _LATEST_RETRY_S:
            self._mending.reset()
        if self._losses > _MOST_LOSSES or not isinstance(broken, PeerLostError):
            self._end_all(broken)
            return
        self._step_over.clear()
        self._served = list(self._waiting)
        self._reconnecting = True
        try:
            recovery = await self._connection.reconnect(self._report, lambda: bool(self._waiting))
        except TpirtError as exc:
            self._mending.later()
            self._end_all(exc)
            return
        finally:
            self._reconnecting = False
        self._mending.later()  # a group can break as soon as it is formed, again and again
        self._fitting = None
        self._first_step = self._group.next_step
        self._recovery = recovery if self._waiting else None
        self._mended_s = time.perf_counter()
        recovery.replayed_tokens = tokens
        words = [recovery.change, f"computing {tokens} tokens again" if tokens else ""]
        words.append(f"sent {format_bytes(recovery.sent_bytes)}" if recovery.sent_bytes else "")
        detail = "; ".join(filter(None, words))
        self._report(Progress(RECONNECTED, recovery.peers, recovery.peers, "peers", detail))
        if not self._waiting:
            self._losses = 0

    def _begin_again(self) -> int:
        """All keys and values are lost; returns how many tokens have to be computed again."""
        tokens = sum(sequence.computed for sequence in self._running)
        for sequence in self._waiting:
            shared = self._place(sequence, copy=True).shared
            sequence.again = sequence.again or shared > 0
            tokens += shared
        self._slots.clear()
        self._spiller.forget()
        self._waiting[:0] = self._running
        self._running.clear()
        for sequence in self._waiting:
            sequence.restart()
        return tokens

    def _came_out(self) -> None:
        """A request has got something: what was lost is made good."""
        self._losses = 0
        self._mending.reset()
        if self._recovery is None:
            return
        recovery, self._recovery = self._recovery, None
        recovery.replaying_ms = (time.perf_counter() - self._mended_s) * 1e3
        self._report(Progress(RESUMED, 1, 1, "", recovery.explain()))

    def _report(self, report: Progress) -> None:
        sequences = [*self._running, *self._waiting]
        if not sequences and report.stage in (LOST, RECONNECTED):
            self._progress(report)
        for sequence in sequences:
            _tell(sequence, report)

    def _end_all(self, exc: Exception) -> None:
        """End all sequences; what follows begins afresh."""
        self._losses = 0
        for sequence in [*self._running, *self._waiting]:
            sequence.end(exc)
        self._waiting.clear()


class _Backoff:
    """When to try again, later each time; calls ``wake`` then."""

    def __init__(self, wake: Callable[[], None]):
        self._wake = wake
        self._wait_s = _RETRY_S
        self._timer: asyncio.TimerHandle | None = None

    @property
    def due(self) -> bool:
        """Whether it is time."""
        return self._timer is None

    def later(self) -> None:
        """It was tried: wait for longer than the last time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._wait_s, self._on_time)
        self._wait_s = min(2 * self._wait_s, _LATEST_RETRY_S)

    def reset(self) -> None:
        """It was of use, or is not wanted any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._wait_s = None, _RETRY_S

    def _on_time(self) -> None:
        self._timer = None
        self._wake()


def _sharable(sequence: _Any) -> list[int]:
    """The ids before the first one whose hidden state is wanted, and that one."""
    return list(sequence.ids[: sequence.first_wanted + 1])


def _rest(sequence: _Any, place: Place, least: int = 0) -> Segment:
    """All that is still to be computed of a sequence, as a segment; it has ``least`` positions."""
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
    drawing: Ids[tuple[Piece, torch.Tensor]], most: int
) -> Iterator[list[tuple[Piece, torch.Tensor]]]:
    """Groups of at most ``most`` rows, but at least one piece's.

    Up to ``FEW_ROWS`` rows of answers under way are in a group of no more: then they have the
    kernel that they have alone, however many prompts end in the same step.
    """
    if sum(len(own) for piece, own in drawing if not piece.prompt) <= FEW_ROWS:
        most = min(most, FEW_ROWS)
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
