"""The one task that runs steps: it admits sequences, computes them together, and hands on results.

::

    while there are sequences:
        drop those that ended; admit those that there is room for (kv_manager.py)
        pieces = scheduler.plan(running)
        hidden = group.step(embed(pieces))
        for each answer among them: sample(logits(hidden))
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from collections.abc import Sequence as Ids
from typing import Any

import torch

from tpirt.batch import Segment
from tpirt.cluster.connection import Connection
from tpirt.cluster.group import Group, engine_closed
from tpirt.engine.drafts.base import Drafter
from tpirt.engine.drafts.controller import MOST_GUESSES, DraftController, DraftStats
from tpirt.engine.kv_manager import KVManager
from tpirt.engine.scheduler import Piece, Scheduler
from tpirt.engine.sequence import Answer, Scoring, Sequence
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
from tpirt.planning import Deployment, advise
from tpirt.refusals import refused_memory
from tpirt.types import LOST, RECONNECTED, RESUMED, Progress, ProgressCallback, Recovery
from tpirt.units import format_bytes

_Any = Sequence[Any]

MOST_LOSSES = 4  # in a row, with nothing in between
_RETRY_S, _LATEST_RETRY_S = 2.0, 60.0  # to form a group again while there are no sequences


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
        self._most_running, self._most_waiting = sequences, waiting
        self._costs, self._output_costs = StepCosts(), StepCosts()
        self._scheduler = Scheduler(
            self._costs,
            self._output_costs,
            sequences=sequences,
            stall_free=stall_free,
            targets=targets,
        )
        self._kv = KVManager(
            connection,
            self._scheduler,
            self._costs,
            sequences=sequences,
            spill_bytes=spill_bytes,
            wake=self._start,
        )
        self.goodput = Goodput(targets)
        self._drafts: DraftController | None = None
        if drafter is not None:
            self._drafts = DraftController(
                drafter,
                self._costs,
                self._output_costs,
                self._deployment.config.vocab_size,
                FEW_ROWS,
            )
        self._served: list[_Any] = []  # by the step, or the reconnect, that is under way
        self._losses = 0  # of peers, since something came out
        # The last one and whom it befell, until one of these gets something.
        self._resuming: tuple[Recovery, list[_Any]] | None = None
        self._mended_s = 0.0  # when the last group was formed again
        self._mending = _Backoff(self._start)
        self._abandoned = False  # the task was cancelled to end what nobody wants
        self._reconnecting = False  # for those that wait, also who comes meanwhile
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._step_over = asyncio.Event()
        connection.on_broken = self._start

    @property
    def cached_tokens(self) -> int:
        """How many tokens' keys and values are kept."""
        return self._kv.tokens

    @property
    def first_step(self) -> int:
        """The step that the latest sequence began with, or all of them after a reconnect."""
        return self._kv.first_step

    def explain_cache(self) -> str:
        """Say what became of conversations that no request uses."""
        return self._kv.explain()

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
        present = sum(not sequence.ended for sequence in self._sequences)
        if present >= self._most_running + self._most_waiting:
            raise QueueFullError(
                f"{present} requests are under way, and at most {self._most_running} run and "
                f"{self._most_waiting} wait: try again later"
            )
        sequence.on_read(self._wake.set)
        self._kv.waiting.append(sequence)
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
        if sequence in self._kv.waiting:
            self._kv.waiting.remove(sequence)
        self._wake.set()
        if sequence in self._served and all(other.ended for other in self._served):
            assert self._task is not None
            if not self._abandoned and not self._task.done():
                self._abandoned = True
                self._task.cancel()
            await self._step_over.wait()

    def reset(self) -> None:
        """Keep no sequence's keys and values; those of running ones are freed at their end."""
        self._kv.reset()
        if self._drafts is not None:
            self._drafts.reset()
        self._start()

    async def aclose(self) -> None:
        """End all sequences; later ones raise RequestError."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._kv.close()
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
    def _sequences(self) -> list[_Any]:
        """All that run or wait; those that ended until the next turn."""
        return [*self._kv.running, *self._kv.waiting]

    @property
    def _to_mend(self) -> bool:
        """Whether to form another group although there are no sequences."""
        return isinstance(self._group.broken, PeerLostError) and self._mending.due

    async def _run(self) -> None:
        try:
            while self._sequences or self._kv.overdue or self._to_mend:
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

    async def _turn(self) -> None:
        """Run one step, if there is one to run."""
        self._wake.clear()
        await self._kv.tidy()
        busy = bool(self._sequences)
        if (broken := self._group.broken) is not None and (busy or self._to_mend):
            await self._recover(broken)
            return
        if not busy:
            self._resuming = None
            return
        await self._kv.admit_all()
        chunk = self._deployment.chunk_tokens
        pieces = self._scheduler.plan(self._kv.running, chunk, time.perf_counter())
        if self._drafts is not None:
            most = min(MOST_GUESSES, self._deployment.logits_tokens - 1)
            pieces = await self._drafts.extend(pieces, chunk, most)
        if pieces:
            segments = [piece.segment(self._kv.held(piece.sequence).source) for piece in pieces]
            if await self._kv.make_room(segments):
                await self._compute(pieces, segments)
            await asyncio.sleep(0)  # readers take their results
        elif self._sequences:
            await self._wake.wait()

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
            if not await self._kv.relieve():
                _end(pieces, exc)
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
            wanted = zip(pieces, counts, strict=True)
            if rows := sum(n for piece, n in wanted if isinstance(piece.sequence, Answer)):
                self._output_costs.learn(rows, ended_s - computed_s - learning_s)

    def _advance(self, pieces: list[Piece], step: int) -> None:
        for piece in pieces:
            sequence = piece.sequence
            end, kept = sequence.computed + piece.tokens, piece.tokens + len(sequence.keep)
            self._kv.extend(sequence, sequence.ids[end - kept : end])
            sequence.advance(piece.tokens, step)
            if piece.prefill and not sequence.ended:  # it may have been left meanwhile
                _tell(sequence, sequence.prompt_progress())

    async def _hand_on(self, pieces: list[Piece], hidden: Ids[torch.Tensor]) -> int:
        """Hand hidden states to their sequences; draw for answers.

        Returns how many tokens answers under way got, without the first ones after rows of prompts.
        """
        drawing: list[tuple[Piece, torch.Tensor]] = []
        for piece, own in zip(pieces, hidden, strict=True):
            if not len(own) or piece.sequence.ended:
                continue
            if isinstance(piece.sequence, Scoring):
                piece.sequence.take(own)
                self._came_out(piece.sequence)
            else:
                drawing.append((piece, own))
        tokens = 0
        groups = deque(_together(drawing, self._deployment.logits_tokens))
        while groups:
            chosen = groups.popleft()
            try:
                logits = await self._logits(join_rows([own for _, own in chosen]))
            except TpirtError as exc:
                if isinstance(exc, MemoryLimitError) and (half := len(chosen) // 2):
                    groups.extendleft((chosen[half:], chosen[:half]))
                elif self._group.broken is None:  # else the next turn connects again
                    _end([piece for piece, _ in chosen], exc)
                continue
            counts = [len(own) for _, own in chosen]
            for (piece, _), rows in zip(chosen, split_rows(logits, counts), strict=True):
                if not piece.sequence.ended:  # it may have been left meanwhile
                    drawn = self._draw(piece, rows)
                    tokens += drawn * (not piece.prompt)
        return tokens

    async def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See :meth:`Group.logits`; where memory is refused, idle slots are freed."""
        while True:
            try:
                return await self._group.logits(hidden)
            except MemoryLimitError:
                if not await self._kv.free_one():
                    raise

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
            self._kv.extend(answer, drawn[:in_place])
            if self._drafts is not None:
                self._drafts.learn(piece, drawn)
        except LogitsError as exc:
            self._kv.discard(answer.slot)  # keys and values may be NaN, too
            answer.end(exc)
        except Exception as exc:  # of its parameters: the others go on
            answer.end(exc)
        self._came_out(answer)
        return len(drawn)

    # -- losses ------------------------------------------------------------------------------

    async def _recover(self, broken: Exception) -> None:
        """Form another group after a loss, and begin all sequences again; else end them."""
        tokens, before = self._kv.begin_again(), self._deployment
        self._losses += 1
        if self._group.broken_s - self._mended_s > _LATEST_RETRY_S:
            self._mending.reset()
        if self._losses > MOST_LOSSES or not isinstance(broken, PeerLostError):
            self._end_all(broken)
            return
        self._step_over.clear()
        self._served = list(self._kv.waiting)
        self._reconnecting = True
        try:
            recovery = await self._connection.reconnect(
                self._report, lambda: bool(self._kv.waiting)
            )
        except TpirtError as exc:
            self._mending.later()
            self._end_all(exc)
            return
        finally:
            self._reconnecting = False
        self._mending.later()  # a group can break as soon as it is formed, again and again
        self._kv.first_step = self._group.next_step
        self._resuming = (recovery, list(self._kv.waiting))
        self._mended_s = time.perf_counter()
        recovery.replayed_tokens = tokens
        words = [recovery.change, f"computing {tokens} tokens again" if tokens else ""]
        words.append(f"sent {format_bytes(recovery.sent_bytes)}" if recovery.sent_bytes else "")
        known = advise(before)
        words += [line for line in advise(self._deployment) if line not in known][:1]
        detail = "; ".join(filter(None, words))
        self._report(Progress(RECONNECTED, recovery.peers, recovery.peers, "peers", detail))
        if not self._kv.waiting:
            self._losses = 0

    def _came_out(self, sequence: _Any) -> None:
        """A request has got something; if it was lost, that is made good."""
        self._losses = 0
        self._mending.reset()
        if self._resuming is None or sequence not in self._resuming[1]:
            return
        (recovery, sequences), self._resuming = self._resuming, None
        recovery.replaying_ms = (time.perf_counter() - self._mended_s) * 1e3
        for other in sequences:
            if other is sequence or not other.ended:
                _tell(other, Progress(RESUMED, 1, 1, "", recovery.explain()))

    def _report(self, report: Progress) -> None:
        sequences = self._sequences
        if not sequences and report.stage in (LOST, RECONNECTED):
            self._progress(report)
        for sequence in sequences:
            _tell(sequence, report)

    def _end_all(self, exc: Exception) -> None:
        """End all sequences; what follows begins afresh."""
        self._losses = 0
        for sequence in self._sequences:
            sequence.end(exc)
        self._kv.waiting.clear()


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
