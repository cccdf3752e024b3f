"""A worker: waits for a master, stores its shard, serves its session, and waits again."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TypeVar

from tpirt.cancellation import finish, in_thread
from tpirt.cluster.condition import Condition
from tpirt.cluster.machine import (
    available_bytes,
    base_bytes,
    has_bfloat16,
    host_id,
    machine_cores,
    release_free_memory,
    resident_bytes,
)
from tpirt.cluster.rank import RankRuntime, frame_limit
from tpirt.cluster.renewal import Renewal
from tpirt.cluster.session import Prepared, WorkerSession
from tpirt.cluster.tracing import TRACE_SPANS
from tpirt.cluster.uploads import Uploads
from tpirt.cluster.worker_links import Connect, Switchboard, WorkerLinks
from tpirt.collectives.links import LinkSet
from tpirt.config import ModelConfig
from tpirt.errors import (
    HandshakeError,
    PeerBusyError,
    PeerError,
    PeerLostError,
    StoreError,
    TpirtError,
    TransportError,
)
from tpirt.identity.trust import Trust
from tpirt.planning import KV_BITS, Limits
from tpirt.protocol.link import Link
from tpirt.protocol.messages import (
    PROTOCOL_VERSION,
    HelloReply,
    HelloRequest,
    InventoryReply,
    InventoryRequest,
    PutUnitsReply,
    RenewRequest,
    Setup,
    decode_call,
    encode_call,
)
from tpirt.transport.backlog import Backlog
from tpirt.transport.base import Channel
from tpirt.version import __version__
from tpirt.weights.manifest import SliceOrder
from tpirt.weights.store import SliceStore

Log = Callable[[str], None]
_T = TypeVar("_T")

_GOODBYE_S = 1.0  # from a master's end until the news of it is here
_LEAVING_S = 20.0  # for a session whose master is gone to let go of threads and memory
_MOST_SILENT = 16  # sessions that have not said yet what they want
_MOST_WAITING = 8  # masters whose Setup is valid, until the session before theirs has ended
_MOST_QUESTIONS = 8  # about the store, each of up to 4 MiB
_QUESTIONS_AT_ONCE = 2
_UNUSED_S = 900.0  # without a step, after which a session gives way to another master
_MOST_NAME = 64  # characters
_TIMEOUT_MS = range(10, 86_400_001)


class Worker:
    """See :class:`tpirt.transport.base.PeerService`.

    ``memory_bytes`` is the peer's own limit; a master may ask for less, never for more.
    ``connect`` opens links to other workers; without it, sums go through the master. ``trust`` is
    what the peer proves; a master can replace its certificate.
    """

    def __init__(
        self,
        host_name: str,
        store: SliceStore,
        memory_bytes: int | None,
        threads: int,
        log: Log,
        connect: Connect | None = None,
        trust: Trust | None = None,
    ):
        self._host_name = host_name
        self._process = secrets.randbits(64)
        self._store = store
        self._condition = Condition(store)
        self._memory_bytes = memory_bytes
        self._threads = threads
        self._log = log
        self._connect = connect
        self._renewal = Renewal(trust) if trust is not None else None
        self._board = Switchboard()
        self._session: WorkerSession | None = None
        self._waiting = 0  # masters whose session begins when this one has ended
        self._uploads = Uploads(store, memory_bytes, log)
        self._silent = Backlog(_MOST_SILENT)
        self._asking = 0
        self._questions = asyncio.Semaphore(_QUESTIONS_AT_ONCE)

    async def answer(self, method: str, request: bytes) -> bytes:
        """See :class:`tpirt.transport.base.PeerService`."""
        if method == "Hello":
            asked = decode_call(HelloRequest, request, "caller")
            return encode_call(self._hello(busy=not await self._is_free_for(asked.master)))
        if method == "Inventory":
            return encode_call(await self._asked(partial(self._inventory, request)))
        if method == "Renew" and self._renewal is not None:
            asked_for = decode_call(RenewRequest, request, "caller")
            return encode_call(await in_thread(self._renewal.answer, asked_for))
        if method == "Status":
            return encode_call(await self._asked(lambda: in_thread(self._condition.report)))
        raise TransportError(f"unknown method {method}")

    async def receive(self, method: str, chunks: AsyncIterator[bytes]) -> bytes:
        """See :class:`tpirt.transport.base.PeerService`."""
        received = await self._uploads.receive(chunks)
        release_free_memory()  # of the messages: it counts towards the next session's limit
        return encode_call(PutUnitsReply(received))

    async def session(self, channel: Channel) -> None:
        """See :class:`tpirt.transport.base.PeerService`."""
        session = WorkerSession(channel)
        try:
            await self._serve(session)
        except TpirtError as exc:
            if type(exc) is PeerLostError:
                return  # the ordinary end: the master left
            self._condition.failed(exc)
            self._log(f"session ended: {exc}")
            raise
        finally:
            # The call's own end may cancel this task in the middle of it.
            await finish(self._leave(session))

    async def leave(self) -> None:
        """Tell the master, if there is one, that this process is about to end."""
        if self._session is not None:
            await self._session.say_leaving()

    async def link(self, channel: Channel) -> None:
        """See :class:`tpirt.transport.base.PeerService`."""
        await self._board.serve(channel)

    async def _leave(self, session: WorkerSession) -> None:
        """End a session, and let the next one in."""
        try:
            await session.aclose()
        finally:
            if self._session is session:
                self._session = None
                session.left.set()
                self._log("waiting for a master")

    async def _asked(self, answer: Callable[[], Awaitable[_T]]) -> _T:
        """Answer a question about the store; a few at a time, for each takes memory."""
        if self._asking >= _MOST_QUESTIONS:
            raise PeerError("it has too many questions to answer; try again later")
        self._asking += 1
        try:
            async with self._questions:
                return await answer()
        finally:
            self._asking -= 1

    async def _inventory(self, request: bytes) -> InventoryReply:
        asked = decode_call(InventoryRequest, request, "caller")
        if not asked.order:
            return await in_thread(self._whole, asked.slice_id)
        order = await in_thread(SliceOrder.from_json, asked.order)
        await self._uploads.end_silent(order.spec.key)
        return await in_thread(self._held, order)

    def _held(self, order: SliceOrder) -> InventoryReply:
        held = self._store.inventory(order.spec, order.digests)
        # An upload that is refused midway may not hear why: gRPC reports its failed write.
        self._store.check_room(order.spec, held)
        return InventoryReply(held=b"".join(held))

    def _whole(self, slice_id: str) -> InventoryReply:
        try:
            return InventoryReply(whole=self._store.find(slice_id) is not None)
        except StoreError as exc:  # damaged: the master sends it again
            self._log(str(exc))
            return InventoryReply()

    async def _is_free_for(self, master: int) -> bool:
        """Whether a master may come. The end of the last one may still be on its way here.

        A master that comes back has lost its session, even if nothing of that has been heard here.
        """
        session = self._session
        if session is None or session.unused_s > _UNUSED_S or session.is_of(master):
            return True
        return await session.leaving(_GOODBYE_S)

    def _hello(self, busy: bool) -> HelloReply:
        session = self._session if busy else None
        return HelloReply(
            protocol_version=PROTOCOL_VERSION,
            tpirt_version=__version__,
            host_name=self._host_name,
            host_id=host_id(),
            memory_bytes=self._memory_bytes,
            available_bytes=available_bytes() + resident_bytes(),
            base_bytes=base_bytes(),
            threads=self._threads,
            cores=machine_cores(),
            bfloat16=has_bfloat16(),
            busy=busy,
            process=self._process,
            busy_with=session.host_name if session else "",
            busy_s=int(session.age_s) if session else 0,
        )

    async def _serve(self, session: WorkerSession) -> None:
        request = await self._silent.wait(session.link.peer_id, session.setup())
        if request is None:
            return
        incoming, setup = request
        try:
            _check_setup(setup)
            await self._claim(session, setup)
        except TpirtError as exc:
            await session.refuse(incoming, exc)
            raise
        self._log(f"serving {session.link.peer_id}")
        await session.serve(incoming, setup, self._prepare)

    async def _claim(self, session: WorkerSession, setup: Setup) -> None:
        """Make ``session`` the one that is served; wait for one whose master has left."""
        master = setup.master
        while (current := self._session) is not None:
            if not await self._is_free_for(master):
                raise PeerBusyError(f"it serves {current.link.peer_id} already")
            if self._waiting >= _MOST_WAITING:
                raise HandshakeError("other masters wait for it already; try again later")
            current.give_way(master)
            self._waiting += 1
            try:
                async with asyncio.timeout(_LEAVING_S):
                    await current.left.wait()
            except TimeoutError:
                raise HandshakeError("it has not let go of its last master yet") from None
            finally:
                self._waiting -= 1
        self._session = session
        session.master = master
        session.host_name = setup.host_name[:_MOST_NAME]

    async def _prepare(self, setup: Setup, master: Link) -> Prepared:
        config = ModelConfig.from_json(setup.model_config)
        _check_fits(setup, config)
        stored = await in_thread(self._store.find, setup.slice_id)
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
            kv_bits=setup.kv_bits,
        )
        limit = frame_limit(config, limits)
        links = LinkSet(setup.rank)
        links.add(master)
        workers = WorkerLinks(links, self._connect, self._board, setup.timeout_ms / 1e3, limit)
        # Links first: all workers are at this point, and how long a runtime takes differs.
        workers.form(setup.session, setup.addresses, setup.identities)
        try:
            runtime = await RankRuntime.open(
                config, stored, setup.world_size, links, limits, self._store
            )
        except BaseException:
            await finish(workers.aclose())
            raise
        master.channel.frame_limit = limit
        return Prepared(runtime, links, workers)


def _check_setup(setup: Setup) -> None:
    if setup.protocol_version != PROTOCOL_VERSION:
        older = "peer" if setup.protocol_version > PROTOCOL_VERSION else "master"
        raise HandshakeError(
            f"it runs tpirt {__version__} (protocol {PROTOCOL_VERSION}), the master speaks "
            f"protocol {setup.protocol_version}; update tpirt on the {older}"
        )
    if not (
        1 <= setup.rank < setup.world_size
        and setup.chunk_tokens
        and setup.timeout_ms in _TIMEOUT_MS
        and len(setup.addresses) in (0, setup.world_size)
        and len(setup.identities) in (0, len(setup.addresses))
    ):
        raise TransportError(
            f"invalid Setup message: rank {setup.rank} of {setup.world_size}, chunks of "
            f"{setup.chunk_tokens} tokens, timeout {setup.timeout_ms} ms, "
            f"{len(setup.addresses)} addresses, {len(setup.identities)} identities"
        )
    if setup.kv_bits not in KV_BITS.values():
        raise TransportError(f"invalid Setup message: a KV cache of {setup.kv_bits} bits")


def _check_fits(setup: Setup, config: ModelConfig) -> None:
    """Bound what follows from a Setup, frames and links, by what its model allows."""
    ranks, tokens = config.num_attention_heads, config.context_length
    if setup.world_size > ranks or setup.chunk_tokens > tokens:
        raise TransportError(
            f"invalid Setup message: {setup.world_size} ranks, chunks of {setup.chunk_tokens} "
            f"tokens; the model has {ranks} heads and a context of {tokens} tokens"
        )
