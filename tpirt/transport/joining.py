"""Invitations: a port on the master, open until a device has joined by the right code.

Anyone can connect. So connections are few and short, and three wrong codes end the invitation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from tpirt.errors import IdentityError, PeerUnreachableError, TransportError
from tpirt.identity.join import (
    MESSAGE_BYTES,
    MOST_TRIES,
    OVER,
    WRONG_CODE,
    DeviceExchange,
    JoinReply,
    JoinRequest,
    MasterExchange,
    WrongCodeError,
    read_code,
)
from tpirt.transport.address import Address, Endpoint, resolve
from tpirt.transport.backlog import Backlog
from tpirt.transport.reach import race, reach, read_exactly

_log = logging.getLogger("tpirt.cluster")

Issue = Callable[[JoinRequest, str], AbstractAsyncContextManager[JoinReply]]

_PLACES = 16  # callers at a time; the oldest of the host that has most of them gives way
_PATIENCE_S = 10.0  # with one of them
_LENGTH_BYTES = 2


class Invitation:
    """Waits for one device.

    Attributes:
        address: where, once it listens.
    """

    def __init__(self, code: str, issue: Issue):
        """Wait for a device that knows ``code``.

        Args:
            code: as :func:`~tpirt.identity.join.new_code` draws it.
            issue: makes the certificate for a request from a host; it is taken back if the block
                fails, in which the device keeps it.
        """
        self._code = read_code(code)
        self._issue = issue
        self._tries = MOST_TRIES
        self._used = False
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._callers = Backlog(_PLACES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners: list[socket.socket] = []

    async def listen(self, address: Address) -> list[Endpoint]:
        """Listen; returns the addresses in digits.

        Raises:
            TransportError: that is not possible.
        """
        try:
            bound = []
            for endpoint in await resolve(address, listening=True):
                self._listeners.append(endpoint.listen())
                bound.append(endpoint.at(self._listeners[-1].getsockname()[1]))
        except OSError as exc:
            self.close()
            raise TransportError(
                f"cannot listen on {address}: {exc.strerror}; choose another with --listen"
            ) from exc
        return bound

    async def joined(self, patience_s: float) -> None:
        """Wait until a device has joined.

        Raises:
            IdentityError: nobody did in time, or there were too many wrong codes.
        """
        accepting = [asyncio.create_task(self._accept(each)) for each in self._listeners]
        try:
            await asyncio.wait({self._ended}, timeout=patience_s)
            if not (self._ended.done() or self._used):
                raise IdentityError(
                    f"no device has joined within {patience_s / 60:g} minutes; the code is void"
                )
            await asyncio.shield(self._ended)  # the device that is being welcomed has its time
        finally:
            for task in (*accepting, *self._tasks):
                task.cancel()
            await asyncio.gather(*accepting, *self._tasks, return_exceptions=True)
            self.close()

    def close(self) -> None:
        """Stop listening."""
        for listener in self._listeners:
            listener.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, where = await loop.sock_accept(listener)
            except OSError:  # no descriptor left, or the caller has gone already
                await asyncio.sleep(1.0)
                continue
            connection.setblocking(False)
            await asyncio.sleep(0)  # a flood of connections must not starve the loop
            host = Endpoint(listener.family, where).host
            task = asyncio.create_task(self._serve(connection, host))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket, host: str) -> None:
        """Give a caller its few seconds; one that knows the code is not crowded out any more."""
        exchange = MasterExchange(self._code)
        with connection, contextlib.suppress(IdentityError, TransportError, OSError):
            asking = self._asked(connection, host, exchange)
            if (request := await self._callers.wait(f"{host}:", asking)) is not None:
                await self._welcome(connection, exchange, request, host)

    async def _asked(
        self, connection: socket.socket, host: str, exchange: MasterExchange
    ) -> JoinRequest | None:
        """What a caller asks for that knows the code; None for any other."""
        async with asyncio.timeout(_PATIENCE_S):
            await _send(connection, exchange.answer(await _receive(connection)))
            proof = await _receive(connection)
            if self._used or not self._tries:
                await _send(connection, OVER)
                return None
            try:
                request = exchange.confirmed(proof)
            except WrongCodeError:
                self._tries -= 1
                left = "1 try is" if self._tries == 1 else f"{self._tries} tries are"
                _log.warning(f"a device at {host} gave a wrong code; {left} left")
                try:
                    await _send(connection, WRONG_CODE)
                finally:
                    if not self._tries:
                        self._end(IdentityError(f"{MOST_TRIES} wrong codes; the code is void"))
                return None
            self._used = True
            return request

    async def _welcome(
        self,
        connection: socket.socket,
        exchange: MasterExchange,
        request: JoinRequest,
        host: str,
    ) -> None:
        """Give a device that knows the code its certificate; the code is void, whatever follows."""
        failure: IdentityError | None = None
        try:
            async with self._issue(request, host) as reply, asyncio.timeout(_PATIENCE_S):
                await _send(connection, exchange.reply(reply))
                if not exchange.kept(await _receive(connection)):
                    raise IdentityError("the device did not say that it has kept it")
        except (OSError, TimeoutError, IdentityError) as exc:
            why = str(exc) or "it said nothing more"
            failure = IdentityError(
                f"a device at {host} had the right code, but did not finish: {why}; invite it again"
            )
        self._end(failure)

    def _end(self, failure: IdentityError | None) -> None:
        if self._ended.done():
            return
        if failure is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(failure)


async def join(
    address: Address, code: str, request: JoinRequest, keep: Callable[[JoinReply], None]
) -> None:
    """Join by a code.

    Args:
        address: of the invitation.
        code: as somebody typed it.
        request: what to ask for.
        keep: writes what comes to the disk; called in a thread.

    Raises:
        PeerUnreachableError: nobody invites there.
        IdentityError: the code is wrong, or the invitation over; as ``keep`` raises.
    """
    exchange = DeviceExchange(read_code(code))
    try:
        async with asyncio.timeout(_PATIENCE_S):
            connection = await race(await resolve(address), reach)
            with connection:
                await _send(connection, exchange.hello())
                answer = await _receive(connection)
                await _send(connection, exchange.request(answer, request))
                reply = exchange.accept(await _receive(connection))
                await asyncio.to_thread(keep, reply)
                await _send(connection, exchange.kept())
    except IdentityError as exc:
        raise type(exc)(f"cannot join at {address}: {exc}") from exc
    except (OSError, TimeoutError) as exc:
        why = getattr(exc, "strerror", None) or str(exc) or "no answer"
        raise PeerUnreachableError(
            f"cannot join at {address}: {str(why).lower()}; is `tpirt cluster invite` running "
            "there, and does its firewall let this device in?"
        ) from exc


async def _send(connection: socket.socket, message: bytes) -> None:
    framed = len(message).to_bytes(_LENGTH_BYTES, "little") + message
    await asyncio.get_running_loop().sock_sendall(connection, framed)


async def _receive(connection: socket.socket) -> bytes:
    """Read one message.

    Raises:
        IdentityError: it is too long.
        ConnectionResetError: the other side has hung up.
    """
    ended = "the other side hung up"
    size = int.from_bytes(await read_exactly(connection, _LENGTH_BYTES, ended), "little")
    if size > MESSAGE_BYTES:
        raise IdentityError(f"a message of {size} bytes, expected at most {MESSAGE_BYTES}")
    return await read_exactly(connection, size, ended)
