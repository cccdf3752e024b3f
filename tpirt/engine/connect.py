"""The phases of :meth:`tpirt.Engine.connect`: open the model, reach the peers, plan, load."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from tpirt.cancellation import finish
from tpirt.cluster.connection import Connection
from tpirt.cluster.discovery import client_of
from tpirt.cluster.launcher import LocalPeers
from tpirt.cluster.machine import default_threads, set_up_allocator
from tpirt.cluster.provision import Pace
from tpirt.cluster.renewal import keep_up
from tpirt.cluster.roster import this_peer
from tpirt.cluster.slice_maker import SliceMaker
from tpirt.cluster.tracing import TRACE_SPANS
from tpirt.engine.model import Model, open_model
from tpirt.engine.options import EngineOptions
from tpirt.engine.trace_file import TraceFile
from tpirt.errors import ConfigError
from tpirt.identity.names import MASTER
from tpirt.identity.trust import LOCAL, Trust
from tpirt.ops.native.library import load_async
from tpirt.planning import Deployment, PeerProfile
from tpirt.planning.lineup import next_deployment
from tpirt.refusals import allow_open_files
from tpirt.sharding.partition import make_partition
from tpirt.transport.address import Address, check_distinct
from tpirt.transport.base import PeerClient
from tpirt.types import Progress, ProgressCallback
from tpirt.weights.store import SliceStore, default_store

PlanCallback = Callable[[Deployment], None]

_OPEN_FILES, _OPEN_FILES_PER_RANK = 32, 5  # connections, pipes, weights; measured: 20 and 4


@asynccontextmanager
async def connected(
    path: str | Path | None,
    options: EngineOptions,
    local: int,
    peers: Sequence[str | PeerClient],
    spares: Sequence[str | PeerClient],
    progress: ProgressCallback,
    on_plan: PlanCallback | None,
    reserved_bytes: int = 0,
) -> AsyncIterator[tuple[Model, Connection]]:
    """Connect as :meth:`tpirt.Engine.connect` does, which has the arguments and errors.

    ``reserved_bytes`` is what this process holds already, and counts towards its limit.
    """
    _check_ranks(local, peers, spares)
    allow_open_files(_OPEN_FILES + _OPEN_FILES_PER_RANK * max(local, len(peers) + len(spares)))
    async with _prepared(path, options, local, progress) as host:
        # Before processes are started that could not be used.
        make_partition(host.model.config, len(peers) + 1 if peers else local, options.ratio)
        async with (
            _clients(host, local, peers) as clients,
            _clients(host, 1, spares) as others,
            _formed(host, clients, others, on_plan, reserved_bytes) as connection,
        ):
            yield host.model, connection


def _check_ranks(
    local: int, peers: Sequence[str | PeerClient], spares: Sequence[str | PeerClient]
) -> None:
    if local < 1:
        raise ConfigError(f"local {local}: expected at least 1 rank")
    if peers and local != 1:
        raise ConfigError("local and peers exclude each other: give one of them")
    if spares and not peers:
        raise ConfigError("spares take the places of peers: give peers, too")
    asked, others = _addresses(peers), _addresses(spares)
    check_distinct(asked)
    check_distinct(others)
    for spare in others:
        if spare in asked:
            raise ConfigError(f"spare {spare}: is one of the peers; give another one")


def _addresses(peers: Sequence[str | PeerClient]) -> list[str]:
    """Their addresses in full: ``pi`` and ``pi:50051`` are the same peer."""
    return [str(Address.parse(peer)) if isinstance(peer, str) else peer.peer_id for peer in peers]


def trace_file(options: EngineOptions) -> AbstractContextManager[TraceFile | None]:
    """The trace that was asked for; None if there was none."""
    return nullcontext() if options.trace is None else TraceFile(Path(options.trace))


@dataclass(frozen=True)
class _Host:
    """What the phases of connecting share: the opened model and how this process runs it."""

    model: Model
    options: EngineOptions
    trust: Trust
    store: SliceStore
    threads: int
    progress: ProgressCallback


@asynccontextmanager
async def _prepared(
    path: str | Path | None, options: EngineOptions, local: int, progress: ProgressCallback
) -> AsyncIterator[_Host]:
    """Open the model and its store, and set this process's compute threads meanwhile."""
    set_up_allocator()
    model = await asyncio.to_thread(open_model, path)
    threads = options.threads or default_threads(local)
    with model.checkpoint, _compute_threads(threads):
        await load_async(progress)  # may compile kernels: before local peers need them
        root = Path(options.store or model.store or default_store())
        store = SliceStore(root, options.store_limit_bytes)
        trust = Trust(MASTER, options.identity, insecure=options.insecure)
        yield _Host(model, options, trust, store, threads, progress)


@asynccontextmanager
async def _clients(
    host: _Host, local: int, peers: Sequence[str | PeerClient]
) -> AsyncIterator[list[PeerClient]]:
    """Clients of the peers, or of ``local - 1`` worker processes that live as long as this.

    Those made here are closed here.
    """
    async with AsyncExitStack() as stack:
        if local > 1:
            host.progress(Progress("starting peers", 0, local - 1, "peers"))
            started = LocalPeers(local - 1, host.threads, host.store)
            peers = (await stack.enter_async_context(started)).addresses
            host.progress(Progress("starting peers", local - 1, local - 1, "peers"))
        # Our own workers are on loopback, where nothing is proved.
        trust = LOCAL if local > 1 else host.trust
        clients: list[PeerClient] = []
        for peer in peers:
            if isinstance(peer, str):
                peer = await asyncio.to_thread(client_of, peer, trust)
                stack.push_async_callback(peer.aclose)
            clients.append(peer)
        yield clients


@asynccontextmanager
async def _formed(
    host: _Host,
    clients: Sequence[PeerClient],
    spares: Sequence[PeerClient],
    on_plan: PlanCallback | None,
    reserved_bytes: int,
) -> AsyncIterator[Connection]:
    """Plan, provide every rank with its slice, and form the group, which is closed on leaving."""
    model, options = host.model, host.options
    spans = 0 if options.trace is None else TRACE_SPANS

    def this_rank() -> PeerProfile:
        return replace(this_peer(host.threads), reserved_bytes=reserved_bytes)

    connection = Connection(
        clients,
        spares,
        partial(next_deployment, model.config, options, trace_spans=spans),
        partial(SliceMaker, model.checkpoint, model.config),
        this_rank,
        host.store,
        secrets.randbits(63),
        options.timeout_s,
        Pace(options.upload_bytes_per_s),
    )
    connection.on_formed = partial(keep_up, host.trust)
    if on_plan is not None:
        connection.on_plan = on_plan
    await connection.form(host.progress)
    try:
        yield connection
    finally:
        await finish(connection.aclose())


@contextmanager
def _compute_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
