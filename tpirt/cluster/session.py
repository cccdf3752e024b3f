"""One master's session on a worker, from Setup until the master leaves.

The link's callbacks answer immediate requests (statistics, clocks, traces) and mark steps as
aborted; all other messages are queued and handled one at a time. An Abort is answered when nothing
of its step is running on this rank.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import torch

from tpirt.batch import Batch
from tpirt.cluster.probing import measure
from tpirt.cluster.rank import RankRuntime
from tpirt.cluster.tracing import answer_clock, answer_trace
from tpirt.cluster.worker_links import WorkerLinks
from tpirt.collectives.context import StepAborted, StepContext
from tpirt.collectives.links import LinkSet
from tpirt.errors import PeerLostError, TpirtError, TransportError
from tpirt.protocol.link import Incoming, Link
from tpirt.protocol.messages import (
    Abort,
    ClockRequest,
    Done,
    DropSpilled,
    Failure,
    FreeSlot,
    Leaving,
    Loading,
    MeasureLink,
    Ready,
    RestoreSlot,
    Setup,
    SpillSlot,
    StatsRequest,
    StepEnded,
    TraceRequest,
)
from tpirt.protocol.tensors import decode, hidden_dtype
from tpirt.refusals import refused_memory
from tpirt.transport.base import Channel
from tpirt.types import Progress

_T = TypeVar("_T")

SETUP_S = 5.0  # for a caller to send Setup
_FAREWELL_S = 0.5
_REPORT_S = 0.25  # between two reports of a loading worker
_MOST_QUEUED = 64
_QUEUED_FRAMES = 2  # of the largest size: a master sends one step at a time


class Prepared:
    """The result of a valid Setup: a runtime, and links to the other workers."""

    def __init__(self, runtime: RankRuntime, links: LinkSet, workers: WorkerLinks):
        self.runtime = runtime
        self.links = links
        self.workers = workers

    async def aclose(self) -> None:
        """Close the links to other workers, stop the threads, release the memory."""
        await self.workers.aclose()
        await self.runtime.aclose()


Prepare = Callable[[Setup, Link], Awaitable[Prepared]]


class WorkerSession:
    """Serves one master over one channel; a :class:`tpirt.protocol.link.Handler`."""

    def __init__(self, channel: Channel):
        """Take over the channel; only small frames are accepted before a valid Setup."""
        self.link = Link(channel, 0, SETUP_S, self)
        self._queue: asyncio.Queue[Incoming | None] = asyncio.Queue()
        self.left = asyncio.Event()  # set by the worker after the session is cleaned up
        self.master = 0  # the master's number; 0 if it has none
        self.host_name = ""  # the master's
        self._began_s = _now_s()
        self._queued_bytes = 0
        self._idle_since_s: float | None = None  # None while it loads or a step runs
        self._prepared: Prepared | None = None
        self._current: StepContext | None = None
        self._last_step = 0
        self._aborted_step = 0
        self._lost: asyncio.Future[TpirtError] = asyncio.get_running_loop().create_future()

    @property
    def lost(self) -> bool:
        """Whether the session is over, except for cleaning up."""
        return self._lost.done()

    @property
    def unused_s(self) -> float:
        """Seconds since the last step ended; 0 while one runs or the weights are loaded."""
        return 0.0 if self._idle_since_s is None else _now_s() - self._idle_since_s

    @property
    def age_s(self) -> float:
        """Seconds since it began."""
        return _now_s() - self._began_s

    def is_of(self, master: int) -> bool:
        """Whether this is an earlier session of ``master``."""
        return master != 0 and master == self.master

    def give_way(self, master: int) -> None:
        """End the session, to make room for one of ``master``."""
        if self.is_of(master):
            self.link.give_up(PeerLostError(f"{self.link.peer_id} came back with a new session"))
        else:
            self.link.give_up(TransportError("the session was not used, and another master came"))

    async def say_leaving(self) -> None:
        """Tell the master that this process is about to end."""
        with contextlib.suppress(TpirtError, TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                await self.link.notify(Leaving())

    async def leaving(self, patience_s: float) -> bool:
        """Wait up to ``patience_s`` for the master to leave; returns :attr:`lost`."""
        await asyncio.wait({self._lost}, timeout=patience_s)
        return self.lost

    async def setup(self) -> tuple[Incoming, Setup] | None:
        """Wait for the session's first request; None on timeout.

        Raises:
            PeerLostError, TransportError: the caller left, or sent another message.
        """
        self.link.start()
        try:
            async with asyncio.timeout(SETUP_S):
                incoming = await self._next()
        except TimeoutError:
            return None
        if incoming is None:
            raise self._lost.result()
        if not isinstance(incoming.body, Setup):
            raise TransportError(
                f"peer {self.link.peer_id}: expected Setup, got {type(incoming.body).__name__}"
            )
        return incoming, incoming.body

    async def refuse(self, to: Incoming, exc: TpirtError) -> None:
        """Answer a request with a failure."""
        await self.link.respond(to, Failure.of(exc))

    async def serve(self, to: Incoming, setup: Setup, prepare: Prepare) -> None:
        """Load the rank and run steps until the master leaves.

        Raises:
            PeerLostError: the master left; the normal end.
            TpirtError: the session failed; the master was notified.
        """
        self.link.silence(setup.timeout_ms / 1e3)
        try:
            self._prepared = await prepare(setup, self.link)
            ready = await self._until_lost(self._load(self._prepared))
        except TpirtError as exc:
            if not self.lost:
                await self.refuse(to, exc)
            raise
        await self.link.respond(to, ready)
        self._idle_since_s = _now_s()
        while (incoming := await self._next()) is not None and not self.lost:
            # A step begun without a master would wait for other workers, which begin none.
            await self._serve(self._prepared, incoming)
        raise self._lost.result()

    async def aclose(self) -> None:
        """End the session at any time."""
        await self.link.aclose()
        if not self.lost:
            self._lost.set_result(TransportError("the session has ended"))
        if self._prepared is not None:
            await self._prepared.aclose()

    # -- the link's side -------------------------------------------------------------------

    def on_message(self, link: Link, incoming: Incoming) -> None:
        """See :class:`tpirt.protocol.link.Handler`."""
        runtime = None if self._prepared is None else self._prepared.runtime
        match incoming.body:
            case StatsRequest(since_step=since) if runtime is not None:
                link.reply(incoming, runtime.stats(since))
            case ClockRequest():
                link.reply(incoming, answer_clock())
            case TraceRequest(lane=lane) if runtime is not None:
                runtime.step_log.flush()
                link.reply(incoming, *answer_trace(runtime.recorder, lane))
            case body:
                if isinstance(body, Abort):
                    self._abort(body.step)
                most_bytes = _QUEUED_FRAMES * link.channel.frame_limit
                self._queued_bytes += incoming.frame.nbytes
                if self._queue.qsize() >= _MOST_QUEUED or self._queued_bytes > most_bytes:
                    raise TransportError(f"peer {link.peer_id}: too many messages at once; refused")
                self._queue.put_nowait(incoming)

    def on_lost(self, link: Link, exc: TpirtError) -> None:
        """See :class:`tpirt.protocol.link.Handler`."""
        self._lost.set_result(exc)
        if self._current is not None:
            self._current.abort(exc)
        self._queue.put_nowait(None)

    def _abort(self, step: int) -> None:
        """Abort a step that is running or queued."""
        self._aborted_step = max(self._aborted_step, step)
        if self._current is not None and self._current.number == step:
            self._current.abort(StepAborted())

    # -- the queue -------------------------------------------------------------------------

    async def _next(self) -> Incoming | None:
        """The next queued message; None if the master is gone."""
        incoming = await self._queue.get()
        if incoming is not None:
            self._queued_bytes -= incoming.frame.nbytes
        return incoming

    async def _serve(self, prepared: Prepared, incoming: Incoming) -> None:
        match incoming.body:
            case Batch():
                await self._step(prepared, incoming)
            case Abort(step=number):
                if number > self._last_step:  # it never arrived
                    self._last_step = number
                    prepared.links.skip(number)
                await self.link.respond(incoming, StepEnded(number))
            case FreeSlot(slot=slot):
                await prepared.runtime.free(slot)
            case SpillSlot(slot=slot, handle=handle, tokens=tokens):
                await self._acknowledge(incoming, prepared.runtime.spill(slot, handle, tokens))
            case RestoreSlot(slot=slot, handle=handle):
                await self._acknowledge(incoming, prepared.runtime.restore(slot, handle))
            case DropSpilled(handles=handles):
                await self._acknowledge(incoming, prepared.runtime.drop_spilled(handles))
            case MeasureLink(rank=rank):
                await self._measure(prepared.links, incoming, rank)
            case body:
                raise TransportError(
                    f"peer {self.link.peer_id}: {type(body).__name__} between steps; refused"
                )

    async def _step(self, prepared: Prepared, incoming: Incoming) -> None:
        """Run one step; a failure of this rank is reported, and the session continues."""
        runtime = prepared.runtime
        number = incoming.frame.header.step
        if number <= self._last_step:
            raise TransportError(
                f"peer {self.link.peer_id}: expected a step after {self._last_step}, got {number}; "
                "refused"
            )
        self._last_step = number
        self._idle_since_s = None
        step = self._current = StepContext(number, incoming.body)
        if number <= self._aborted_step:
            step.abort(StepAborted())
        begun = False
        try:
            hidden = self._requested(runtime, incoming)
            runtime.begin(step)
            begun = True
            await runtime.run(hidden, step)
        except StepAborted:
            pass
        except TpirtError as exc:
            step.abort(exc)
            if not begun:  # its tensors from other ranks are dropped
                prepared.links.skip(number)
            if not self.lost:
                await self.link.notify(Failure.of(exc, number))
        finally:
            self._current = None
            self._idle_since_s = _now_s()

    def _requested(self, runtime: RankRuntime, incoming: Incoming) -> torch.Tensor:
        """Validate a step request; returns its hidden states.

        Raises:
            TransportError: it is invalid. What is wrong on another link says that link.
            MemoryLimitError: the system refused memory.
        """
        try:
            runtime.validate(incoming.body)
            with refused_memory(f"rank {runtime.comm.rank}"):
                return _hidden(incoming, incoming.body, runtime.config.hidden_size)
        except TransportError as exc:
            raise self.link.doubted(exc) from None

    async def _acknowledge(self, to: Incoming, work: Coroutine[Any, Any, None]) -> None:
        """Answer a request when its work is done, or has failed."""
        try:
            await work
        except TpirtError as exc:
            await self.refuse(to, exc)
        else:
            await self.link.respond(to, Done())

    async def _measure(self, links: LinkSet, to: Incoming, rank: int) -> None:
        if rank not in links.others:
            exc: TpirtError = TransportError(f"there is no link to rank {rank}")
            await self.refuse(to, exc)
            return
        try:
            quality = await measure(links[rank])
        except TpirtError as exc:
            await self.refuse(to, exc)
        else:
            await self.link.respond(to, quality)

    async def _load(self, prepared: Prepared) -> Ready:
        """Load the weights and report progress."""
        reporting = _Reports(self.link)
        runtime = prepared.runtime
        try:
            await runtime.load(reporting.remember)
        finally:
            reporting.stop()
        return Ready(runtime.weights_bytes, runtime.held_bytes, await prepared.workers.formed())

    async def _until_lost(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Await ``work``; cancel it if the master leaves first."""
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, self._lost}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise self._lost.result()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


class _Reports:
    """Reports the progress of loading to the master, a few times per second."""

    def __init__(self, link: Link):
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._next_s = 0.0

    def remember(self, progress: Progress) -> None:
        """A :data:`tpirt.types.ProgressCallback`, for the event loop only."""
        if self._loop.time() >= self._next_s:
            self._next_s = self._loop.time() + _REPORT_S
            self._link.tell(Loading(progress.done, progress.total))

    def stop(self) -> None:
        """Stop reporting."""
        self._next_s = float("inf")


def _hidden(incoming: Incoming, batch: Batch, hidden_size: int) -> torch.Tensor:
    """The step's hidden states (T, H); with micro-batches, an empty buffer."""
    shape = (batch.tokens, hidden_size)
    dtype = hidden_dtype(incoming.frame.header.dtype)
    if batch.collective.micro_batches:
        return torch.empty(shape, dtype=dtype.torch_dtype)
    return decode(incoming.frame.payload, dtype, shape)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
