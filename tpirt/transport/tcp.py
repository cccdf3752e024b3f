"""Frames over a TCP connection that belongs to a gRPC call.

Frames are exchanged some hundred times per token, and gRPC takes several times as long for an
exchange of partial sums as the socket below it (docs/collectives.md). So the side that answers a
call offers a port and a ticket (:mod:`tpirt.transport.tickets`), and the caller connects there. The
call stays open: its end says why the other side left.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence

from tpirt.errors import PeerLostError, TpirtError
from tpirt.transport.base import Carrier, Channel
from tpirt.transport.frame import Frame
from tpirt.transport.stream import Buffer, StreamChannel, closed
from tpirt.transport.tickets import Connection

_PORTION_BYTES = 128 << 10  # of a large frame: what is worth waking up for
_LAST_WORDS_S = 0.5  # between the end of a call and that of its connection, in either order


class TcpChannel(StreamChannel):
    """A connection and its call. See :class:`tpirt.transport.base.Channel`."""

    def __init__(self, connection: Connection, call: Channel, *, served: bool = False):
        """Take over a connected, non-blocking socket; nothing more is sent on ``call``.

        ``served`` is true on the side that answered the call: it calls :meth:`leave` at last.
        """
        super().__init__(call.peer_id, Carrier("tcp"))
        self._socket = connection.socket
        self._sendmsg: Callable[[Sequence[Buffer]], int] = connection.socket.sendmsg
        if connection.seal is not None:
            from tpirt.transport.sealing import SealedReader, SealedWriter

            self.carrier = Carrier("tcp", seal=connection.seal.cipher)
            self._sendmsg = SealedWriter(connection.socket, connection.seal).sendmsg
            self._reader = SealedReader(call.peer_id, connection.seal)
        self._call = call
        self._served = served
        self._loop = asyncio.get_running_loop()
        self._wake_at = 1  # SO_RCVLOWAT
        self._broken = False  # the connection is; why is still to be learnt from the call
        self._reason: TpirtError | None = None  # why the call ended
        self._timer: asyncio.TimerHandle | None = None
        call.start(_CallEnd(self))

    def poll(self) -> None:
        """See :class:`tpirt.transport.base.Channel`."""
        while self._read():
            pass

    async def aclose(self) -> None:
        """See :class:`tpirt.transport.base.Channel`."""
        self._give_up(closed(self.peer_id))
        self._stop()
        if self._served:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
        else:
            self._socket.close()
        await self._call.aclose()

    async def leave(self) -> None:
        """Close, but let the other side read what was sent last.

        A connection that is closed with unread data is reset, which discards what is under way.
        """
        self._receiver = None
        self._stop_reading()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    if self._outbox:
                        await asyncio.wait({self._outbox[-1].done})
            await self.aclose()
            with contextlib.suppress(OSError):  # a timeout included
                async with asyncio.timeout(_LAST_WORDS_S):
                    while await self._loop.sock_recv(self._socket, _PORTION_BYTES):
                        pass
        finally:
            self._socket.close()

    # -- reading ---------------------------------------------------------------------------

    def _begin(self) -> None:
        self._loop.add_reader(self._socket.fileno(), self._read)

    def _read(self) -> bool:
        """Read once and deliver; returns whether more may be there."""
        if self._receiver is None or self._broken:
            return False
        space = self._reader.space()
        try:
            count = self._socket.recv_into(space)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            count = 0
        if not count:
            self._break()
            return False
        self.bytes_received += count
        self._reader.filled(count)
        self._deliver(iter(self._reader.next, None))
        # A slow link brings a packet at a time; do not wake up for each.
        wake_at = min(self._reader.missing, _PORTION_BYTES) or 1
        if wake_at != self._wake_at and self._receiver is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wake_at)
            self._wake_at = wake_at
        return count == len(space)

    # -- writing ---------------------------------------------------------------------------

    def _write(self, parts: Sequence[Buffer]) -> int:
        try:
            count = self._sendmsg(parts)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self._hang_up()
            return 0
        self.bytes_sent += count
        return count

    def _write_later(self) -> None:
        if not self._broken:
            self._loop.add_writer(self._socket.fileno(), self._flush)

    def _write_no_more(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.remove_writer(self._socket.fileno())

    # -- the end ---------------------------------------------------------------------------

    def call_ended(self, reason: TpirtError) -> None:
        """End with the call; what was sent before may still be under way."""
        self._reason = reason
        if self._broken:
            self._report()
        elif self._error is None:
            self._timer = self._loop.call_later(_LAST_WORDS_S, self._hang_up)

    def _hang_up(self) -> None:
        """End the connection; what has arrived is still read."""
        if self._error is not None:
            return
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._write_no_more()
        if self._receiver is None:
            self._break()

    def _break(self) -> None:
        """Report the end of the connection; the call knows why, or will soon."""
        if self._broken:
            return
        self._stop()
        self._broken = True
        if self._reason is not None:
            self._report()
        else:
            self._timer = self._loop.call_later(_LAST_WORDS_S, self._report)

    def _report(self) -> None:
        if self._error is None:
            generic = PeerLostError(f"peer {self.peer_id}: connection lost: its link went away")
            self._lost(self._reason or generic)

    def _lost(self, exc: TpirtError) -> None:
        self._stop()
        super()._lost(exc)

    def _stop(self) -> None:
        """Have the loop call nothing more for this connection."""
        if self._timer is not None:
            self._timer.cancel()
        self._stop_reading()
        self._write_no_more()

    def _stop_reading(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())


class _CallEnd:
    """Watches the call; nothing is said on it, so anything that comes is its end."""

    def __init__(self, channel: TcpChannel):
        self._channel = channel

    def on_frame(self, frame: Frame) -> None:
        """Refuse a frame that belongs on the connection."""
        raise PeerLostError(f"peer {self._channel.peer_id}: it sent a frame beside its connection")

    def on_lost(self, exc: TpirtError) -> None:
        """Pass the reason on."""
        self._channel.call_ended(exc)
