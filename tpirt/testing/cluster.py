"""A tensor-parallel group in one process: real workers and engine, channels in memory."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from tpirt.cluster.worker import Worker
from tpirt.engine import Engine, EngineOptions
from tpirt.engine.connect import PlanCallback
from tpirt.errors import PeerUnreachableError, TpirtError
from tpirt.identity.certificates import Certificate
from tpirt.transport.base import Channel, PeerService
from tpirt.transport.memory import memory_pair
from tpirt.types import ProgressCallback, ignore_progress
from tpirt.weights.store import SliceStore

# Gets a worker's rank and one end of its session; returns the channel to use instead.
ChannelHook = Callable[[int, Channel], Channel]

TIMEOUT_S = 20.0
_DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "threads": 1,
    "timeout_s": TIMEOUT_S,
    "draft": "none",  # so that a step is a token
}


def same_channel(_: int, channel: Channel) -> Channel:
    """A hook that changes nothing."""
    return channel


class MemoryPeerClient:
    """A :class:`tpirt.transport.base.PeerClient` of a service in this process.

    Frames pass through pipes of ``capacity`` bytes. A session runs as a task; a TpirtError closes
    its channel, as it ends the RPC of a real session. Other errors are bugs; :meth:`aclose` raises
    them.

    Attributes:
        session_errors: the TpirtErrors that ended sessions, oldest first.
    """

    def __init__(
        self,
        service: PeerService,
        rank: int = 1,
        *,
        capacity: int | None = None,
        master_side: ChannelHook = same_channel,
        worker_side: ChannelHook = same_channel,
    ):
        self.address = f"memory:{rank}"
        self.peer_id = self.address
        self.certificate: Certificate | None = None
        self.session_errors: list[TpirtError] = []
        self._service = service
        self._rank = rank
        self._capacity = capacity
        self._master_side = master_side
        self._worker_side = worker_side
        self._channels: list[Channel] = []
        self._sessions: list[asyncio.Task[None]] = []

    async def connect(self) -> None:
        """See :class:`tpirt.transport.base.PeerClient`."""

    async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        """See :class:`tpirt.transport.base.PeerClient`."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._service.answer(method, request)
        except TimeoutError:
            raise PeerUnreachableError(f"peer {self.peer_id}: no answer") from None

    async def upload(self, method: str, chunks: AsyncIterator[bytes], timeout_s: float) -> bytes:
        """See :class:`tpirt.transport.base.PeerClient`."""
        return await self._service.receive(method, chunks)

    async def open_session(self) -> Channel:
        """See :class:`tpirt.transport.base.PeerClient`."""
        mine, theirs = memory_pair(self.peer_id, "master", self._capacity)
        served = self._worker_side(self._rank, theirs)
        self._sessions.append(asyncio.create_task(self._serve(served, self._service.session)))
        channel = self._master_side(self._rank, mine)
        self._channels.append(channel)
        return channel

    async def open_link(self) -> Channel:
        """See :class:`tpirt.transport.base.PeerClient`."""
        mine, theirs = memory_pair(self.peer_id, "worker", self._capacity)
        self._sessions.append(asyncio.create_task(self._serve(theirs, self._service.link)))
        self._channels.append(mine)
        return mine

    async def aclose(self) -> None:
        """See :class:`tpirt.transport.base.PeerClient`; waits until the sessions have ended."""
        for channel in self._channels:
            await channel.aclose()
        self._channels.clear()
        sessions, self._sessions = self._sessions, []
        if not sessions:
            return
        _, late = await asyncio.wait(sessions, timeout=TIMEOUT_S)
        for session in late:
            session.cancel()
        results = await asyncio.gather(*sessions, return_exceptions=True)
        assert not late, f"the session of rank {self._rank} did not end"
        for result in results:
            if result is not None:
                raise result

    async def _serve(
        self, channel: Channel, serve: Callable[[Channel], Coroutine[Any, Any, None]]
    ) -> None:
        try:
            await serve(channel)
        except TpirtError as exc:
            self.session_errors.append(exc)
        finally:
            await channel.aclose()


@asynccontextmanager
async def memory_engine(
    path: Path,
    world_size: int = 1,
    *,
    progress: ProgressCallback = ignore_progress,
    on_plan: PlanCallback | None = None,
    capacity: int | None = None,
    master_side: ChannelHook = same_channel,
    worker_side: ChannelHook = same_channel,
    **options: Any,
) -> AsyncIterator[Engine]:
    """Load a model on ``world_size`` ranks in this process; see :meth:`Engine.connect`.

    Args:
        path: model directory.
        world_size: number of ranks.
        progress, on_plan: see :meth:`Engine.connect`.
        capacity: bytes that each direction of a channel buffers; by default unbounded.
        master_side: wraps the master's end of each worker's session, for example in a
            :class:`~tpirt.testing.faults.FaultyChannel`.
        worker_side: wraps the worker's end.
        options: of :class:`EngineOptions`. Defaults are float32, one thread, no guesses, and a
            temporary ``store`` for all ranks.
    """
    with ExitStack() as stack:
        if "store" not in options:
            options["store"] = stack.enter_context(tempfile.TemporaryDirectory())
        chosen = EngineOptions(**(_DEFAULTS | options))
        store = SliceStore(Path(options["store"]))
        workers: dict[str, Worker] = {}

        def connect(address: str) -> MemoryPeerClient:
            rank = int(address.partition(":")[2])
            return MemoryPeerClient(workers[address], rank, capacity=capacity)

        clients = []
        for rank in range(1, world_size):
            worker = Worker(f"rank{rank}", store, None, chosen.threads or 1, _log_nothing, connect)
            workers[f"memory:{rank}"] = worker
            clients.append(
                MemoryPeerClient(
                    worker,
                    rank,
                    capacity=capacity,
                    master_side=master_side,
                    worker_side=worker_side,
                )
            )
        async with Engine.connect(
            path, chosen, peers=clients, progress=progress, on_plan=on_plan
        ) as engine:
            yield engine


def _log_nothing(_: str) -> None:
    pass
