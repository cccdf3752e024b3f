"""A worker: waits for a master, stores its shard, serves its session, and waits again."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable

from tpirt.cluster.cancellation import finish, in_thread
from tpirt.cluster.machine import (
    available_bytes,
    base_bytes,
    has_bfloat16,
    host_id,
    int4_layout,
    machine_cores,
    resident_bytes,
)
from tpirt.cluster.rank import RankRuntime, frame_limit
from tpirt.cluster.session import Prepared, WorkerSession
from tpirt.cluster.tracing import TRACE_SPANS
from tpirt.cluster.worker_links import Connect, Switchboard, WorkerLinks
from tpirt.collectives.links import LinkSet
from tpirt.config import ModelConfig
from tpirt.errors import (
    HandshakeError,
    PeerLostError,
    StoreError,
    TpirtError,
    TransportError,
)
from tpirt.planning import Limits
from tpirt.protocol.link import Link
from tpirt.protocol.messages import (
    PROTOCOL_VERSION,
    HelloReply,
    HelloRequest,
    InventoryReply,
    InventoryRequest,
    PutUnitsReply,
    Setup,
    UnitChunk,
    decode_call,
    encode_call,
)
from tpirt.transport.base import Channel
from tpirt.units import format_bytes
from tpirt.version import __version__
from tpirt.weights.manifest import SliceOrder
from tpirt.weights.store import SliceStore
from tpirt.weights.writer import SliceWriter

Log = Callable[[str], None]

_GOODBYE_S = 1.0  # from a master's end until the news of it is here
_LEAVING_S = 20.0  # for a session whose master is gone to let go of threads and memory
_MOST_RANKS = 1024
_MOST_CHUNK_TOKENS = 1 << 16


class Worker:
    """See :class:`tpirt.transport.base.PeerService`.

    ``memory_bytes`` is the peer's own limit; a master may ask for less, never for more.
    ``connect`` opens links to other workers; without it, sums go through the master.
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
        self._session: WorkerSession | None = None
        self._free = asyncio.Condition()

    async def answer(self, method: str, request: bytes) -> bytes:
        """See :class:`tpirt.transport.base.PeerService`."""
        if method == "Hello":
            decode_call(HelloRequest, request, "caller")
            return encode_call(self._hello(busy=not await self._has_no_master()))
        if method == "Inventory":
            asked = decode_call(InventoryRequest, request, "caller")
            return encode_call(await in_thread(self._inventory, asked))
        raise TransportError(f"unknown method {method}")

    async def receive(self, method: str, chunks: AsyncIterator[bytes]) -> bytes:
        """See :class:`tpirt.transport.base.PeerService`."""
        if not await self._has_no_master():
            raise self._busy()
        first = decode_call(UnitChunk, await anext(aiter(chunks), b""), "caller")
        if not first.order:
            raise TransportError("an upload must begin with its order")
        order = await in_thread(SliceOrder.from_json, first.order)
        received = 0
        # Each call in a thread ends before the writer is left, also when the master goes away.
        with await in_thread(SliceWriter, self._store, order.spec, order.digests) as writer:
            async for data in chunks:
                chunk = decode_call(UnitChunk, data, "caller")
                await in_thread(_write_chunk, writer, chunk)
                received += len(chunk.data)
            stored = await in_thread(writer.commit)
        self._log(
            f"received slice {stored.manifest.slice_id} of {stored.manifest.model}: {stored.path} "
            f"({format_bytes(received)} of {format_bytes(stored.manifest.nbytes)} were missing)"
        )
        return encode_call(PutUnitsReply(received))

    async def session(self, channel: Channel) -> None:
        """See :class:`tpirt.transport.base.PeerService`."""
        session = WorkerSession(channel)
        try:
            await self._serve(session)
        except PeerLostError:
            pass  # the ordinary end: the master left
        except TpirtError as exc:
            self._log(f"session ended: {exc}")
            raise
        finally:
            await finish(self._leave(session))  # a call that ends cancels its handler

    async def link(self, channel: Channel) -> None:
        """See :class:`tpirt.transport.base.PeerService`."""
        await self._board.serve(channel)

    def _inventory(self, asked: InventoryRequest) -> InventoryReply:
        if asked.order:
            order = SliceOrder.from_json(asked.order)
            return InventoryReply(held=b"".join(self._store.inventory(order.spec, order.digests)))
        try:
            return InventoryReply(whole=self._store.find(asked.slice_id) is not None)
        except StoreError as exc:  # damaged: the master sends it again
            self._log(str(exc))
            return InventoryReply()

    async def _has_no_master(self) -> bool:
        """Whether a master may come. The end of the last one may still be on its way here."""
        return self._session is None or await self._session.leaving(_GOODBYE_S)

    def _busy(self) -> HandshakeError:
        assert self._session is not None
        return HandshakeError(f"it serves {self._session.link.peer_id} already")

    def _hello(self, busy: bool) -> HelloReply:
        return HelloReply(
            protocol_version=PROTOCOL_VERSION,
            tpirt_version=__version__,
            peer_id=self.peer_id,
            host_id=host_id(),
            memory_bytes=self._memory_bytes,
            available_bytes=available_bytes() + resident_bytes(),
            base_bytes=base_bytes(),
            threads=self._threads,
            cores=machine_cores(),
            bfloat16=has_bfloat16(),
            int4_layout=int4_layout().name,
            busy=busy,
        )

    async def _serve(self, session: WorkerSession) -> None:
        request = await session.setup()
        if request is None:
            return
        incoming, setup = request
        try:
            _check_setup(setup)
            await self._claim(session)
        except TpirtError as exc:
            await session.refuse(incoming, exc)
            raise
        self._log(f"serving {session.link.peer_id}")
        await session.serve(incoming, setup, self._prepare)

    async def _leave(self, session: WorkerSession) -> None:
        """Close a session; the next master may come."""
        await session.aclose()
        if self._session is session:
            async with self._free:
                self._session = None
                self._free.notify_all()
            self._log("waiting for a master")

    async def _claim(self, session: WorkerSession) -> None:
        """Make ``session`` the one that is served; wait for one whose master has left."""
        async with self._free:
            while self._session is not None:
                if not await self._has_no_master():
                    raise self._busy()
                try:
                    async with asyncio.timeout(_LEAVING_S):
                        await self._free.wait()
                except TimeoutError:
                    raise HandshakeError("it has not let go of its last master yet") from None
            self._session = session

    async def _prepare(self, setup: Setup, master: Link) -> Prepared:
        config = ModelConfig.from_json(setup.model_config)
        stored = self._store.find(setup.slice_id)
        if stored is None:
            raise StoreError(f"its store holds no slice {setup.slice_id}")
        if stored.manifest.spec.config != config:
            raise HandshakeError(
                f"its slice {setup.slice_id} is of another model than the master runs; remove "
                f"{stored.path}"
            )
        own, asked = self._memory_bytes, setup.memory_bytes
        limits = Limits(
            window_blocks=setup.window_blocks,
            memory_bytes=min(own, asked) if own and asked else own or asked,
            chunk_tokens=setup.chunk_tokens,
            trace_spans=min(setup.trace_spans, TRACE_SPANS),
        )
        limit = frame_limit(config, limits)
        links = LinkSet(setup.rank)
        links.add(master)
        runtime = await RankRuntime.open(config, stored, setup.world_size, links, limits)
        master.channel.frame_limit = limit
        workers = WorkerLinks(links, self._connect, self._board, setup.timeout_ms / 1e3, limit)
        return Prepared(runtime, links, workers)


def _check_setup(setup: Setup) -> None:
    if setup.protocol_version != PROTOCOL_VERSION:
        raise HandshakeError(
            f"it speaks protocol {PROTOCOL_VERSION}, the master {setup.protocol_version}; "
            "install the same tpirt on both"
        )
    if not (
        1 <= setup.rank < setup.world_size <= _MOST_RANKS
        and 1 <= setup.chunk_tokens <= _MOST_CHUNK_TOKENS
        and setup.timeout_ms
        and len(setup.addresses) in (0, setup.world_size)
    ):
        raise TransportError(
            f"invalid Setup message: rank {setup.rank} of {setup.world_size}, chunks of "
            f"{setup.chunk_tokens} tokens, timeout {setup.timeout_ms} ms, "
            f"{len(setup.addresses)} addresses"
        )


def _write_chunk(writer: SliceWriter, chunk: UnitChunk) -> None:
    if zlib.crc32(chunk.data) != chunk.crc32:
        raise TransportError(f"slice unit {chunk.unit} at {chunk.offset}: checksum mismatch")
    writer.write(chunk.unit, chunk.offset, chunk.data)
