"""A worker: waits for a master, takes its slice, runs steps, and waits again when it leaves."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable

from tpirt.cluster.cancellation import in_thread
from tpirt.cluster.machine import (
    available_bytes,
    has_bfloat16,
    host_id,
    int4_layout,
    machine_cores,
    resident_bytes,
)
from tpirt.cluster.probing import answer
from tpirt.cluster.rank import Limits, RankRuntime
from tpirt.cluster.stats import stats_message
from tpirt.cluster.tracing import TRACE_SPANS, send_clock, send_trace
from tpirt.cluster.worker_links import Connect, Switchboard, WorkerLinks
from tpirt.collectives.algorithms import GroupCommunicator
from tpirt.collectives.base import collective_of
from tpirt.collectives.context import StepAborted
from tpirt.collectives.links import LinkSet
from tpirt.config import ModelConfig
from tpirt.errors import (
    HandshakeError,
    PeerLostError,
    StoreError,
    TpirtError,
    TransportError,
)
from tpirt.transport.base import Channel
from tpirt.transport.codec import PROTOCOL_VERSION, Frame, empty_tensor, read_tensor
from tpirt.transport.pb import tpirt_pb2 as pb
from tpirt.types import Progress
from tpirt.units import format_bytes
from tpirt.version import __version__
from tpirt.weights.manifest import SliceOrder
from tpirt.weights.store import SliceStore
from tpirt.weights.writer import SliceWriter

Log = Callable[[str], None]

_LONGEST_SILENCE_S = 5.0  # a loading worker reports at least this often


class Worker:
    """See :class:`tpirt.transport.base.PeerService`.

    ``memory_bytes`` is the peer's own limit; a master may ask for less, never for more.
    ``connect`` makes the way to another worker; without it, sums go through the master.
    """

    def __init__(
        self,
        peer_id: str,
        store: SliceStore,
        memory_bytes: int | None,
        threads: int,
        log: Log,
        connect: Connect | None = None,
    ):
        self.peer_id = peer_id
        self._store = store
        self._memory_bytes = memory_bytes
        self._threads = threads
        self._log = log
        self._connect = connect
        self._board = Switchboard()
        self._master: str | None = None  # whom it serves now

    async def hello(self, request: pb.HelloRequest) -> pb.HelloReply:
        """See :class:`tpirt.transport.base.PeerService`."""
        return pb.HelloReply(
            protocol_version=PROTOCOL_VERSION,
            tpirt_version=__version__,
            peer_id=self.peer_id,
            host_id=host_id(),
            memory_bytes=self._memory_bytes or 0,
            available_bytes=available_bytes() + resident_bytes(),
            threads=self._threads,
            cores=machine_cores(),
            bfloat16=has_bfloat16(),
            busy=self._master is not None,
            int4_layout=int4_layout().name,
            has_slice=bool(request.slice_id) and await in_thread(self._holds, request.slice_id),
        )

    async def put_slice(self, chunks: AsyncIterator[pb.SliceChunk]) -> pb.PutSliceReply:
        """See :class:`tpirt.transport.base.PeerService`."""
        if self._master is not None:  # it may be reading these very files
            raise HandshakeError(f"it serves {self._master} already")
        first = await anext(aiter(chunks), None)
        if first is None or first.WhichOneof("body") != "manifest":
            raise TransportError("a slice must begin with its manifest")
        order = await in_thread(SliceOrder.from_json, first.manifest)
        if order.question:
            held = await in_thread(self._store.inventory, order.spec, order.digests)
            return pb.PutSliceReply(held=b"".join(held))
        received = 0
        # Each call in a thread ends before the writer is left, also when the master goes away.
        with await in_thread(SliceWriter, self._store, order.spec, order.digests) as writer:
            async for message in chunks:
                await in_thread(_write_chunk, writer, message.chunk)
                received += len(message.chunk.data)
            stored = await in_thread(writer.commit)
        self._log(
            f"received slice {stored.manifest.slice_id} of {stored.manifest.model}: {stored.path} "
            f"({format_bytes(received)} of {format_bytes(stored.manifest.nbytes)} were missing)"
        )
        return pb.PutSliceReply(bytes_written=received)

    async def session(self, channel: Channel) -> None:
        """See :class:`tpirt.transport.base.PeerService`."""
        if self._master is not None:
            await _report(channel, 0, HandshakeError(f"it serves {self._master} already"))
            return
        self._master = channel.peer_id
        self._log(f"serving {channel.peer_id}")
        try:
            await self._serve(channel)
        except PeerLostError:
            pass  # the ordinary end: the master left
        except TpirtError as exc:
            self._log(f"session ended: {exc}")
            raise
        finally:
            self._master = None
            self._log("waiting for a master")

    async def link(self, channel: Channel) -> None:
        """See :class:`tpirt.transport.base.PeerService`."""
        await self._board.serve(channel)

    async def _serve(self, channel: Channel) -> None:
        frame = await channel.recv(_LONGEST_SILENCE_S)
        try:
            setup = _checked_setup(frame)
            links = LinkSet(setup.rank, {0: channel}, setup.timeout_ms / 1e3)
            runtime = self._prepare(setup, links)
        except TpirtError as exc:
            await _report(channel, 0, exc)
            return
        mesh = WorkerLinks(links, self._connect, self._board)
        try:
            forming = asyncio.create_task(mesh.form(setup.session, setup.addresses))
            try:
                await _load(runtime, channel)
                await _send_ready(runtime, channel, await forming)
            finally:
                forming.cancel()
            await _serve_steps(runtime, channel, links, mesh)
        finally:
            await mesh.aclose()
            await runtime.aclose()

    def _prepare(self, setup: pb.Setup, links: LinkSet) -> RankRuntime:
        config = ModelConfig.from_json(setup.model_config)
        stored = self._store.find(setup.slice_id)
        if stored is None:
            raise StoreError(f"its store holds no slice {setup.slice_id}")
        if stored.manifest.spec.config != config:
            raise HandshakeError(
                f"its slice {setup.slice_id} is of another model than the master runs; remove "
                f"{stored.path}"
            )
        own, asked = self._memory_bytes, setup.memory_bytes or None
        limits = Limits(
            window_blocks=setup.window_blocks or None,
            memory_bytes=min(own, asked) if own and asked else own or asked,
            chunk_tokens=setup.chunk_tokens,
            timeout_s=setup.timeout_ms / 1e3,
            trace_spans=min(setup.trace_spans, TRACE_SPANS),
        )
        return RankRuntime(config, stored, GroupCommunicator(setup.world_size, links), limits)

    def _holds(self, slice_id: str) -> bool:
        try:
            return self._store.find(slice_id) is not None
        except StoreError as exc:  # damaged: have it sent anew
            self._log(str(exc))
            return False


async def serve_step(runtime: RankRuntime, channel: Channel, links: LinkSet, frame: Frame) -> None:
    """Run one step; a failure of this rank's own is reported and the session goes on.

    So is the loss of another worker: it is the master's to end the session.

    Raises:
        PeerLostError: the master left.
        TransportError: the master's messages make no sense; the session must end.
    """
    step = frame.header.step
    links.begin(step.step)
    try:
        shape = (step.tokens, runtime.decoder.config.hidden_size)
        runtime.check_step(step.start, step.tokens, step.rope_length, step.outputs)
        collective = collective_of(step)
        if collective.micro_batches:  # each comes by itself
            hidden = empty_tensor(step.dtype, shape)
        else:
            hidden = read_tensor(frame.payload, step.dtype, shape)
        runtime.begin(step.step, step.tokens, step.prefill, collective)
        await runtime.step(
            hidden, step.start, step.rope_length, step.outputs, collective.micro_batches
        )
    except StepAborted:
        pass
    except TransportError:
        raise
    except TpirtError as exc:
        if isinstance(exc, PeerLostError) and not exc.rank:
            raise
        await links.give_up()
        await _report(channel, step.step, exc)


async def _serve_steps(
    runtime: RankRuntime, channel: Channel, links: LinkSet, mesh: WorkerLinks
) -> None:
    last_step = 0
    while True:
        frame = await channel.recv()
        match frame.kind:
            case "step":
                if frame.header.step.step <= last_step:
                    raise TransportError(
                        f"expected a step after {last_step}, got {frame.header.step.step}; refused"
                    )
                last_step = frame.header.step.step
                await serve_step(runtime, channel, links, frame)
            case "stats_request":
                stats = runtime.stats(frame.header.stats_request.reset)
                stats.bytes_sent, stats.bytes_received = links.traffic
                if frame.header.stats_request.reset:
                    links.reset_traffic()
                await channel.send(Frame(pb.FrameHeader(stats=stats_message(stats))))
            case "clock_request":
                await send_clock(channel)
            case "trace_request":
                runtime.step_log.flush()
                await send_trace(channel, runtime.recorder)
            case "measure_links":
                states = pb.LinkStates(links=await mesh.measure())
                await channel.send(Frame(pb.FrameHeader(link_states=states)))
            case "probe":
                await answer(channel, frame)
            case "abort":
                pass  # the step was over here already
            case "partial" | "reduced" if links.is_leftover(frame):
                pass
            case kind:
                raise TransportError(f"{channel.peer_id}: {kind} between steps; refused")


async def _load(runtime: RankRuntime, channel: Channel) -> None:
    """Load, telling the master how far; its errors go to the master too."""
    done = Progress("", 0, runtime.window.weights_bytes)

    def remember(progress: Progress) -> None:
        nonlocal done
        done = progress

    loading = asyncio.ensure_future(runtime.load(remember))
    try:
        while not (await asyncio.wait({loading}, timeout=0.25))[0]:
            header = pb.FrameHeader(
                loading=pb.Loading(done_bytes=done.done, total_bytes=done.total)
            )
            await channel.send(Frame(header))
        await loading
    except TpirtError as exc:
        if not isinstance(exc, PeerLostError):
            await _report(channel, 0, exc)
        raise PeerLostError(f"{channel.peer_id}: loading failed") from exc
    finally:
        loading.cancel()


async def _send_ready(runtime: RankRuntime, channel: Channel, links: list[pb.LinkState]) -> None:
    window = runtime.window
    ready = pb.Ready(
        weights_bytes=window.weights_bytes, resident_bytes=window.held_bytes, links=links
    )
    await channel.send(Frame(pb.FrameHeader(ready=ready)))


def _checked_setup(frame: Frame) -> pb.Setup:
    if frame.kind != "setup":
        raise TransportError(f"a session must begin with its setup, got {frame.kind}")
    setup = frame.header.setup
    if setup.protocol_version != PROTOCOL_VERSION:
        raise HandshakeError(
            f"it speaks protocol {PROTOCOL_VERSION}, the master {setup.protocol_version}; "
            "install the same tpirt on both"
        )
    if (
        not 1 <= setup.rank < setup.world_size
        or not (setup.chunk_tokens and setup.timeout_ms)
        or len(setup.addresses) not in (0, setup.world_size)
    ):
        raise TransportError(
            f"a setup that makes no sense: rank {setup.rank} of {setup.world_size}, chunks of "
            f"{setup.chunk_tokens} tokens, timeout {setup.timeout_ms} ms"
        )
    return setup


def _write_chunk(writer: SliceWriter, chunk: pb.BlockChunk) -> None:
    if zlib.crc32(chunk.data) != chunk.crc32:
        raise TransportError(f"slice unit {chunk.block} at {chunk.offset}: checksum mismatch")
    writer.write(chunk.block, chunk.offset, chunk.data)


async def _report(channel: Channel, step: int, exc: TpirtError) -> None:
    error = pb.Error(step=step, kind=type(exc).__name__, message=str(exc))
    await channel.send(Frame(pb.FrameHeader(error=error)))
