"""Connections that belong to gRPC calls: who may open one, and how it is found.

The side that answers a call offers ``offset:ticket``: its port relative to gRPC's, and 16 random
bytes. The caller connects, shows the ticket, gets a byte of welcome and returns it. A ticket admits
one connection. Only after the third message do both sides know that the connection is used; on a
slow link the caller may give up before the welcome has come.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import socket
from collections.abc import Sequence
from contextlib import ExitStack

from tpirt.transport.address import Address, Endpoint, resolve

PORT_OFFSET = 1000  # from gRPC's port to ours where that one is free, so that firewalls can be told

_TICKET_BYTES = 16
_WELCOME = b"\x06"
_PATIENCE_S = 2.0  # with a port that may be shut: firewalls drop packets silently
_NEXT_ADDRESS_S = 0.25  # before a host's next address is tried too
_UNADMITTED = 64  # connections at a time that have not shown a ticket: each takes a descriptor


class TcpListener:
    """The listening sockets, and the offers that nobody has taken yet."""

    def __init__(self, listeners: Sequence[socket.socket], port: int):
        """Accept connections on sockets of one port; ``port`` is gRPC's."""
        self._listeners = listeners
        self._offset = self.port - port
        self._expected: dict[bytes, asyncio.Future[socket.socket]] = {}
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

    def offer(self) -> tuple[str, asyncio.Future[socket.socket]]:
        """Make a ticket; returns the offer, and a future of the connection."""
        ticket = secrets.token_bytes(_TICKET_BYTES)
        expected = self._expected[ticket] = self._loop.create_future()
        expected.add_done_callback(lambda _: self._expected.pop(ticket, None))
        return f"{self._offset}:{ticket.hex()}", expected

    @staticmethod
    def withdraw(expected: asyncio.Future[socket.socket]) -> None:
        """Accept no connection on this offer any more; close the one that came."""
        if not expected.cancel() and not expected.cancelled():
            expected.result().close()

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
        """Accept a connection that shows a ticket soon; close any other."""
        try:
            _set_up(connection)
            async with asyncio.timeout(_PATIENCE_S):
                expected = self._expected.pop(await _read(connection, _TICKET_BYTES), None)
                if expected is None or expected.done():
                    raise ConnectionRefusedError
                await self._loop.sock_sendall(connection, _WELCOME)
                await _expect_welcome(connection)
            if expected.done():  # withdrawn meanwhile
                raise ConnectionRefusedError
            expected.set_result(connection)
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


async def connect(address: Address, offer: str) -> socket.socket:
    """Connect to the port in an :meth:`TcpListener.offer` of the peer at ``address``.

    Raises:
        OSError: no connection, or the ticket is not known there; the message says which.
        ValueError: not an offer.
    """
    offset, _, ticket = offer.partition(":")
    port = address.port + int(offset)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            return await _connect(await resolve(Address(address.host, port)), bytes.fromhex(ticket))
    except TimeoutError:
        raise OSError(f"port {port}: no answer within {_PATIENCE_S:g} s") from None
    except (OSError, OverflowError) as exc:
        number = getattr(exc, "errno", None)
        why = os.strerror(number).lower() if number and number > 0 else str(exc)
        raise OSError(f"port {port}: {why}") from exc


async def _connect(left: list[Endpoint], ticket: bytes) -> socket.socket:
    """Try a host's addresses in order, each a little after the one before; the first to succeed.

    Only the peer that gRPC has reached knows the ticket.
    """
    trying: set[asyncio.Task[socket.socket]] = set()
    failure: BaseException | None = None
    try:
        while left or trying:
            if left:
                trying.add(asyncio.create_task(_try(left.pop(0), ticket)))
            done, trying = await asyncio.wait(
                trying,
                timeout=_NEXT_ADDRESS_S if left else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done:
                failure = task.exception()
                if failure is None:
                    return task.result()
    finally:
        for task in trying:
            task.cancel()
        await asyncio.gather(*trying, return_exceptions=True)
    raise failure or OSError("the host has no address")


async def _try(endpoint: Endpoint, ticket: bytes) -> socket.socket:
    loop = asyncio.get_running_loop()
    connection = socket.socket(endpoint.family, socket.SOCK_STREAM)
    try:
        _set_up(connection)
        await _reach(connection, endpoint)
        await loop.sock_sendall(connection, ticket)
        await _expect_welcome(connection)
        await loop.sock_sendall(connection, _WELCOME)
    except BaseException:
        connection.close()
        raise
    return connection


async def _reach(connection: socket.socket, endpoint: Endpoint) -> None:
    """Connect a socket, as ``loop.sock_connect``, which loses an IPv6 zone in uvloop."""
    code = connection.connect_ex(endpoint.where)
    if code == errno.EINPROGRESS:
        loop, connected = asyncio.get_running_loop(), asyncio.Event()
        loop.add_writer(connection.fileno(), connected.set)
        try:
            await connected.wait()
        finally:
            loop.remove_writer(connection.fileno())
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


def _set_up(connection: socket.socket) -> None:
    """Make a connection the loop's, and have small messages sent at once."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def _expect_welcome(connection: socket.socket) -> None:
    if await _read(connection, len(_WELCOME)) != _WELCOME:
        raise ConnectionRefusedError("another service answers there")


async def _read(connection: socket.socket, count: int) -> bytes:
    loop, data = asyncio.get_running_loop(), b""
    while len(data) < count:
        more = await loop.sock_recv(connection, count - len(data))
        if not more:
            raise ConnectionRefusedError("it does not know the ticket")
        data += more
    return data
