"""Links among workers: each opens one to every worker of a lower rank, and measures it on demand.

A link that cannot be had is no failure: the master hears of it and sums go through the star.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tpirt.cluster.probing import answer, answer_all, measure, round_trip, send_last
from tpirt.collectives.links import LinkSet
from tpirt.errors import TpirtError, TransportError
from tpirt.transport.base import Channel, PeerClient
from tpirt.transport.codec import Frame
from tpirt.transport.pb import tpirt_pb2 as pb

Connect = Callable[[str], PeerClient]

PATIENCE_S = 5.0  # for another worker to open its link, or to answer


@dataclass
class _Caller:
    """A worker that opened a link to this one."""

    channel: Channel
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Switchboard:
    """Where links that others open wait for the session that they belong to."""

    def __init__(self) -> None:
        self._callers: dict[tuple[int, int], asyncio.Future[_Caller]] = {}

    async def serve(self, channel: Channel) -> None:
        """Take a link; returns when the session lets go of it, or does not want it in time.

        Raises:
            PeerLostError, TransportError: the caller does not say who it is.
        """
        frame = await channel.recv(PATIENCE_S)
        if frame.kind != "link":
            raise TransportError(f"peer {channel.peer_id}: expected link, got {frame.kind}")
        key = (frame.header.link.session, frame.header.link.rank)
        caller = _Caller(channel)
        waiting = self._expected(key)
        if waiting.done():
            raise TransportError(f"peer {channel.peer_id}: a second link of rank {key[1]}; refused")
        waiting.set_result(caller)
        asyncio.get_running_loop().call_later(PATIENCE_S, self._forget, key, caller)
        await caller.done.wait()

    async def claim(self, session: int, rank: int) -> _Caller:
        """Wait for the link of a session's worker.

        Raises:
            TimeoutError: it did not come in time.
        """
        key = (session, rank)
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await asyncio.shield(self._expected(key))
        finally:
            self._callers.pop(key, None)

    def _expected(self, key: tuple[int, int]) -> asyncio.Future[_Caller]:
        if key not in self._callers:
            self._callers[key] = asyncio.get_running_loop().create_future()
        return self._callers[key]

    def _forget(self, key: tuple[int, int], caller: _Caller) -> None:
        """Let a caller go that nobody claimed."""
        waiting = self._callers.get(key)
        if waiting is not None and waiting.done() and waiting.result() is caller:
            del self._callers[key]
            caller.done.set()


class WorkerLinks:
    """One worker's links to the others of its session."""

    def __init__(self, links: LinkSet, connect: Connect | None, board: Switchboard):
        self._links = links
        self._connect = connect
        self._board = board
        self._clients: list[PeerClient] = []
        self._callers: list[_Caller] = []
        self._opened: dict[int, Channel] = {}

    async def form(self, session: int, addresses: Sequence[str]) -> list[pb.LinkState]:
        """Open or await a link to every other worker, side by side; tells how each turned out.

        Args:
            session: what the master drew.
            addresses: of all ranks, the master's first.
        """
        others = [rank for rank in range(1, len(addresses)) if rank != self._links.rank]
        return await asyncio.gather(
            *(self._form(session, rank, addresses[rank]) for rank in others)
        )

    async def measure(self) -> list[pb.LinkState]:
        """Measure the links that were opened here; answer those who measure theirs to here.

        Raises:
            PeerLostError, TransportError: another worker is gone or makes no sense.
        """
        answers = [
            asyncio.create_task(answer_all(caller.channel, PATIENCE_S)) for caller in self._callers
        ]
        states = []
        try:
            # One after another: at the same time they would measure each other.
            for rank, channel in self._opened.items():
                quality = await measure(channel, PATIENCE_S)
                await send_last(channel)
                states.append(
                    pb.LinkState(
                        rank=rank,
                        latency_s=quality.latency_s,
                        bytes_per_s=quality.bytes_per_s,
                        via=channel.via,
                    )
                )
            await asyncio.gather(*answers)
        except BaseException:
            for task in answers:
                task.cancel()
            raise
        return states

    async def aclose(self) -> None:
        """Let go of all links."""
        for caller in self._callers:
            await caller.channel.aclose()
            caller.done.set()
        for client in self._clients:
            await client.aclose()

    async def _form(self, session: int, rank: int, address: str) -> pb.LinkState:
        state = pb.LinkState(rank=rank)
        try:
            if rank > self._links.rank:
                await self._accept(session, rank)
            else:
                async with asyncio.timeout(PATIENCE_S):
                    await self._open(session, rank, address)
        except TimeoutError:
            state.failure = f"no link within {PATIENCE_S:g} s"
        except TpirtError as exc:
            state.failure = str(exc)
        return state

    async def _open(self, session: int, rank: int, address: str) -> None:
        if self._connect is None:
            raise TransportError(f"peer {address}: this worker opens no links")
        client = self._connect(address)
        self._clients.append(client)
        channel = await client.open_link()
        link = pb.Link(session=session, rank=self._links.rank)
        await channel.send(Frame(pb.FrameHeader(link=link)))
        await round_trip(channel, 0, b"", PATIENCE_S)  # it is there, and knows us
        self._opened[rank] = channel
        self._links.add(rank, channel)

    async def _accept(self, session: int, rank: int) -> None:
        caller = await self._board.claim(session, rank)
        self._callers.append(caller)
        await answer(caller.channel, await caller.channel.recv(PATIENCE_S))
        self._links.add(rank, caller.channel)
