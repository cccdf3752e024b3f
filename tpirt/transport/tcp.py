"""Frames over TCP connections of their own, beside the gRPC calls that they belong to.

What comes and goes some hundred times a token must cost little, and gRPC takes several times as
long for an exchange of partial sums as the socket under it (docs/collectives.md). So whoever
answers a call offers a port and a ticket; whoever called connects there and shows the ticket. The
call stays open beside the connection: it tells when the other side hangs, and why it left.

On the wire each frame is its length, four bytes with the least first, and a ``tpirt.v1.Frame``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import struct

from tpirt.errors import PeerLostError, TransportError
from tpirt.transport.base import Channel, closed, silent
from tpirt.transport.codec import Frame
from tpirt.transport.deadline import Deadline

MAX_FRAME_BYTES = 1 << 30  # far above any step; a bound against a peer gone mad
PORT_OFFSET = 1000  # from gRPC's port to ours where that one is free: firewalls want to know

_LENGTH = struct.Struct("<I")
_BUFFER_BYTES = 64 << 10
_PORTION_BYTES = 128 << 10  # of a large frame: what is worth waking up for
_TICKET_BYTES = 16
_WELCOME = b"\x06"
_PATIENCE_S = 1.0  # with a port that may be shut: firewalls swallow what they do not want
_LAST_WORDS_S = 0.5  # from the end of a call to that of its connection, whichever comes first


class TcpChannel:
    """See :class:`tpirt.transport.base.Channel`: a connection, and the call that it belongs to."""

    def __init__(self, connection: socket.socket, call: Channel):
        """Take a connected socket over; on ``call`` nothing more is said."""
        self.peer_id = call.peer_id
        self.via = "tcp"
        self.bytes_sent = 0
        self.bytes_received = 0
        self._socket = connection
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._reading = False
        self._deadline = Deadline()
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._woken_at = 1
        self._start = self._stop = 0  # of what has come and is not taken yet
        self._call_ends = asyncio.ensure_future(call.recv())
        self._call_ends.add_done_callback(self._follow)

    async def send(self, frame: Frame) -> None:
        """See :class:`tpirt.transport.base.Channel`."""
        self._check_open()
        data = frame.data
        head = _LENGTH.pack(len(data))
        try:
            try:
                sent = self._socket.sendmsg((head, data))
            except BlockingIOError:
                sent = 0
            if sent < len(head) + len(data):
                await self._send_rest((head, data), sent)
        except OSError as exc:
            self._check_open()
            raise await self._lost() from exc
        self.bytes_sent += len(data)

    async def recv(self, timeout_s: float | None = None) -> Frame:
        """See :class:`tpirt.transport.base.Channel`."""
        self._check_open()
        try:
            data = self._take()
            if data is not None:
                await asyncio.sleep(0)  # whoever finds all there already must not starve the loop
            else:
                data = await self._deadline.wait(self._read(), timeout_s)
        except TimeoutError as exc:
            raise silent(self.peer_id, timeout_s) from exc
        except OSError as exc:
            self._check_open()
            raise await self._lost() from exc
        self.bytes_received += len(data)
        return Frame.of(data, self.peer_id)

    async def aclose(self) -> None:
        """See :class:`tpirt.transport.base.Channel`."""
        self._closed = True
        self._deadline.close()
        self._call_ends.cancel()
        await self._call.aclose()
        self._hang_up()
        if not self._reading:
            self._socket.close()

    async def leave(self) -> None:
        """Close, but let the other side read what was sent last.

        A connection that is closed before all that came was read is reset, and takes with it what
        is under way.
        """
        with contextlib.suppress(OSError, TimeoutError):
            self._socket.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(_LAST_WORDS_S):
                while not self._reading and await self._receive(self._buffer):
                    pass
        await self.aclose()

    async def _send_rest(self, parts: tuple[bytes, bytes | bytearray], sent: int) -> None:
        try:
            for part in parts:
                await self._loop.sock_sendall(
                    self._socket, memoryview(part)[min(sent, len(part)) :]
                )
                sent = max(0, sent - len(part))
        except asyncio.CancelledError:
            self._closed = True  # what follows would be taken for the rest of this frame
            raise

    def _take(self) -> bytearray | None:
        """The next frame's bytes if all of them are here and fit the buffer."""
        there = self._stop - self._start
        if there < _LENGTH.size:
            space = self._space()
            try:
                self._stop += self._socket.recv_into(space)
            except BlockingIOError:
                return None
            there = self._stop
            if there < _LENGTH.size:
                return None
        whole = _LENGTH.size + self._length()
        if there < whole:
            return None
        data = bytearray(self._buffer[self._start + _LENGTH.size : self._start + whole])
        self._start += whole
        return data

    def _space(self) -> memoryview:
        """Where more may come, behind what is left in the buffer: a piece of a length at most."""
        left = self._stop - self._start
        self._buffer[:left] = self._buffer[self._start : self._stop]
        self._start, self._stop = 0, left
        return self._buffer[left:]

    def _length(self) -> int:
        """What the next frame says of its own."""
        length: int = _LENGTH.unpack_from(self._buffer, self._start)[0]
        if length > MAX_FRAME_BYTES:
            raise TransportError(
                f"peer {self.peer_id}: a frame of {length} bytes, expected at most "
                f"{MAX_FRAME_BYTES}; refused"
            )
        return length

    async def _read(self) -> bytearray:
        """Wait for the next frame's bytes."""
        self._reading = True
        try:
            while self._stop - self._start < _LENGTH.size:
                space = self._space()
                self._stop += await self._receive(space)
            data = bytearray(self._length())
            self._start += _LENGTH.size
            taken = min(len(data), self._stop - self._start)
            data[:taken] = self._buffer[self._start : self._start + taken]
            self._start += taken
            while taken < len(data):
                self._wake_at(min(len(data) - taken, _PORTION_BYTES))
                taken += await self._receive(memoryview(data)[taken:])
            self._wake_at(1)
        except asyncio.CancelledError:
            self._closed = True  # part of a frame may be gone
            raise
        finally:
            self._reading = False
            if self._closed:
                self._socket.close()
        return data

    def _wake_at(self, count: int) -> None:
        """Be woken when so many bytes are there: a slow link brings a packet at a time."""
        if count != self._woken_at:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            self._woken_at = count

    async def _receive(self, view: memoryview) -> int:
        count = await self._loop.sock_recv_into(self._socket, view)
        if not count:
            raise ConnectionResetError
        return count

    def _check_open(self) -> None:
        if self._closed:
            raise closed(self.peer_id)

    def _follow(self, ended: asyncio.Future[Frame]) -> None:
        """End with the call; what was sent before may still be under way."""
        if not ended.cancelled():
            ended.exception()  # whoever reads is told; if nobody does, it is not worth a log line
        if not self._closed:
            self._loop.call_later(_LAST_WORDS_S, self._hang_up)

    def _hang_up(self) -> None:
        """Wake who reads or sends; the socket may be closed already."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    async def _lost(self) -> PeerLostError:
        """Why the connection ended: the call knows more, and says so soon."""
        await asyncio.wait({self._call_ends}, timeout=_LAST_WORDS_S)
        if self._call_ends.done() and not self._call_ends.cancelled():
            exc = self._call_ends.exception()
            if isinstance(exc, PeerLostError):
                return exc
        return PeerLostError(f"peer {self.peer_id}: connection lost: its link went away")


class TcpListener:
    """Where connections come in whose tickets are out."""

    def __init__(self, listener: socket.socket, port: int):
        """Listen on a socket; ``port`` is gRPC's."""
        self._listener = listener
        self._offset = listener.getsockname()[1] - port
        self._expected: dict[bytes, asyncio.Future[socket.socket]] = {}
        self._loop = asyncio.get_running_loop()
        self._tasks = {asyncio.create_task(self._accept())}

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

    def offer(self) -> tuple[str, asyncio.Future[socket.socket]]:
        """Make a ticket; returns what to tell the other side, and what it connects with."""
        ticket = secrets.token_bytes(_TICKET_BYTES)
        expected = self._expected[ticket] = self._loop.create_future()
        expected.add_done_callback(lambda _: self._expected.pop(ticket, None))
        return f"{self._offset}:{ticket.hex()}", expected

    @staticmethod
    def withdraw(expected: asyncio.Future[socket.socket]) -> None:
        """Take no connection on this offer any more, nor keep the one that came."""
        if not expected.cancel() and not expected.cancelled():
            expected.result().close()

    async def aclose(self) -> None:
        """Take no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listener)
            except OSError:  # no descriptor left, or a caller that is gone already
                await asyncio.sleep(_PATIENCE_S)
                continue
            _set_up(connection)
            admitting = asyncio.create_task(self._admit(connection))
            self._tasks.add(admitting)
            admitting.add_done_callback(self._tasks.discard)

    async def _admit(self, connection: socket.socket) -> None:
        """Let in who shows a ticket, once and soon."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                expected = self._expected.pop(await _read(connection, _TICKET_BYTES), None)
                if expected is None or expected.done():
                    raise ConnectionRefusedError
                await self._loop.sock_sendall(connection, _WELCOME)
            if expected.done():  # withdrawn meanwhile
                raise ConnectionRefusedError
            expected.set_result(connection)
        except (OSError, asyncio.CancelledError):
            connection.close()


async def connect(address: str, offer: str) -> socket.socket:
    """Connect to where an :meth:`TcpListener.offer` of the peer at ``address`` leads.

    Raises:
        OSError: nobody is to be reached there, or it does not know the ticket; says so.
        ValueError: this is no offer.
    """
    host, _, grpc_port = address.rpartition(":")
    offset, _, ticket = offer.partition(":")
    port = int(grpc_port) + int(offset)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            return await _connect(host.strip("[]"), port, bytes.fromhex(ticket))
    except TimeoutError:
        raise OSError(f"port {port}: no answer within {_PATIENCE_S:g} s") from None
    except OSError as exc:
        why = os.strerror(exc.errno).lower() if exc.errno else str(exc)
        raise OSError(f"port {port}: {why}") from exc


async def _connect(host: str, port: int, ticket: bytes) -> socket.socket:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, where = found[0]
    connection = socket.socket(family, kind, protocol)
    try:
        _set_up(connection)
        await loop.sock_connect(connection, where)
        await loop.sock_sendall(connection, ticket)
        await _read(connection, len(_WELCOME))
    except BaseException:
        connection.close()
        raise
    return connection


def _set_up(connection: socket.socket) -> None:
    """Make a connection the loop's, and have small messages sent at once."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def _read(connection: socket.socket, count: int) -> bytes:
    loop, data = asyncio.get_running_loop(), b""
    while len(data) < count:
        more = await loop.sock_recv(connection, count - len(data))
        if not more:
            raise ConnectionRefusedError("not one of ours")
        data += more
    return data
