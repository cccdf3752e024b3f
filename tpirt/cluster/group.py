"""The master's side of a tensor-parallel group: form it, run steps, close it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from tpirt.batch import DEFAULT_COLLECTIVE, Algorithm, Batch, Collective, CommDtype, Segment
from tpirt.cancellation import finish
from tpirt.cluster.collective_policy import CollectivePolicy, survey_links
from tpirt.cluster.rank import RankRuntime, frame_limit
from tpirt.cluster.roster import machines
from tpirt.cluster.tracing import RankTrace, Tracer
from tpirt.collectives.context import StepAborted, StepContext
from tpirt.collectives.links import LinkSet
from tpirt.errors import DamagedSliceError, PeerLostError, RequestError, TpirtError, TransportError
from tpirt.model.kv_store import KVNeed
from tpirt.ops.buffers import tensor_bytes
from tpirt.planning import Deployment
from tpirt.protocol.link import Incoming, Link, message_frame
from tpirt.protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    Done,
    DropSpilled,
    Failure,
    FreeSlot,
    Leaving,
    Loading,
    Ready,
    RestoreSlot,
    Setup,
    SpillSlot,
    StatsRequest,
)
from tpirt.protocol.tensors import dtype_number
from tpirt.stopwatch import SAMPLE
from tpirt.transport.base import PeerClient
from tpirt.transport.frame import Kind
from tpirt.types import Progress, ProgressCallback, RankStats
from tpirt.weights.manifest import Manifest
from tpirt.weights.store import SliceStore, StoredSlice

_HINT_S = 0.5  # after a worker's report of a lost link: our own link may show it, too


class Group:
    """Runs steps on all ranks; this process is rank 0. A :class:`tpirt.protocol.link.Handler`.

    Steps run one at a time. All other methods may be called concurrently at any time.

    If a peer is lost or sends an invalid message, the group is broken: workers are released and
    every further call raises the same error. :meth:`logits` needs no worker, and does so only once
    the group is closed. A group is not repaired: close it and form another one.
    """

    def __init__(
        self,
        clients: Sequence[PeerClient],
        master: int,
        timeout_s: float,
        progress: ProgressCallback,
        on_broken: Callable[[], None],
    ):
        """Use the clients, whose owner closes them; :meth:`form` opens the sessions.

        ``master`` is the number by which workers recognise the master of an earlier group;
        ``on_broken`` is called when the group breaks.
        """
        self._clients = clients
        self._master = master
        self._timeout_s = timeout_s
        self._progress = progress
        self._on_broken = on_broken
        self._session = secrets.randbits(63)
        self._links = LinkSet(0)
        self._runtime: RankRuntime | None = None
        self._policy: CollectivePolicy | None = None
        self._tracer: Tracer | None = None
        self._stepping = asyncio.Lock()
        self._current: StepContext | None = None
        self._last_step = 0
        self._draining: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._broken: TpirtError | None = None
        self._broken_s = 0.0
        self._closed = False

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self._clients) + 1

    @property
    def runtime(self) -> RankRuntime:
        """Rank 0's runtime, after :meth:`form`."""
        assert self._runtime is not None
        return self._runtime

    @property
    def broken(self) -> TpirtError | None:
        """Why the group is broken; None if it is not."""
        return self._broken

    @property
    def broken_s(self) -> float:
        """When it broke, by ``time.perf_counter``."""
        return self._broken_s

    @property
    def policy(self) -> CollectivePolicy | None:
        """Chooses the collectives; None for one rank."""
        return self._policy

    @property
    def next_step(self) -> int:
        """Number of the next step."""
        return self._last_step + 1

    async def form(
        self,
        deployment: Deployment,
        manifests: Sequence[Manifest],
        stored: StoredSlice,
        store: SliceStore,
    ) -> None:
        """Open the sessions, load the weights on all ranks in parallel, measure the links.

        Args:
            deployment: the plan.
            manifests: of every rank's slice, which is in its store.
            stored: rank 0's slice.
            store: rank 0's store.

        Raises:
            MemoryLimitError: a rank's limit is too low; the message has a sufficient one.
            HandshakeError, PeerLostError, StoreError: a worker refused, is gone, or cannot read.

        If it fails or is cancelled, nothing is loading any more; open sessions are closed by
        :meth:`aclose`.
        """
        limits = deployment.limits
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._load(deployment, stored, store))
                readies = {
                    rank: tasks.create_task(self._open(rank, client, deployment, manifests[rank]))
                    for rank, client in enumerate(self._clients, start=1)
                }
        except BaseExceptionGroup as group:
            # A rank's own failure is more specific than the end of its session.
            told = [exc for exc in group.exceptions if not isinstance(exc, PeerLostError)]
            raise told[0] if told else self._broken or group.exceptions[0] from None
        if self._clients:
            states = {rank: task.result().links for rank, task in readies.items()}
            self._policy = CollectivePolicy(
                await survey_links(self._links, states, self._progress),
                machines(deployment.peers),
                deployment.collectives,
                deployment.collectives.comm_dtype_for(deployment.ranks[0].form.run_dtype),
                deployment.config.hidden_size,
            )
        if limits[0].trace_spans:
            self._tracer = Tracer([self._links[rank] for rank in sorted(self._links.others)])
            await self._tracer.read_clocks()

    async def step(
        self, hidden: torch.Tensor, segments: Sequence[Segment], prefill: bool
    ) -> torch.Tensor:
        """Run all layers on all ranks; see :meth:`tpirt.model.decoder.Decoder.forward`.

        If it fails or is cancelled, every rank aborts the step after its current block, and each
        sequence has the positions before its segment. The next step waits until every worker has
        left this one.

        Args:
            hidden: (T, H) float32 or bfloat16, the segments' rows in order; overwritten.
            segments: sequences and positions of the rows.
            prefill: whether some rows are a prompt's; for statistics.

        Returns:
            (N, H) float32, the wanted rows before the final norm.

        Raises:
            RequestError: the segments do not fit the limits, the KV stores or ``hidden``; no rank
                has begun.
            PeerLostError: a worker is gone or silent; the group is broken.
            TransportError: a worker sent an invalid message; the group is broken.
            TpirtError: a rank failed (disk, memory); the group is still usable.
        """
        async with self._stepping:
            await self._settled()
            batch = Batch(tuple(segments), prefill, self._collective(hidden.shape[0]))
            self._check(batch, hidden)
            self._last_step += 1
            step = self._current = StepContext(self._last_step, batch)
            try:
                return await finish(self._run(step, hidden), lambda: step.abort(StepAborted()))
            finally:
                self._current = None

    async def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the LM head to (T, H), on the master only; returns (T, V) float32.

        If cancelled, it ends after its current block.

        Raises:
            MemoryLimitError: the system refused memory.
            PeerLostError: the group was broken, and is closed.
            StoreError: a block cannot be read; if it is damaged, the group is broken.
        """
        async with self._stepping:
            if self._closed:
                self._check_alive()
            try:
                return await self.runtime.logits(hidden)
            except DamagedSliceError as exc:
                self._break_damaged(exc)
                raise

    def kv_need(self, segments: Sequence[Segment]) -> KVNeed:
        """What a step of these segments needs of every rank's KV store."""
        return self.runtime.decoder.kv.need(segments)

    def sampling(self, token: int) -> AbstractContextManager[None]:
        """Count the time in this ``with`` statement as compute for the answer's ``token``."""
        return self.runtime.decoder.clock.running(SAMPLE, number=token)

    async def free(self, slot: int) -> None:
        """Drop a sequence on every rank, between steps; its memory goes to the weights.

        If cancelled, some ranks may still hold it, until a segment begins at position 0.

        Raises:
            TpirtError: the group is broken.
        """
        async with self._stepping:
            await self._settled()
            told = [link.notify(FreeSlot(slot)) for link in self._all_links()]
            await asyncio.gather(self.runtime.free(slot), *told)

    async def spill(self, slot: int, handle: int, tokens: int) -> None:
        """Write so many of a sequence's positions to every rank's disk; drop it from memory.

        That is done between steps.

        If cancelled, some ranks may still be writing; the next step waits for them.

        Raises:
            TpirtError: a rank failed (disk) and has nothing on disk; or the group is broken.
        """
        request = SpillSlot(slot, handle, tokens)
        await self._on_all(lambda: self.runtime.spill(slot, handle, tokens), request)

    async def restore(self, slot: int, handle: int) -> None:
        """Read a spilled sequence into a slot on every rank, and delete it from disk.

        Raises:
            TpirtError: a rank failed (disk, memory), and its slot is empty; or the group is broken.
        """
        await self._on_all(lambda: self.runtime.restore(slot, handle), RestoreSlot(slot, handle))

    async def drop_spilled(self, handles: Sequence[int]) -> None:
        """Delete spilled sequences on every rank, where there are some.

        Raises:
            TpirtError: the group is broken.
        """
        request = DropSpilled(tuple(handles))
        await self._on_all(lambda: self.runtime.drop_spilled(handles), request)

    async def stats(self, since_step: int = 0) -> list[RankStats]:
        """Return the statistics of every rank since step ``since_step`` began; 0: since the start.

        Cancelled, the workers' answers are ignored when they come.

        Raises:
            PeerLostError: a worker is gone.
        """
        self._check_alive()
        try:
            replies = await asyncio.gather(
                *(link.request(StatsRequest(since_step)) for link in self._all_links())
            )
        except TpirtError:
            self._check_alive()  # the first error counts, not that of a link closed later
            raise
        ranks = [self.runtime.stats(since_step)]
        ranks[0].peer_id = "master"
        for reply, link in zip(replies, self._all_links(), strict=True):
            if not isinstance(reply.body, RankStats):
                raise _unexpected(link, "Stats", reply)
            reply.body.peer_id = link.peer_id
            ranks.append(reply.body)
        return ranks

    async def trace(self) -> AsyncIterator[RankTrace]:
        """Yield the trace of each rank, or the reason why it is missing."""
        if self._tracer is None:
            return
        await self.released()
        self.runtime.step_log.flush()
        async for trace in self._tracer.collect(self.runtime.recorder):
            yield trace

    async def released(self) -> None:
        """Wait until a broken group has fetched its traces and released the workers."""
        if self._closing is not None:
            await asyncio.wait({self._closing})

    async def aclose(self) -> None:
        """Release the workers for another master, and stop this rank.

        A running step is aborted. It and every later call raise RequestError. If cancelled, some
        links may stay open. Does nothing the second time.
        """
        if self._closed:
            return
        self._closed = True
        if self._broken is None:
            self._broken = engine_closed()
        if self._current is not None:
            self._current.abort(self._broken)
        await self._links.aclose()
        async with self._stepping:  # the step has ended
            tasks = [task for task in (self._draining, self._closing) if task is not None]
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._runtime is not None:
            await self._runtime.aclose()

    # -- the links' side -------------------------------------------------------------------

    def on_message(self, link: Link, incoming: Incoming) -> None:
        """See :class:`tpirt.protocol.link.Handler`."""
        match incoming.body:
            case Loading(done_bytes=done, total_bytes=total):
                detail = f"rank {link.rank}"
                self._progress(Progress("loading weights", done, total, detail=detail))
            case Failure() as failure:
                self._take_failure(link, failure)
            case Leaving():
                link.give_up(PeerLostError(f"peer {link.peer_id}: left: it was told to end"))
            case body:
                raise TransportError(
                    f"peer {link.peer_id}: {type(body).__name__} to a master; refused"
                )

    def on_lost(self, link: Link, exc: TpirtError) -> None:
        """See :class:`tpirt.protocol.link.Handler`."""
        self._break(exc)

    def _take_failure(self, link: Link, failure: Failure) -> None:
        """Abort the step that a rank failed in."""
        step = self._current
        if step is None or failure.step != step.number:
            return  # of an aborted step
        error = failure.error(link.peer_id)
        if isinstance(error, PeerLostError):
            if error.rank in self._links.others:
                lost = self._links[error.rank].peer_id
                words = f"peer {lost}: lost by {link.peer_id}: {failure.message}"
                error = PeerLostError(words, rank=error.rank, peer_id=lost)
            # Our own link to that rank shows soon if the rank is lost, or only a link.
            asyncio.get_running_loop().call_later(_HINT_S, step.abort, error)
        elif isinstance(error, DamagedSliceError):
            self._break(PeerLostError(str(error), rank=link.rank, peer_id=link.peer_id))
        else:
            step.abort(error)

    def _break(self, exc: TpirtError) -> None:
        if self._broken is not None:
            return
        self._broken = exc
        self._broken_s = time.perf_counter()
        if self._current is not None:
            self._current.abort(exc)
        self._closing = asyncio.get_running_loop().create_task(self._release())
        self._on_broken()

    async def _release(self) -> None:
        """Release the workers for another master, after fetching their traces."""
        if self._tracer is not None:
            await self._tracer.fetch()
        await self._links.aclose()

    def _check_alive(self) -> None:
        if self._broken is not None:
            raise self._broken

    # -- forming ---------------------------------------------------------------------------

    async def _load(self, deployment: Deployment, stored: StoredSlice, store: SliceStore) -> None:
        limits = deployment.limits[0]
        world_size = deployment.world_size
        runtime = await RankRuntime.open(
            deployment.config, stored, world_size, self._links, limits, store
        )
        self._runtime = runtime  # closed with the group, also if other ranks fail
        await runtime.load(self._progress)

    async def _open(
        self, rank: int, client: PeerClient, deployment: Deployment, manifest: Manifest
    ) -> Ready:
        """Open a worker's session and wait until its weights are loaded."""
        try:
            return await self._open_on(rank, client, deployment, manifest)
        except TpirtError as exc:
            exc.peer_id = exc.peer_id or client.peer_id
            raise

    async def _open_on(
        self, rank: int, client: PeerClient, deployment: Deployment, manifest: Manifest
    ) -> Ready:
        limits = deployment.limits[rank]
        linked = len(self._clients) > 1 and deployment.collectives.algorithm is not Algorithm.STAR
        channel = await client.open_session()
        link = Link(channel, rank, self._timeout_s, self, suspicious=True)
        link.channel.frame_limit = frame_limit(deployment.config, limits)
        link.start()
        self._links.add(link)
        reply = await link.request(
            Setup(
                protocol_version=PROTOCOL_VERSION,
                model_fingerprint=manifest.fingerprint,
                model_config=deployment.config.to_json(),
                slice_id=manifest.slice_id,
                rank=rank,
                world_size=deployment.world_size,
                window_blocks=limits.window_blocks,
                memory_bytes=limits.memory_bytes,
                chunk_tokens=limits.chunk_tokens,
                timeout_ms=max(1, int(self._timeout_s * 1e3)),
                trace_spans=limits.trace_spans,
                session=self._session,
                addresses=("", *(c.address for c in self._clients)) if linked else (),
                identities=("", *map(_identity, self._clients)) if linked else (),
                master=self._master,
                kv_bits=limits.kv_bits,
                host_name=deployment.peers[0].host_name,
            )
        )
        if not isinstance(reply.body, Ready):
            raise _unexpected(link, "Ready", reply)
        loaded = reply.body.resident_bytes
        self._progress(Progress("loading weights", loaded, loaded, detail=f"rank {rank}"))
        return reply.body

    # -- steps -----------------------------------------------------------------------------

    def _check(self, batch: Batch, hidden: torch.Tensor) -> None:
        """Refuse a step here that every worker would refuse, which would break the group."""
        expected = (batch.tokens, self.runtime.config.hidden_size)
        if hidden.shape != expected:
            raise RequestError(f"hidden states {tuple(hidden.shape)}: expected {expected}")
        try:
            self.runtime.validate(batch)
        except TransportError as exc:
            raise RequestError(str(exc)) from exc

    def _collective(self, tokens: int) -> Collective:
        return self._policy.for_step(tokens) if self._policy else DEFAULT_COLLECTIVE

    async def _settled(self) -> None:
        """Wait until every worker has left the last aborted step."""
        if self._draining is not None:
            await asyncio.shield(self._draining)
            self._draining = None
        self._check_alive()

    async def _run(self, step: StepContext, hidden: torch.Tensor) -> torch.Tensor:
        self.runtime.begin(step)
        try:
            await self._send_step(step, hidden)
            out = await self.runtime.run(hidden, step)
        except BaseException as exc:
            reason = exc if isinstance(exc, Exception) else StepAborted()
            step.abort(reason)
            if isinstance(exc, (PeerLostError, TransportError)):
                self._break(exc)
            elif isinstance(exc, DamagedSliceError):
                self._break_damaged(exc)
            self._draining = asyncio.get_running_loop().create_task(self._drain(step.number))
            raise
        assert out is not None
        took_s = self.runtime.comm.median_s()
        if self._policy is not None and took_s is not None:
            batch = step.batch
            self._policy.learn(batch.tokens, batch.collective.algorithm, took_s)
        return out

    def _break_damaged(self, exc: DamagedSliceError) -> None:
        """The master's slice is made again when another group is formed."""
        self._break(PeerLostError(str(exc), rank=0, peer_id="master"))

    async def _send_step(self, step: StepContext, hidden: torch.Tensor) -> None:
        """Send the step to all workers; rows of micro-batches are broadcast by the decoder."""
        if not self._clients:
            return
        payload = b"" if step.batch.collective.micro_batches else tensor_bytes(hidden)
        frame = message_frame(
            Kind.MESSAGE,
            step.batch,
            payload,
            step=step.number,
            dtype=dtype_number(CommDtype.keeping(hidden.dtype)),
            shape=(hidden.shape[0], hidden.shape[1]),
        )
        with self.runtime.comm.clock.running("send step", len(payload), step.number):
            await self._links.send(step, dict.fromkeys(self._links.others, frame))

    async def _drain(self, number: int) -> None:
        """Abort a step on every worker; links drop its tensors in flight."""
        requests = (link.request(Abort(number)) for link in self._all_links())
        for result in await asyncio.gather(*requests, return_exceptions=True):
            if isinstance(result, TpirtError):
                self._break(result)

    async def _on_all(self, own: Callable[[], Awaitable[None]], request: object) -> None:
        """Do something between steps on this rank, and by a request on all others; wait for all."""
        async with self._stepping:
            await self._settled()
            links = self._all_links()
            asked = (link.request(request) for link in links)
            results = await asyncio.gather(own(), *asked, return_exceptions=True)
            self._check_alive()  # the first error counts, not that of a link closed later
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            for link, reply in zip(links, results[1:], strict=True):
                assert isinstance(reply, Incoming)
                if not isinstance(reply.body, Done):
                    raise _unexpected(link, "Done", reply)

    def _all_links(self) -> list[Link]:
        return [self._links[rank] for rank in sorted(self._links.others)]


def engine_closed() -> RequestError:
    """The error of every call after the engine was closed."""
    return RequestError("the engine is closed")


def _unexpected(link: Link, expected: str, got: Incoming) -> TransportError:
    kind: Any = type(got.body).__name__
    return TransportError(f"peer {link.peer_id}: expected {expected}, got {kind}; refused")


def _identity(client: PeerClient) -> str:
    """Which device was met; empty where nothing is proved."""
    return client.certificate.subject.identity if client.certificate else ""
