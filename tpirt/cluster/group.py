"""The tensor-parallel group as its master sees it: workers found, equipped, driven, dismissed."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from tpirt.cluster.cancellation import finish, in_thread
from tpirt.cluster.machine import (
    available_bytes,
    has_bfloat16,
    host_id,
    int4_layout,
    resident_bytes,
)
from tpirt.cluster.rank import Limits, RankRuntime
from tpirt.cluster.slices import SliceMaker, send_slice, write_slice
from tpirt.collectives.base import Communicator, Solo, StepAborted
from tpirt.collectives.star import StarMaster, remote_error, send_all
from tpirt.errors import HandshakeError, PeerLostError, TransportError
from tpirt.ops.buffers import tensor_bytes
from tpirt.ops.quant_layout import PORTABLE_LAYOUT, Layout
from tpirt.parallel.partition import Plan, Shard
from tpirt.transport.base import Channel, PeerClient
from tpirt.transport.codec import PROTOCOL_VERSION, Frame
from tpirt.transport.pb import tpirt_pb2 as pb
from tpirt.types import Progress, ProgressCallback, RankStats
from tpirt.version import __version__
from tpirt.weights.store import SliceStore, StoredSlice

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
        self._runtime: RankRuntime | None = None
        self._step = 0
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

    async def distribute(
        self,
        makers: Sequence[SliceMaker],
        plan: Plan,
        store: SliceStore,
        progress: ProgressCallback,
    ) -> None:
        """See to it that every rank has its slice: rank 0 in ``store``, workers in theirs.

        ``makers[r]`` cuts rank ``r``'s, in the form that its CPU wants.

        Raises:
            CheckpointError, StoreError, PeerLostError: the slice could not be made or kept.
        """

        async def equip(rank: int) -> None:
            maker, shard = makers[rank], plan.shards[rank]
            if rank == 0:
                await _in_thread(write_slice, maker, shard, store, progress, rank)
                return
            client = self._clients[rank - 1]
            slice_id = maker.manifest(shard).slice_id
            if not (await _hello(client, slice_id)).has_slice:
                await send_slice(maker, shard, client, progress, rank, self._timeout_s)

        # One after another: they would only compete for the same disk.
        for rank in range(self.world_size):
            await equip(rank)

    async def start(
        self,
        makers: Sequence[SliceMaker],
        plan: Plan,
        store: SliceStore,
        limits: Sequence[Limits],
        progress: ProgressCallback,
    ) -> None:
        """Open the sessions and load the weights on all ranks side by side.

        Raises:
            MemoryLimitError: a rank's limit is too low; says how much is needed.
            HandshakeError, PeerLostError, StoreError: a worker refused, is gone, cannot read.
        """
        for rank, client in enumerate(self._clients, start=1):
            channel = await client.open_session()
            self._channels.append(channel)
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
            )
            await channel.send(Frame(pb.FrameHeader(setup=setup)))
        stored = store.find(makers[0].manifest(plan.shards[0]).slice_id)
        assert stored is not None
        self._runtime = RankRuntime(makers[0].config, stored, self._communicator(), limits[0])
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._runtime.load(progress))
                for rank, channel in enumerate(self._channels, start=1):
                    tasks.create_task(self._await_ready(rank, channel, progress))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def step(self, hidden: torch.Tensor, start: int, rope_length: int) -> torch.Tensor:
        """Run all layers on all ranks; see :meth:`tpirt.model.decoder.Decoder.forward`.

        A cancelled call gives the step up on every rank, after the block that is being computed;
        all caches are then as if it had not been.

        Args:
            hidden: (T, H) float32; overwritten.
            start: position of its first token; cached positions from there on are forgotten.
            rope_length: sequence length that dynamic rope scaling is computed for.

        Returns:
            (T, H) float32, before the final norm.

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
            return await finish(self._step_all(hidden, start, rope_length), give_up)
        finally:
            decoder.aborted = False

    async def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the LM head to (T, H); returns (T, V) float32. Master's own work only."""
        return await self.runtime.decoder.logits(hidden)

    async def stats(self, reset: bool = False) -> list[RankStats]:
        """Measurements of every rank since the last reset; see :class:`tpirt.types.RankStats`.

        Raises:
            PeerLostError: a worker is gone.
        """
        self._check_alive()
        mine = self.runtime.stats(reset)
        mine.peer_id = "master"
        mine.bytes_sent = sum(channel.bytes_sent for channel in self._channels)
        mine.bytes_received = sum(channel.bytes_received for channel in self._channels)
        others = await finish(self._stats_of_workers(reset))
        if reset:
            for channel in self._channels:
                channel.bytes_sent = channel.bytes_received = 0
        return [mine, *others]

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
        return StarMaster(self._channels, self._timeout_s)

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

    async def _step_all(self, hidden: torch.Tensor, start: int, rope_length: int) -> torch.Tensor:
        self._step += 1
        header = pb.Step(
            step=self._step, start=start, tokens=hidden.shape[0], rope_length=rope_length
        )
        try:
            with self._breaking():
                if self._channels:
                    frame = Frame(pb.FrameHeader(step=header), tensor_bytes(hidden))
                    await send_all(self._channels, frame, self._timeout_s)
                out = await self.runtime.step(self._step, hidden, start, rope_length)
        except BaseException:
            await self._abort()
            raise
        assert out is not None
        return out

    async def _abort(self) -> None:
        frame = Frame(pb.FrameHeader(abort=pb.Abort(step=self._step)))
        with contextlib.suppress(PeerLostError):  # the others have it all the same
            await send_all(self._channels, frame, self._timeout_s)

    async def _await_ready(self, rank: int, channel: Channel, progress: ProgressCallback) -> None:
        while True:
            frame = await channel.recv(self._timeout_s)
            match frame.kind:
                case "ready":
                    resident = frame.header.ready.resident_bytes
                    progress(Progress("loading weights", resident, resident, detail=f"rank {rank}"))
                    return
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
            await send_all(self._channels, request, self._timeout_s)
            return [await self._stats_from(channel) for channel in self._channels]

    async def _stats_from(self, channel: Channel) -> RankStats:
        while True:
            frame = await channel.recv(self._timeout_s)
            if frame.kind == "stats":
                values = {
                    field.name: getattr(frame.header.stats, field.name)
                    for field in pb.Stats.DESCRIPTOR.fields
                }
                return RankStats(peer_id=channel.peer_id, **values)
            if frame.kind not in ("partial", "error"):  # leftovers of a step given up
                raise TransportError(f"peer {channel.peer_id}: expected stats, got {frame.kind}")


async def _in_thread(
    write: Callable[[SliceMaker, Shard, SliceStore, ProgressCallback, int], StoredSlice],
    maker: SliceMaker,
    shard: Shard,
    store: SliceStore,
    progress: ProgressCallback,
    rank: int,
) -> StoredSlice:
    """Run ``write`` in a thread; cancelled, it has ended and left nothing when this raises."""
    cancelled = threading.Event()

    def report(step: Progress) -> None:
        if cancelled.is_set():
            raise StepAborted
        progress(step)

    return await in_thread(write, maker, shard, store, report, rank, on_cancel=cancelled.set)


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
