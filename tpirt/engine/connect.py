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
from pathlib import Path

import torch

from tpirt.cancellation import finish
from tpirt.cluster.connection import Connection
from tpirt.cluster.launcher import LocalPeers
from tpirt.cluster.machine import default_threads, share_one_arena
from tpirt.cluster.renewal import keep_up
from tpirt.cluster.roster import profile_peers
from tpirt.cluster.slice_maker import SliceMaker
from tpirt.cluster.tracing import TRACE_SPANS
from tpirt.engine.model import Model, open_model
from tpirt.engine.options import EngineOptions
from tpirt.engine.trace_file import TraceFile
from tpirt.errors import ConfigError
from tpirt.identity.names import MASTER
from tpirt.identity.trust import LOCAL, Trust
from tpirt.ops.native.library import load_async
from tpirt.planning import Deployment, plan
from tpirt.refusals import allow_open_files
from tpirt.sharding.partition import make_partition
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
    progress: ProgressCallback,
    on_plan: PlanCallback | None,
    reserved_bytes: int = 0,
) -> AsyncIterator[tuple[Model, Connection, Deployment]]:
    """Connect as :meth:`tpirt.Engine.connect` does, which has the arguments and errors.

    ``reserved_bytes`` is what this process holds already, and counts towards its limit.
    """
    _check_ranks(local, peers)
    allow_open_files(_OPEN_FILES + _OPEN_FILES_PER_RANK * max(local, len(peers)))
    async with _prepared(path, options, local, progress) as host:
        # Before processes are started that could not be used.
        make_partition(host.model.config, len(peers) + 1 if peers else local, options.ratio)
        async with (
            _clients(host, local, peers) as clients,
            _formed(host, clients, on_plan, reserved_bytes) as (connection, deployment),
        ):
            yield host.model, connection, deployment


def _check_ranks(local: int, peers: Sequence[str | PeerClient]) -> None:
    if local < 1:
        raise ConfigError(f"local {local}: expected at least 1 rank")
    if peers and local != 1:
        raise ConfigError("local and peers exclude each other: give one of them")


def trace_file(options: EngineOptions) -> AbstractContextManager[TraceFile | None]:
    """The trace that was asked for; None if there was none."""
    return nullcontext() if options.trace is None else TraceFile(Path(options.trace))


@dataclass(frozen=True)
class _Host:
    """What the phases of connecting share: the opened model and how this process runs it."""

    model: Model
    options: EngineOptions
    store: SliceStore
    threads: int
    progress: ProgressCallback


@asynccontextmanager
async def _prepared(
    path: str | Path | None, options: EngineOptions, local: int, progress: ProgressCallback
) -> AsyncIterator[_Host]:
    """Open the model and its store, and set this process's compute threads meanwhile."""
    share_one_arena()
    model = await asyncio.to_thread(open_model, path)
    threads = options.threads or default_threads(local)
    with model.checkpoint, _compute_threads(threads):
        await load_async()  # may compile kernels: before local peers need them
        root = Path(options.store or model.store or default_store())
        store = SliceStore(root, options.store_limit_bytes)
        yield _Host(model, options, store, threads, progress)


@asynccontextmanager
async def _clients(
    host: _Host, local: int, peers: Sequence[str | PeerClient]
) -> AsyncIterator[list[PeerClient]]:
    """Clients of the peers, or of ``local - 1`` worker processes that live as long as this.

    Those made here are closed here.
    """
    options = host.options
    async with AsyncExitStack() as stack:
        if local > 1:
            host.progress(Progress("starting peers", 0, local - 1, "peers"))
            started = LocalPeers(local - 1, host.threads, host.store)
            peers = (await stack.enter_async_context(started)).addresses
            host.progress(Progress("starting peers", local - 1, local - 1, "peers"))
        # Our own workers are on loopback, where nothing is proved.
        trust = LOCAL if local > 1 else Trust(MASTER, options.identity, insecure=options.insecure)
        clients: list[PeerClient] = []
        for peer in peers:
            if isinstance(peer, str):
                from tpirt.transport.grpc import GrpcPeerClient  # 8 MiB, not needed by one rank

                peer = GrpcPeerClient(peer, trust)
                stack.push_async_callback(peer.aclose)
            clients.append(peer)
        yield clients


@asynccontextmanager
async def _formed(
    host: _Host,
    clients: Sequence[PeerClient],
    on_plan: PlanCallback | None,
    reserved_bytes: int,
) -> AsyncIterator[tuple[Connection, Deployment]]:
    """Plan, provide every rank with its slice, and form the group, which is closed on leaving."""
    model, options = host.model, host.options
    master = secrets.randbits(63)
    profiles = await profile_peers(clients, host.threads, master)
    await keep_up(clients, Trust(MASTER, options.identity, insecure=options.insecure))
    profiles[0] = replace(profiles[0], reserved_bytes=reserved_bytes)
    spans = 0 if options.trace is None else TRACE_SPANS
    deployment = plan(model.config, profiles, options, trace_spans=spans)
    if on_plan is not None:
        on_plan(deployment)
    makers = [SliceMaker(model.checkpoint, model.config, r.form) for r in deployment.ranks]
    connection = Connection(clients, deployment, makers, host.store, master, options.timeout_s)
    await connection.form(host.progress)
    try:
        yield connection, deployment
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
