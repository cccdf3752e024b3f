"""The tensor-parallel group as its master sees it: workers found, equipped, driven, dismissed."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from tpirt.cluster.cancellation import finish, in_thread
from tpirt.cluster.machine import (
    available_bytes,
    has_bfloat16,
    host_id,
    int4_layout,
    machine_cores,
    resident_bytes,
)
from tpirt.cluster.rank import Limits, RankRuntime
from tpirt.cluster.slices import SliceMaker, send_slice, write_slice
from tpirt.cluster.stats import read_stats
from tpirt.cluster.sums import SumOptions, Sums, meet
from tpirt.cluster.tracing import RankTrace, Tracer
from tpirt.collectives.algorithms import Ranks
from tpirt.collectives.base import DEFAULT_COLLECTIVE, Algorithm, Communicator, Solo, StepAborted
from tpirt.collectives.choosing import Machine
from tpirt.collectives.links import Links, remote_error
from tpirt.collectives.wire import Wire
from tpirt.errors import HandshakeError, PeerLostError, TransportError
from tpirt.ops.buffers import tensor_bytes
from tpirt.ops.quant_layout import PORTABLE_LAYOUT, Layout
from tpirt.parallel.partition import Plan
from tpirt.stopwatch import SAMPLE
from tpirt.transport.base import Channel, PeerClient
from tpirt.transport.codec import PROTOCOL_VERSION, Frame
from tpirt.transport.pb import tpirt_pb2 as pb
from tpirt.types import Progress, ProgressCallback, RankStats
from tpirt.version import __version__
from tpirt.weights.store import SliceStore, StoredSlice

_T = TypeVar("_T")
_HELLO_TIMEOUT_S = 10.0
_SHARE_OF_FREE_MEMORY = 0.85


@dataclass(frozen=True)
class PeerInfo:
    """What one rank's peer said of itself when it was asked."""

    rank: int
    peer_id: str
    host_id: str
    memory_bytes: int | None
    available_bytes: int
    threads: int
    cores: int
    bfloat16: bool
    int4_layout: Layout


def this_peer(threads: int) -> PeerInfo:
    """Describe this process as rank 0."""
    return PeerInfo(
        rank=0,
        peer_id="master",
        host_id=host_id(),
        memory_bytes=None,
        available_bytes=available_bytes() + resident_bytes(),
        threads=threads,
        cores=machine_cores(),
        bfloat16=has_bfloat16(),
        int4_layout=int4_layout(),
    )


async def meet_peers(clients: Sequence[PeerClient], threads: int) -> list[PeerInfo]:
    """Ask every worker who it is; entry 0 is this process itself.

    Raises:
        PeerUnreachableError: nobody answers at an address.
        HandshakeError: a peer speaks another protocol version or serves another master.
    """
    replies = await asyncio.gather(*(_hello(client) for client in clients))
    others = [
        PeerInfo(
            rank,
            client.peer_id,
            reply.host_id,
            reply.memory_bytes or None,
            reply.available_bytes,
            reply.threads,
            reply.cores,
            reply.bfloat16,
            Layout.named(reply.int4_layout) or PORTABLE_LAYOUT,
        )
        for rank, (client, reply) in enumerate(zip(clients, replies, strict=True), start=1)
    ]
    return [this_peer(threads), *others]


def memory_limits(peers: Sequence[PeerInfo], asked: int | None) -> list[int]:
    """Decide each rank's memory limit: what was asked for, or a fair share of what is free.

    Ranks on one machine share its free memory; a tenth and a half stays for everything else.
    """
    limits = []
    for peer in peers:
        beside = sum(other.host_id == peer.host_id for other in peers)
        share = int(peer.available_bytes * _SHARE_OF_FREE_MEMORY / beside)
        limits.append(min(asked or share, peer.memory_bytes or asked or share))
    return limits


class Group:
    """Drives all ranks in step; this process is rank 0.

    After a peer is lost, or its messages made no sense, the group is broken: every further call
    raises the same error at once.
    """

    def __init__(self, clients: Sequence[PeerClient], timeout_s: float):
        self.world_size = len(clients) + 1
        self._clients = clients
        self._timeout_s = timeout_s
        self._channels: list[Channel] = []
        self._links = Links(0, {}, timeout_s)
        self._sums: Sums | None = None
        self._runtime: RankRuntime | None = None
        self._tracer: Tracer | None = None
        self._step = 0
        self._talking = False
        self._broken: PeerLostError | TransportError | None = None

    @property
    def runtime(self) -> RankRuntime:
        """Rank 0's own runtime; there after :meth:`start`."""
        assert self._runtime is not None
        return self._runtime

    @property
    def broken(self) -> PeerLostError | TransportError | None:
        """Why the group can do nothing any more; None while it can."""
        return self._broken

    @property
    def sums(self) -> Sums | None:
        """How the ranks' results are combined; None for one rank or before :meth:`start`."""
        return self._sums

    async def distribute(
        self,
        makers: Sequence[SliceMaker],
        plan: Plan,
        store: SliceStore,
        progress: ProgressCallback,
    ) -> None:
        """See to it that every rank has its slice: rank 0 in ``store``, workers in theirs.

        ``makers[r]`` makes rank ``r``'s, in the form that its CPU wants. What ``store`` has is
        sent as it is, the rest cut anew.

        Raises:
            CheckpointError, StoreError, PeerLostError: the slice could not be made or kept.
        """

        async def equip(rank: int) -> None:
            maker = makers[rank]
            if rank == 0:
                await _in_thread(write_slice, maker, plan, rank, store, progress)
                return
            client = self._clients[rank - 1]
            slice_id = maker.manifest(plan.shards[rank]).slice_id
            if not (await _hello(client, slice_id)).has_slice:
                await send_slice(maker, plan, rank, store, client, progress, self._timeout_s)

        # One after another: they would only compete for the same disk.
        for rank in range(self.world_size):
            await equip(rank)

    async def start(
        self,
        makers: Sequence[SliceMaker],
        plan: Plan,
        store: SliceStore,
        limits: Sequence[Limits],
        peers: Sequence[PeerInfo],
        options: SumOptions,
        progress: ProgressCallback,
    ) -> None:
        """Open the sessions, load the weights on all ranks side by side, measure the links.

        Raises:
            MemoryLimitError: a rank's limit is too low; says how much is needed.
            HandshakeError, PeerLostError, StoreError: a worker refused, is gone, cannot read.
        """
        session = secrets.randbits(63)
        linked = len(self._clients) > 1 and options.algorithm is not Algorithm.STAR
        addresses = ["", *(client.address for client in self._clients)] if linked else []
        for rank, client in enumerate(self._clients, start=1):
            channel = await client.open_session()
            self._channels.append(channel)
            self._links.add(rank, channel)
            maker = makers[rank]
            manifest = maker.manifest(plan.shards[rank])
            setup = pb.Setup(
                protocol_version=PROTOCOL_VERSION,
                model_fingerprint=manifest.fingerprint,
                model_config=maker.config.to_json(),
                slice_id=manifest.slice_id,
                rank=rank,
                world_size=self.world_size,
                window_blocks=limits[rank].window_blocks or 0,
                memory_bytes=limits[rank].memory_bytes or 0,
                chunk_tokens=limits[rank].chunk_tokens,
                timeout_ms=int(self._timeout_s * 1e3),
                trace_spans=limits[rank].trace_spans,
                session=session,
                addresses=addresses,
            )
            await channel.send(Frame(pb.FrameHeader(setup=setup)))
        stored = store.find(makers[0].manifest(plan.shards[0]).slice_id)
        assert stored is not None
        self._runtime = RankRuntime(makers[0].config, stored, self._communicator(), limits[0])
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._runtime.load(progress))
                readies = [
                    tasks.create_task(self._await_ready(rank, channel, progress))
                    for rank, channel in enumerate(self._channels, start=1)
                ]
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        if self._channels:
            form = makers[0].form
            self._sums = await meet(
                self._channels,
                [task.result().links for task in readies],
                _machines(peers),
                options,
                options.wire_for(form.dtype),
                makers[0].config.hidden_size,
                self._timeout_s,
            )
        if limits[0].trace_spans:
            self._tracer = Tracer(self._channels, self._timeout_s)
            await self._tracer.read_clocks()

    async def step(
        self, hidden: torch.Tensor, start: int, rope_length: int, outputs: int, prefill: bool
    ) -> torch.Tensor:
        """Run all layers on all ranks; see :meth:`tpirt.model.decoder.Decoder.forward`.

        A cancelled call gives the step up on every rank, after the block that is being computed;
        all caches are then as if it had not been.

        Args:
            hidden: (T, H), crosses the wire as it is: float32, or bfloat16 where that is what
                embeddings are stored in. Overwritten.
            start: position of its first token; cached positions from there on are forgotten.
            rope_length: sequence length that dynamic rope scaling is computed for.
            outputs: N, how many of the last tokens' results are wanted, at least 1.
            prefill: whether the tokens are a prompt's; for the statistics.

        Returns:
            (N, H) float32, before the final norm.

        Raises:
            PeerLostError: a worker is gone or silent; names it. The group is broken.
            TransportError: a worker's messages make no sense; refused. The group is broken.
            TpirtError: a rank failed by itself (disk, memory); the group lives on.
        """
        self._check_alive()
        decoder = self.runtime.decoder

        def give_up() -> None:
            decoder.aborted = True

        try:
            # Whole: cancelling a read of gRPC's would tear the stream down.
            work = self._step_all(hidden, start, rope_length, outputs, prefill)
            return await self._talk(work, give_up)
        finally:
            decoder.aborted = False

    async def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the LM head to (T, H); returns (T, V) float32. Master's own work only."""
        return await self.runtime.decoder.logits(hidden)

    def sampling(self, token: int) -> AbstractContextManager[None]:
        """Count what is done in this block as the master's compute, for the answer's ``token``."""
        return self.runtime.decoder.clock.running(SAMPLE, number=token)

    async def stats(self, reset: bool = False) -> list[RankStats]:
        """Measurements of every rank since the last reset; see :class:`tpirt.types.RankStats`.

        Raises:
            PeerLostError: a worker is gone.
        """
        self._check_alive()
        mine = self.runtime.stats(reset)
        mine.peer_id = "master"
        mine.bytes_sent, mine.bytes_received = self._links.traffic
        others = await self._talk(self._stats_of_workers(reset))
        if reset:
            self._links.reset_traffic()
        return [mine, *others]

    async def trace(self) -> AsyncIterator[RankTrace]:
        """Yield what each rank recorded, as far as it can still be had; nothing without a trace."""
        if self._tracer is None:
            return
        self.runtime.step_log.flush()
        async for trace in self._tracer.collect(self.runtime.recorder, self._talking):
            yield trace

    async def aclose(self) -> None:
        """Dismiss the workers; they wait for another master."""
        for channel in self._channels:
            await channel.aclose()
        if self._runtime is not None:
            await self._runtime.aclose()
        for client in self._clients:
            await client.aclose()

    def _communicator(self) -> Communicator:
        if not self._channels:
            return Solo()
        return Ranks(self.world_size, self._links)

    async def _talk(
        self, work: Coroutine[Any, Any, _T], on_cancel: Callable[[], None] | None = None
    ) -> _T:
        """Let ``work`` have the channels until it ends; see :func:`finish`."""
        self._talking = True
        try:
            return await finish(work, on_cancel)
        finally:
            self._talking = False

    def _check_alive(self) -> None:
        if self._broken is not None:
            raise self._broken

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """Remember an error after which ranks can no longer be in step."""
        try:
            yield
        except (PeerLostError, TransportError) as exc:
            self._broken = exc
            raise

    async def _step_all(
        self, hidden: torch.Tensor, start: int, rope_length: int, outputs: int, prefill: bool
    ) -> torch.Tensor:
        self._step += 1
        tokens = hidden.shape[0]
        collective = self._sums.for_step(tokens) if self._sums else DEFAULT_COLLECTIVE
        header = pb.Step(
            step=self._step,
            start=start,
            tokens=tokens,
            rope_length=rope_length,
            prefill=prefill,
            algorithm=collective.algorithm.number,
            wire=collective.wire.dtype,
            halves=collective.halves,
            outputs=outputs,
            dtype=Wire.keeping(hidden.dtype).dtype,
        )
        self.runtime.begin(self._step, tokens, prefill, collective)
        try:
            with self._breaking():
                if self._channels:
                    payload = b"" if collective.halves else tensor_bytes(hidden)
                    frame = Frame(pb.FrameHeader(step=header), payload)
                    with self.runtime.comm.clock.running("send step", len(payload), self._step):
                        await self._links.send(self._links.others, frame)
                out = await self.runtime.step(
                    hidden, start, rope_length, outputs, collective.halves
                )
        except BaseException:
            await self._abort()
            raise
        assert out is not None
        if self._sums is not None and (median_s := self.runtime.comm.median_s()) is not None:
            self._sums.learn(tokens, collective.algorithm, median_s)
        return out

    async def _abort(self) -> None:
        frame = Frame(pb.FrameHeader(abort=pb.Abort(step=self._step)))
        with contextlib.suppress(PeerLostError):  # the others have it all the same
            await self._links.send(self._links.others, frame)

    async def _await_ready(
        self, rank: int, channel: Channel, progress: ProgressCallback
    ) -> pb.Ready:
        while True:
            frame = await channel.recv(self._timeout_s)
            match frame.kind:
                case "ready":
                    resident = frame.header.ready.resident_bytes
                    progress(Progress("loading weights", resident, resident, detail=f"rank {rank}"))
                    return frame.header.ready
                case "loading":
                    loading = frame.header.loading
                    detail = f"rank {rank}"
                    progress(
                        Progress(
                            "loading weights",
                            loading.done_bytes,
                            loading.total_bytes,
                            detail=detail,
                        )
                    )
                case "error":
                    raise remote_error(frame.header.error, channel.peer_id)
                case kind:
                    raise TransportError(f"peer {channel.peer_id}: expected ready, got {kind}")

    async def _stats_of_workers(self, reset: bool) -> list[RankStats]:
        request = Frame(pb.FrameHeader(stats_request=pb.StatsRequest(reset=reset)))
        with self._breaking():
            await self._links.send(self._links.others, request)
            return [await self._stats_from(channel) for channel in self._channels]

    async def _stats_from(self, channel: Channel) -> RankStats:
        while True:
            frame = await channel.recv(self._timeout_s)
            if frame.kind == "stats":
                return read_stats(frame.header.stats, channel.peer_id)
            if frame.kind not in ("partial", "reduced", "error"):  # leftovers of a step given up
                raise TransportError(f"peer {channel.peer_id}: expected stats, got {frame.kind}")


def _machines(peers: Sequence[PeerInfo]) -> list[Machine]:
    """Who shares a machine's cores with whom."""
    found: dict[str, list[PeerInfo]] = {}
    for peer in peers:
        found.setdefault(peer.host_id, []).append(peer)
    return [
        Machine(tuple(peer.rank for peer in beside), max(1, beside[0].cores))
        for beside in found.values()
    ]


async def _in_thread(
    write: Callable[[SliceMaker, Plan, int, SliceStore, ProgressCallback], StoredSlice],
    maker: SliceMaker,
    plan: Plan,
    rank: int,
    store: SliceStore,
    progress: ProgressCallback,
) -> StoredSlice:
    """Run ``write`` in a thread; cancelled, it has ended and left nothing when this raises."""
    cancelled = threading.Event()

    def report(step: Progress) -> None:
        if cancelled.is_set():
            raise StepAborted
        progress(step)

    return await in_thread(write, maker, plan, rank, store, report, on_cancel=cancelled.set)


async def _hello(client: PeerClient, slice_id: str = "") -> pb.HelloReply:
    request = pb.HelloRequest(
        protocol_version=PROTOCOL_VERSION, tpirt_version=__version__, slice_id=slice_id
    )
    reply = await client.hello(request, _HELLO_TIMEOUT_S)
    client.peer_id = reply.peer_id or client.address
    if reply.protocol_version != PROTOCOL_VERSION:
        raise HandshakeError(
            f"peer {client.peer_id}: speaks protocol {reply.protocol_version} (tpirt "
            f"{reply.tpirt_version}), this is {PROTOCOL_VERSION} (tpirt {__version__}); "
            "install the same tpirt on both"
        )
    if reply.busy:
        raise HandshakeError(f"peer {client.peer_id}: serves another master now; try later")
    return reply
