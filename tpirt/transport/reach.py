"""Connecting to one of the addresses that a name has."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from tpirt.transport.address import Endpoint

_T = TypeVar("_T")
_Place = TypeVar("_Place")
_NEXT_ADDRESS_S = 0.25  # before a host's next address is tried too


async def race(places: Sequence[_Place], attempt: Callable[[_Place], Awaitable[_T]]) -> _T:
    """Try a host's addresses in order, each a little after the one before; the first to succeed.

    Raises: what the last attempt that failed has raised.
    """
    left = list(places)
    trying: set[asyncio.Future[_T]] = set()
    failure: BaseException | None = None
    try:
        while left or trying:
            if left:
                trying.add(asyncio.ensure_future(attempt(left.pop(0))))
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


async def reach(endpoint: Endpoint) -> socket.socket:
    """Connect, as ``loop.sock_connect``, which loses an IPv6 zone in uvloop.

    Raises:
        OSError: it cannot be reached.
    """
    connection = socket.socket(endpoint.family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        await _connected(connection, connection.connect_ex(endpoint.where))
    except BaseException:
        connection.close()
        raise
    return connection


async def read_exactly(connection: socket.socket, count: int, ended: str) -> bytes:
    """Read so many bytes of a connection.

    Raises:
        ConnectionResetError: the other side hung up; says ``ended``.
        OSError: the connection broke.
    """
    data = b""
    while len(data) < count:
        more = await asyncio.get_running_loop().sock_recv(connection, count - len(data))
        if not more:
            raise ConnectionResetError(ended)
        data += more
    return data


async def _connected(connection: Any, code: int) -> None:
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
