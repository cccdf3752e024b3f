"""Ranks in one process: link sets over channels of any transport."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
)
from unittest.mock import patch

from tpirt.batch import DEFAULT_COLLECTIVE, Batch, Collective, Segment
from tpirt.collectives.algorithms import GroupCommunicator
from tpirt.collectives.context import StepContext
from tpirt.collectives.links import LinkSet
from tpirt.errors import TpirtError
from tpirt.protocol.link import Incoming, Link
from tpirt.transport import grpc, tickets
from tpirt.transport.base import Channel
from tpirt.transport.grpc import GrpcPeerClient, GrpcPeerServer
from tpirt.transport.memory import memory_pair
from tpirt.transport.tickets import TcpListener

OPEN_S = 60.0
Pair = Callable[[], AbstractAsyncContextManager[tuple[Channel, Channel]]]
Hook = Callable[[int, int, Channel], Channel]  # rank, other rank, its end of their channel


class Inbox:
    """A handler that keeps a link's messages."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Incoming] = asyncio.Queue()
        self.lost: asyncio.Future[TpirtError] = asyncio.get_running_loop().create_future()

    def on_message(self, link: Link, incoming: Incoming) -> None:
        """See :class:`tpirt.protocol.link.Handler`."""
        self.messages.put_nowait(incoming)

    def on_lost(self, link: Link, exc: TpirtError) -> None:
        """See :class:`tpirt.protocol.link.Handler`."""
        self.lost.set_result(exc)


class Rank:
    """One rank of a group of link sets."""

    def __init__(self, rank: int, world_size: int):
        self.rank = rank
        self.links = LinkSet(rank)
        self.comm = GroupCommunicator(world_size, self.links)

    def begin(
        self, number: int, collective: Collective = DEFAULT_COLLECTIVE, tokens: int = 2
    ) -> StepContext:
        """Begin a step of one segment."""
        batch = Batch((Segment(0, 0, tokens, tokens, tokens),), True, collective)
        step = StepContext(number, batch)
        self.links.begin(step)
        return step


@asynccontextmanager
async def in_memory(capacity: int | None = None) -> AsyncIterator[tuple[Channel, Channel]]:
    """A pair of channels over pipes of ``capacity`` bytes."""
    mine, theirs = memory_pair("worker", "master", capacity)
    yield mine, theirs
    await mine.aclose()
    await theirs.aclose()


class _Rendezvous:
    """A service that publishes its session's channel and keeps the session open."""

    def __init__(self) -> None:
        self.channel: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
        self.leave = asyncio.Event()

    async def answer(self, method: str, request: bytes) -> bytes:
        return request

    async def receive(self, method: str, chunks: AsyncIterator[bytes]) -> bytes:
        return b""

    async def session(self, channel: Channel) -> None:
        self.channel.set_result(channel)
        await self.leave.wait()

    link = session


@asynccontextmanager
async def over_sockets(carrier: str) -> AsyncIterator[tuple[Channel, Channel]]:
    """A session between a real client and a real server, carried by ``tcp`` or ``grpc``."""
    service = _Rendezvous()
    server = GrpcPeerServer(service)
    no_port = patch.object(TcpListener, "beside", lambda *_: None)
    with no_port if carrier == "grpc" else nullcontext():
        port = await server.start("127.0.0.1", 0)
    client = GrpcPeerClient(f"127.0.0.1:{port}")
    try:
        # On a busy machine a client that did not wait for the offer would stay on its call, and
        # the server would wait for it to speak: in vain, as the caller only wants both channels.
        with (
            patch.multiple(grpc, _OFFER_S=OPEN_S, _SPEAK_S=OPEN_S),
            patch.object(tickets, "_PATIENCE_S", OPEN_S),
        ):
            async with asyncio.timeout(OPEN_S):
                mine = await client.open_session()
                theirs = await service.channel
        assert mine.carrier.kind == theirs.carrier.kind == carrier, (mine.carrier, theirs.carrier)
        yield mine, theirs
    finally:
        service.leave.set()
        await client.aclose()
        await server.aclose()


@asynccontextmanager
async def linked_ranks(
    pair: Pair,
    world_size: int,
    *,
    timeout_s: float = 20.0,
    star: bool = False,
    hook: Hook = lambda _, __, channel: channel,
) -> AsyncIterator[Sequence[Rank]]:
    """Create ranks with links to each other, or with ``star`` to rank 0 only.

    Args:
        pair: creates two connected channels.
        world_size: number of ranks.
        timeout_s: longest silence.
        star: whether there are no links between workers.
        hook: wraps a rank's end of a channel.
    """
    async with AsyncExitStack() as stack:
        ranks = [Rank(rank, world_size) for rank in range(world_size)]
        for low, high in itertools.combinations(range(world_size), 2):
            if star and low:
                continue
            mine, theirs = await stack.enter_async_context(pair())
            for rank, other, channel in ((low, high, mine), (high, low, theirs)):
                link = Link(hook(rank, other, channel), other, timeout_s, Inbox())
                link.channel.frame_limit = 64 << 20
                link.start()
                ranks[rank].links.add(link)
        try:
            yield ranks
        finally:
            await asyncio.gather(*(rank.links.aclose() for rank in ranks))
