"""Connections that belong to gRPC calls: who may open one, and how it is found.

The side that answers a call offers ``offset:ticket``: its port relative to gRPC's, and 16 random
bytes. The caller connects, shows the ticket, gets a byte of welcome and returns it. A ticket admits
one connection. Only after the third message do both sides know that the connection is used; on a
slow link the caller may give up before the welcome has come.

In a protected call the offer also has a secret and a cipher (:mod:`tpirt.transport.sealing`), and
the bytes of welcome are the first sealed record of each direction. So a ticket that was seen on its
way admits nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from tpirt.errors import TransportError
from tpirt.transport.address import Address, Endpoint, resolve
from tpirt.transport.reach import race, reach, read_exactly

if TYPE_CHECKING:
    from tpirt.transport.sealing import Seal

PORT_OFFSET = 1000  # from gRPC's port to ours where that one is free, so that firewalls can be told

_TICKET_BYTES = 16
SECRET_BYTES = 32
OVERHEAD_BYTES = 20  # of a sealed record
_WELCOME = b"\x06"
_PATIENCE_S = 2.0  # with a port that may be shut: firewalls drop packets silently
_UNADMITTED = 64  # connections at a time that have not shown a ticket: each takes a descriptor


class Connection(NamedTuple):
    """A connection that was admitted; ``seal`` is None where frames go in the clear."""

    socket: socket.socket
    seal: Seal | None


class _Expected(NamedTuple):
    """An offer: who waits for its connection, and what seals it."""

    connected: asyncio.Future[Connection]
    secret: bytes
    cipher: str

    def seal(self, ticket: bytes) -> Seal | None:
        """Begin to seal a connection that shows the ticket."""
        return _seal(self.secret, ticket, self.cipher, served=True)


class TcpListener:
    """The listening sockets, and the offers that nobody has taken yet."""

    def __init__(self, listeners: Sequence[socket.socket], port: int):
        """Accept connections on sockets of one port; ``port`` is gRPC's."""
        self._listeners = listeners
        self._offset = self.port - port
        self._expected: dict[bytes, _Expected] = {}
        self._loop = asyncio.get_running_loop()
        self._admitting: dict[asyncio.Task[None], None] = {}  # the oldest first
        self._accepting = [asyncio.create_task(self._accept(each)) for each in listeners]

    @classmethod
    def beside(cls, endpoints: Sequence[Endpoint], port: int) -> TcpListener | None:
        """Listen near gRPC's port, where gRPC does; None if this machine has no port to give."""
        for wanted in (port + PORT_OFFSET, port - PORT_OFFSET, 0):
            with contextlib.suppress(OSError, OverflowError):
                return cls(_listen(endpoints, wanted), port)
        return None

    @property
    def port(self) -> int:
        """The port that connections come to."""
        port: int = self._listeners[0].getsockname()[1]
        return port

    def offer(self, cipher: str = "") -> tuple[str, asyncio.Future[Connection]]:
        """Make a ticket; returns the offer, and a future of the connection.

        ``cipher`` seals it, by a secret that is part of the offer.
        """
        ticket = secrets.token_bytes(_TICKET_BYTES)
        secret = secrets.token_bytes(SECRET_BYTES) if cipher else b""
        connected: asyncio.Future[Connection] = self._loop.create_future()
        self._expected[ticket] = _Expected(connected, secret, cipher)
        connected.add_done_callback(lambda _: self._expected.pop(ticket, None))
        sealed = f":{secret.hex()}:{cipher}" if cipher else ""
        return f"{self._offset}:{ticket.hex()}{sealed}", connected

    @staticmethod
    def withdraw(connected: asyncio.Future[Connection]) -> None:
        """Accept no connection on this offer any more; close the one that came."""
        if not connected.cancel() and not connected.cancelled():
            connected.result().socket.close()

    async def aclose(self) -> None:
        """Stop listening."""
        tasks = [*self._accepting, *self._admitting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in self._listeners:
            listener.close()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(listener)
            except OSError:  # no descriptor left, or the caller has gone already
                await asyncio.sleep(_PATIENCE_S)
                continue
            if len(self._admitting) >= _UNADMITTED:  # the oldest has had more time than it takes
                oldest = next(iter(self._admitting))
                del self._admitting[oldest]
                oldest.cancel()
            admitting = asyncio.create_task(self._admit(connection))
            self._admitting[admitting] = None
            admitting.add_done_callback(lambda task: self._admitting.pop(task, None))
            await asyncio.sleep(0)  # a flood of connections must not starve the loop

    async def _admit(self, connection: socket.socket) -> None:
        """Accept a connection that shows a ticket soon, and knows its secret; close any other."""
        try:
            _set_up(connection)
            async with asyncio.timeout(_PATIENCE_S):
                ticket = await read_exactly(connection, _TICKET_BYTES, "it hung up")
                if (expected := self._expected.get(ticket)) is None:
                    raise ConnectionRefusedError
                seal = expected.seal(ticket)
                await self._loop.sock_sendall(connection, _sealed(seal))
                await _expect_welcome(connection, seal)
            if expected.connected.done():  # withdrawn meanwhile, or another one was sooner
                raise ConnectionRefusedError
            expected.connected.set_result(Connection(connection, seal))
        except (OSError, asyncio.CancelledError):
            connection.close()


def _listen(endpoints: Sequence[Endpoint], port: int) -> list[socket.socket]:
    """Listen on one port of every address; port 0 takes one that is free on the first."""
    with ExitStack() as opened:
        listeners: list[socket.socket] = []
        for endpoint in endpoints:
            listeners.append(opened.enter_context(endpoint.at(port).listen()))
            port = listeners[-1].getsockname()[1]
        opened.pop_all()
    return listeners


async def connect(address: Address, offer: str, *, sealed: bool = False) -> Connection:
    """Connect to the port in an :meth:`TcpListener.offer` of the peer at ``address``.

    Only the peer that gRPC has reached knows the ticket, so all addresses of a name are tried.

    Raises:
        OSError: no connection, or the ticket is not known there; the message says which.
        ValueError: not an offer, or one in the clear where it has to be ``sealed``.
    """
    offset, shown, secret, cipher = (offer + "::").split(":")[:4]
    port, ticket = address.port + int(offset), bytes.fromhex(shown)
    key = bytes.fromhex(secret)
    if sealed and not cipher:
        raise ValueError("the peer offers a connection in the clear")
    _seal(key, ticket, cipher, served=False)  # a ValueError before anything is tried

    async def attempt(endpoint: Endpoint) -> Connection:
        return await _try(endpoint, ticket, _seal(key, ticket, cipher, served=False))

    try:
        async with asyncio.timeout(_PATIENCE_S):
            return await race(await resolve(Address(address.host, port)), attempt)
    except TimeoutError:
        raise OSError(f"port {port}: no answer within {_PATIENCE_S:g} s") from None
    except (OSError, OverflowError) as exc:
        number = getattr(exc, "errno", None)
        why = os.strerror(number).lower() if number and number > 0 else str(exc)
        raise OSError(f"port {port}: {why}") from exc


async def _try(endpoint: Endpoint, ticket: bytes, seal: Seal | None) -> Connection:
    loop = asyncio.get_running_loop()
    connection = await reach(endpoint)
    try:
        _set_up(connection)
        await loop.sock_sendall(connection, ticket)
        await _expect_welcome(connection, seal)
        await loop.sock_sendall(connection, _sealed(seal))
    except BaseException:
        connection.close()
        raise
    return Connection(connection, seal)


def _seal(secret: bytes, ticket: bytes, cipher: str, *, served: bool) -> Seal | None:
    """What seals a connection; None without a cipher.

    Raises:
        ValueError: not a secret, or no such cipher.
    """
    if not cipher:
        return None
    from tpirt.transport.sealing import Seal  # 15 MB, not needed on loopback

    return Seal(secret, ticket, cipher, served=served)


def _sealed(seal: Seal | None) -> bytes:
    return seal.seal(_WELCOME) if seal else _WELCOME


def _set_up(connection: socket.socket) -> None:
    """Make a connection the loop's, and have small messages sent at once."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def _expect_welcome(connection: socket.socket, seal: Seal | None) -> None:
    size = len(_WELCOME) + (OVERHEAD_BYTES if seal else 0)
    said = await read_exactly(connection, size, "it does not know the ticket")
    try:
        said = seal.open(said) if seal else said
    except TransportError as exc:
        raise ConnectionRefusedError(f"it does not know the secret: {exc}") from exc
    if said != _WELCOME:
        raise ConnectionRefusedError("another service answers there")
