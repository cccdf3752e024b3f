"""A pair of channels within one process, over pipes that behave like sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from tpirt.errors import PeerLostError
from tpirt.transport.base import Carrier
from tpirt.transport.stream import Buffer, StreamChannel, closed, cut


class Pipe:
    """Bytes on their way in one direction.

    Attributes:
        on_readable, on_writable: called soon after bytes have come or gone.
    """

    def __init__(self, capacity: int | None):
        self.on_readable: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None
        self._bytes = bytearray()
        self._capacity = capacity
        self._closed = False

    def write(self, parts: Sequence[Buffer]) -> int:
        """Take what fits; returns the number of bytes."""
        if self._closed:
            raise BrokenPipeError
        total = sum(map(len, parts))
        room = total if self._capacity is None else self._capacity - len(self._bytes)
        data = cut(parts, room)
        self._bytes += data
        self._call_soon(self.on_readable)
        return len(data)

    def read_into(self, space: memoryview) -> int:
        """Read what is there; returns 0 at the end."""
        count = min(len(space), len(self._bytes))
        if not count and not self._closed:
            raise BlockingIOError
        space[:count] = self._bytes[:count]
        del self._bytes[:count]
        self._call_soon(self.on_writable)
        return count

    def close(self) -> None:
        """Take nothing more; what is there can still be read."""
        self._closed = True
        self._call_soon(self.on_readable)

    @staticmethod
    def _call_soon(callback: Callable[[], None] | None) -> None:
        if callback is not None:
            asyncio.get_running_loop().call_soon(callback)


class MemoryChannel(StreamChannel):
    """One end of a pair; make two with :func:`memory_pair`."""

    def __init__(self, peer_id: str, inbox: Pipe, outbox: Pipe):
        super().__init__(peer_id, Carrier("memory"))
        self._in = inbox
        self._out = outbox
        self._out.on_writable = self._flush

    def poll(self) -> None:
        """See :class:`tpirt.transport.base.Channel`."""
        while self._receiver is not None:
            try:
                count = self._in.read_into(self._reader.space())
            except BlockingIOError:
                return
            if not count:
                self._lost(PeerLostError(f"peer {self.peer_id}: left"))
                return
            self.bytes_received += count
            self._reader.filled(count)
            self._deliver(iter(self._reader.next, None))

    async def aclose(self) -> None:
        """See :class:`tpirt.transport.base.Channel`."""
        self._give_up(closed(self.peer_id))
        self._in.close()
        self._out.close()

    def _begin(self) -> None:
        self._in.on_readable = self.poll
        asyncio.get_running_loop().call_soon(self.poll)

    def _write(self, parts: Sequence[Buffer]) -> int:
        try:
            count = self._out.write(parts)
        except BrokenPipeError:
            self._lost(PeerLostError(f"peer {self.peer_id}: left"))
            return 0
        self.bytes_sent += count
        return count

    def _write_later(self) -> None:
        """The pipe says when bytes have gone."""


def memory_pair(
    first: str, second: str, capacity: int | None = None
) -> tuple[MemoryChannel, MemoryChannel]:
    """Make two connected channels: the first leads to peer ``first``, the other to ``second``.

    Each direction holds ``capacity`` bytes that the other side has not read; more has to wait.
    """
    there, back = Pipe(capacity), Pipe(capacity)
    return MemoryChannel(first, back, there), MemoryChannel(second, there, back)
