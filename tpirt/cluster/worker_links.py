"""Links between the workers of a session: each worker opens one to every worker of a lower rank.

A link that cannot be had is not an error: the master is told, and sums go through the star.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from tpirt.collectives.links import LinkSet
from tpirt.errors import DamagedLinkError, PeerLostError, TpirtError, TransportError
from tpirt.protocol.link import Incoming, Link
from tpirt.protocol.messages import Joined, JoinLink, LinkState
from tpirt.transport.backlog import Backlog
from tpirt.transport.base import Channel, PeerClient

Connect = Callable[[str], PeerClient]

_log = logging.getLogger("tpirt.cluster")

PATIENCE_S = 10.0  # for another worker, which may be slow, to open its link, or to answer
_MOST_SILENT = 64  # links that have not said yet to which session they belong
_MOST_WAITING = 256  # links that no session has claimed yet

_Key = tuple[int, int]  # session, rank


class _Peer:
    """Handler of a link between workers: it carries tensors and probes, and one request to join."""

    def __init__(self) -> None:
        self.request: Incoming | None = None
        self.left = asyncio.Event()
        self._spoken = asyncio.Event()  # or gone

    async def joined(self) -> Incoming:
        """Wait for the request to join.

        Raises:
            PeerLostError: the other side is gone.
        """
        await self._spoken.wait()
        if self.request is None:
            raise PeerLostError("a worker's link ended before it was used")
        return self.request

    def on_message(self, link: Link, incoming: Incoming) -> None:
        """See :class:`tpirt.protocol.link.Handler`."""
        if self.request is not None or not isinstance(incoming.body, JoinLink) or not incoming.id:
            kind = type(incoming.body).__name__
            raise TransportError(f"peer {link.peer_id}: {kind} on a worker's link; refused")
        self.request = incoming
        self._spoken.set()

    def on_lost(self, link: Link, exc: TpirtError) -> None:
        """See :class:`tpirt.protocol.link.Handler`: the next use of the link raises it."""
        if isinstance(exc, DamagedLinkError):
            _log.warning("link between workers ended: %s", exc)
        self.left.set()
        self._spoken.set()


class _Caller(_Peer):
    """A worker that opened a link to this one."""

    def __init__(self, channel: Channel):
        super().__init__()
        self.link = Link(channel, 0, PATIENCE_S, self)
        self.claimed = asyncio.get_running_loop().create_future()

    def on_lost(self, link: Link, exc: TpirtError) -> None:
        """See :class:`tpirt.protocol.link.Handler`: nobody need wait for it any more."""
        super().on_lost(link, exc)
        if not self.claimed.done():
            self.claimed.set_exception(exc)
            self.claimed.exception()  # nobody may be waiting


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
                join = (await self._silent.wait(channel.peer_id, caller.joined())).body
                key = (join.session, join.rank)
                if key in self._waiting or len(self._waiting) >= _MOST_WAITING:
                    return
                self._waiting[key] = caller
                async with self._arrivals:
                    self._arrivals.notify_all()
                await caller.claimed
            await caller.left.wait()
        except (TimeoutError, PeerLostError):
            pass
        finally:
            if key is not None and self._waiting.get(key) is caller:
                del self._waiting[key]
            await caller.link.aclose()

    def waits_for(self, session: int, rank: int) -> bool:
        """Whether a worker's link is here and not claimed yet."""
        return (session, rank) in self._waiting

    async def claim(self, session: int, rank: int) -> _Caller:
        """Wait for the link of a session's worker; give it back by setting ``left``.

        Cancelled, the link stays where it is.

        Raises:
            TransportError: the link ended as it was claimed.
        """
        key = (session, rank)
        async with self._arrivals:
            await self._arrivals.wait_for(lambda: self.waits_for(*key))
        caller = self._waiting.pop(key)
        if caller.claimed.done():  # lost or given up, and not removed yet
            raise TransportError(f"peer {caller.link.peer_id}: the link ended before it was used")
        caller.claimed.set_result(None)
        return caller


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
        self._forming: list[asyncio.Task[LinkState]] = []

    def form(self, session: int, addresses: Sequence[str], identities: Sequence[str] = ()) -> None:
        """Begin to open or await a link to every other worker, at the same time.

        Args:
            session: number that the master drew.
            addresses: of all ranks, the master's first.
            identities: which device has to answer there, if the master knows.
        """
        for rank, address in enumerate(addresses):
            if rank not in (0, self._links.rank):
                expected = identities[rank] if identities else ""
                forming = self._form(session, rank, address, expected)
                self._forming.append(asyncio.create_task(forming))

    async def formed(self) -> tuple[LinkState, ...]:
        """Wait until every link is there or has failed; returns how each turned out.

        Addresses are what a master says, so a failure tells the master no more than that there is
        no link.
        """
        return tuple(await asyncio.gather(*self._forming))

    async def aclose(self) -> None:
        """Let go of all links."""
        for forming in self._forming:
            forming.cancel()
        await asyncio.gather(*self._forming, return_exceptions=True)
        for caller in self._callers:
            caller.left.set()
        await asyncio.gather(*(link.aclose() for link in self._opened))
        await asyncio.gather(*(client.aclose() for client in self._clients))

    async def _form(self, session: int, rank: int, address: str, expected: str) -> LinkState:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + PATIENCE_S
        try:
            async with asyncio.timeout_at(until_s):
                if rank > self._links.rank:
                    link = await self._accept(session, rank)
                else:
                    link = await self._open(session, address, expected)
        except (TimeoutError, TpirtError):
            # Always as late as the latest: how soon an address fails tells what is there.
            await asyncio.sleep(until_s - loop.time())
            return LinkState(rank, reason=f"no link within {PATIENCE_S:g} s")
        link.rank = rank
        link.channel.frame_limit = self._frame_limit
        link.silence(self._timeout_s)
        self._links.add(link)
        carrier = link.channel.carrier
        return LinkState(rank, carrier.kind, carrier.reason, carrier.seal)

    async def _open(self, session: int, address: str, expected: str) -> Link:
        if self._connect is None:
            raise TransportError(f"peer {address}: this worker opens no links")
        client = self._connect(address)
        self._clients.append(client)
        link = Link(await client.open_link(), 0, PATIENCE_S, _Peer())
        self._opened.append(link)
        met = client.certificate
        if expected and (met is None or met.subject.identity != expected):
            raise TransportError(f"peer {address}: not the device that the master has met there")
        link.start()
        await link.request(JoinLink(session, self._links.rank))
        return link

    async def _accept(self, session: int, rank: int) -> Link:
        caller = await self._board.claim(session, rank)
        self._callers.append(caller)
        caller.link.reply(await caller.joined(), Joined())
        return caller.link
