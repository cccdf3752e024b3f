"""The tensor-parallel group as its master sees it: workers found, equipped, driven, dismissed."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from tpirt.batch import DEFAULT_COLLECTIVE, Algorithm, CommDtype
from tpirt.cluster.cancellation import finish
from tpirt.cluster.collective_policy import CollectiveOptions, CollectivePolicy, meet
from tpirt.cluster.rank import Limits, RankRuntime
from tpirt.cluster.roster import PeerProfile, machines
from tpirt.cluster.slice_maker import SliceMaker
from tpirt.cluster.stats import read_stats
from tpirt.cluster.tracing import RankTrace, Tracer
from tpirt.collectives.algorithms import GroupCommunicator
from tpirt.collectives.base import Communicator, SingleRankCommunicator, algorithm_number
from tpirt.collectives.comm_dtype import number_of
from tpirt.collectives.links import LinkSet, remote_error
from tpirt.errors import PeerLostError, TransportError
from tpirt.ops.buffers import tensor_bytes
from tpirt.sharding.partition import Plan
from tpirt.stopwatch import SAMPLE
from tpirt.transport.base import Channel, PeerClient
from tpirt.transport.codec import PROTOCOL_VERSION, Frame
from tpirt.transport.pb import tpirt_pb2 as pb
from tpirt.types import Progress, ProgressCallback, RankStats
from tpirt.weights.store import SliceStore

_T = TypeVar("_T")
_HELLO_TIMEOUT_S = 10.0
_SHARE_OF_FREE_MEMORY = 0.85


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
        self._links = LinkSet(0, {}, timeout_s)
        self._sums: CollectivePolicy | None = None
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
    def sums(self) -> CollectivePolicy | None:
        """How the ranks' results are combined; None for one rank or before :meth:`start`."""
        return self._sums

    async def start(
        self,
        makers: Sequence[SliceMaker],
        plan: Plan,
        store: SliceStore,
        limits: Sequence[Limits],
        peers: Sequence[PeerProfile],
        options: CollectiveOptions,
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
                machines(peers),
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
            return SingleRankCommunicator()
        return GroupCommunicator(self.world_size, self._links)

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
            algorithm=algorithm_number(collective.algorithm),
            comm_dtype=number_of(collective.comm_dtype),
            halves=collective.micro_batches,
            outputs=outputs,
            dtype=number_of(CommDtype.keeping(hidden.dtype)),
        )
        self.runtime.begin(self._step, tokens, prefill, collective)
        try:
            with self._breaking():
                if self._channels:
                    payload = b"" if collective.micro_batches else tensor_bytes(hidden)
                    frame = Frame(pb.FrameHeader(step=header), payload)
                    with self.runtime.comm.clock.running("send step", len(payload), self._step):
                        await self._links.send(self._links.others, frame)
                out = await self.runtime.step(
                    hidden, start, rope_length, outputs, collective.micro_batches
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
