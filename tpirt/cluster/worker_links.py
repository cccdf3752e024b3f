"""Links between the workers of a session: each worker opens one to every worker of a lower rank.

A link that cannot be had is not an error: the master is told, and sums go through the star.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from tpirt.collectives.links import LinkSet
from tpirt.errors import TpirtError, TransportError
from tpirt.protocol.link import Incoming, Link
from tpirt.protocol.messages import Joined, JoinLink, LinkState
from tpirt.transport.backlog import Backlog
from tpirt.transport.base import Channel, PeerClient

Connect = Callable[[str], PeerClient]

PATIENCE_S = 5.0  # for another worker to open its link, or to answer
_MOST_SILENT = 64  # links that have not said yet to which session they belong
_MOST_WAITING = 256  # links that no session has claimed yet

_Key = tuple[int, int]  # session, rank


class _Peer:
    """Handler of a link between workers: it carries tensors and probes, and one request to join."""

    def __init__(self) -> None:
        self.joined: asyncio.Future[Incoming] = asyncio.get_running_loop().create_future()
        self.left = asyncio.Event()

    def on_message(self, link: Link, incoming: Incoming) -> None:
        """See :class:`tpirt.protocol.link.Handler`."""
        if self.joined.done() or not isinstance(incoming.body, JoinLink) or not incoming.id:
            kind = type(incoming.body).__name__
            raise TransportError(f"peer {link.peer_id}: {kind} on a worker's link; refused")
        self.joined.set_result(incoming)

    def on_lost(self, link: Link, exc: TpirtError) -> None:
        """See :class:`tpirt.protocol.link.Handler`: whoever uses the link next raises it."""
        self.left.set()


class _Caller(_Peer):
    """A worker that opened a link to this one."""

    def __init__(self, channel: Channel):
        super().__init__()
        self.link = Link(channel, 0, PATIENCE_S, self)
        self.claimed = asyncio.get_running_loop().create_future()

    def on_lost(self, link: Link, exc: TpirtError) -> None:
        """See :class:`tpirt.protocol.link.Handler`: nobody need wait for it any more."""
        super().on_lost(link, exc)
        for waited in (self.joined, self.claimed):
            if not waited.done():
                waited.set_exception(exc)
                waited.exception()  # nobody may be waiting


class Switchboard:
    """Where links that other workers open wait for the session that they belong to."""

    def __init__(self) -> None:
        self._waiting: dict[_Key, _Caller] = {}
        self._arrivals = asyncio.Condition()
        self._silent = Backlog(_MOST_SILENT)

    async def serve(self, channel: Channel) -> None:
        """Keep a link open until its session lets go of it, or nobody claims it in time."""
        caller = _Caller(channel)
        key: _Key | None = None
        try:
            caller.link.start()
            async with asyncio.timeout(PATIENCE_S):
                join = (await self._silent.wait(channel.peer_id, _joined(caller))).body
                key = (join.session, join.rank)
                if key in self._waiting or len(self._waiting) >= _MOST_WAITING:
                    return
                self._waiting[key] = caller
                async with self._arrivals:
                    self._arrivals.notify_all()
                await caller.claimed
            await caller.left.wait()
        except TimeoutError:
            pass
        finally:
            if key is not None and self._waiting.get(key) is caller:
                del self._waiting[key]
            await caller.link.aclose()

    async def claim(self, session: int, rank: int) -> _Caller:
        """Wait for the link of a session's worker; give it back by setting ``left``."""
        key = (session, rank)
        async with self._arrivals:
            await self._arrivals.wait_for(lambda: key in self._waiting)
        caller = self._waiting.pop(key)
        caller.claimed.set_result(None)
        return caller


async def _joined(caller: _Caller) -> Incoming:
    return await caller.joined


class WorkerLinks:
    """One worker's links to the other workers of its session."""

    def __init__(
        self,
        links: LinkSet,
        connect: Connect | None,
        board: Switchboard,
        timeout_s: float,
        frame_limit: int,
    ):
        """Add links to ``links``; ``connect`` opens them, without it there are none."""
        self._links = links
        self._connect = connect
        self._board = board
        self._timeout_s = timeout_s
        self._frame_limit = frame_limit
        self._clients: list[PeerClient] = []
        self._opened: list[Link] = []
        self._callers: list[_Caller] = []

    async def form(self, session: int, addresses: Sequence[str]) -> tuple[LinkState, ...]:
        """Open or await a link to every other worker, at the same time.

        Args:
            session: number that the master drew.
            addresses: of all ranks, the master's first.

        Returns:
            how each link turned out. Addresses are what a master says, so a failure tells the
            master no more than that there is no link.
        """
        others = [rank for rank in range(1, len(addresses)) if rank != self._links.rank]
        states = (self._form(session, rank, addresses[rank]) for rank in others)
        return tuple(await asyncio.gather(*states))

    async def aclose(self) -> None:
        """Let go of all links."""
        for caller in self._callers:
            caller.left.set()
        await asyncio.gather(*(link.aclose() for link in self._opened))
        await asyncio.gather(*(client.aclose() for client in self._clients))

    async def _form(self, session: int, rank: int, address: str) -> LinkState:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + PATIENCE_S
        try:
            async with asyncio.timeout_at(until_s):
                if rank > self._links.rank:
                    link = await self._accept(session, rank)
                else:
                    link = await self._open(session, address)
        except (TimeoutError, TpirtError):
            # Always as late as the latest: how soon an address fails tells what is there.
            await asyncio.sleep(until_s - loop.time())
            return LinkState(rank, reason=f"no link within {PATIENCE_S:g} s")
        link.rank = rank
        link.channel.frame_limit = self._frame_limit
        link.silence(self._timeout_s)
        self._links.add(link)
        carrier = link.channel.carrier
        return LinkState(rank, carrier.kind, carrier.reason)

    async def _open(self, session: int, address: str) -> Link:
        if self._connect is None:
            raise TransportError(f"peer {address}: this worker opens no links")
        client = self._connect(address)
        self._clients.append(client)
        link = Link(await client.open_link(), 0, PATIENCE_S, _Peer())
        self._opened.append(link)
        link.start()
        await link.request(JoinLink(session, self._links.rank))
        return link

    async def _accept(self, session: int, rank: int) -> Link:
        caller = await self._board.claim(session, rank)
        self._callers.append(caller)
        caller.link.reply(caller.joined.result(), Joined())
        return caller.link
