"""Connections that belong to gRPC calls: who may open one, and how it is found.

The side that answers a call offers ``offset:ticket``: its port relative to gRPC's, and 16 random
bytes. The caller connects, shows the ticket, gets a byte of welcome and returns it. A ticket admits
one connection. Only after the third message do both sides know that the connection is used; on a
slow link the caller may give up before the welcome has come.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from typing import Any

PORT_OFFSET = 1000  # from gRPC's port to ours where that one is free, so that firewalls can be told

_TICKET_BYTES = 16
_WELCOME = b"\x06"
_PATIENCE_S = 1.0  # with a port that may be shut: firewalls drop packets silently
_NEXT_ADDRESS_S = 0.25  # before a host's next address is tried too
_UNADMITTED = 64  # connections at a time that have not shown a ticket: each takes a descriptor


class TcpListener:
    """The listening socket, and the offers that nobody has taken yet."""

    def __init__(self, listener: socket.socket, port: int):
        """Accept connections on a socket; ``port`` is gRPC's."""
        self._listener = listener
        self._offset = listener.getsockname()[1] - port
        self._expected: dict[bytes, asyncio.Future[socket.socket]] = {}
        self._loop = asyncio.get_running_loop()
        self._admitting: dict[asyncio.Task[None], None] = {}  # the oldest first
        self._accepting = asyncio.create_task(self._accept())

    @classmethod
    def beside(cls, host: str, port: int) -> TcpListener | None:
        """Listen near gRPC's port; None if this machine has no port to give."""
        for wanted in (port + PORT_OFFSET, port - PORT_OFFSET, 0):
            with contextlib.suppress(OSError, OverflowError):
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                dual = host == "::" and socket.has_dualstack_ipv6()
                listener = socket.create_server(
                    (host, wanted), family=family, dualstack_ipv6=dual, backlog=128
                )
                listener.setblocking(False)
                return cls(listener, port)
        return None

    @property
    def port(self) -> int:
        """The port that connections come to."""
        port: int = self._listener.getsockname()[1]
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
        tasks = [self._accepting, *self._admitting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listener)
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


async def connect(address: str, offer: str) -> socket.socket:
    """Connect to the port in an :meth:`TcpListener.offer` of the peer at ``address``.

    Raises:
        OSError: no connection, or the ticket is not known there; the message says which.
        ValueError: not an offer.
    """
    host, _, grpc_port = address.rpartition(":")
    offset, _, ticket = offer.partition(":")
    port = int(grpc_port) + int(offset)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            return await _connect(host.strip("[]"), port, bytes.fromhex(ticket))
    except TimeoutError:
        raise OSError(f"port {port}: no answer within {_PATIENCE_S:g} s") from None
    except (OSError, OverflowError) as exc:
        errno = getattr(exc, "errno", None)
        why = os.strerror(errno).lower() if errno and errno > 0 else str(exc)
        raise OSError(f"port {port}: {why}") from exc


async def _connect(host: str, port: int, ticket: bytes) -> socket.socket:
    """Try a host's addresses in order, each a little after the one before; the first to succeed."""
    loop = asyncio.get_running_loop()
    left = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    trying: set[asyncio.Task[socket.socket]] = set()
    failure: BaseException | None = None
    try:
        while left or trying:
            if left:
                family, _, _, _, where = left.pop(0)
                trying.add(asyncio.create_task(_try(family, where, ticket)))
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


async def _try(family: int, where: Any, ticket: bytes) -> socket.socket:
    loop = asyncio.get_running_loop()
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        _set_up(connection)
        await loop.sock_connect(connection, where)
        await loop.sock_sendall(connection, ticket)
        await _expect_welcome(connection)
        await loop.sock_sendall(connection, _WELCOME)
    except BaseException:
        connection.close()
        raise
    return connection


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
