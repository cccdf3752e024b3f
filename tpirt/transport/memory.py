"""A pair of channels within one process: frames pass through the codec, no socket is involved."""

from __future__ import annotations

import asyncio

from tpirt.errors import PeerLostError
from tpirt.transport.codec import Frame
from tpirt.transport.deadline import Deadline


class MemoryChannel:
    """One end of an in-memory stream; make two with :func:`memory_pair`."""

    def __init__(
        self,
        peer_id: str,
        inbox: asyncio.Queue[bytes | bytearray],
        outbox: asyncio.Queue[bytes | bytearray],
    ):
        self.peer_id = peer_id
        self.via = "memory"
        self.bytes_sent = 0
        self.bytes_received = 0
        self._inbox = inbox
        self._outbox = outbox
        self._closed = False
        self._deadline = Deadline()

    async def send(self, frame: Frame) -> None:
        """See :class:`tpirt.transport.base.Channel`."""
        if self._closed:
            raise PeerLostError(f"{self.peer_id}: the channel is closed")
        data = frame.data
        self.bytes_sent += len(data)
        self._outbox.put_nowait(data)

    async def recv(self, timeout_s: float | None = None) -> Frame:
        """See :class:`tpirt.transport.base.Channel`."""
        try:
            data = await self._deadline.wait(self._inbox.get(), timeout_s)
        except TimeoutError as exc:
            raise PeerLostError(f"{self.peer_id}: said nothing for {timeout_s:g} s") from exc
        if not data:
            self._inbox.put_nowait(b"")  # every later call fails too
            raise PeerLostError(f"{self.peer_id}: left")
        self.bytes_received += len(data)
        return Frame.of(data, self.peer_id)

    async def aclose(self) -> None:
        """See :class:`tpirt.transport.base.Channel`."""
        if not self._closed:
            self._closed = True
            self._deadline.close()
            self._outbox.put_nowait(b"")
            self._inbox.put_nowait(b"")


def memory_pair(first: str, second: str) -> tuple[MemoryChannel, MemoryChannel]:
    """Make two connected channels: the first leads to peer ``first``, the other to ``second``."""
    there: asyncio.Queue[bytes | bytearray] = asyncio.Queue()
    back: asyncio.Queue[bytes | bytearray] = asyncio.Queue()
    return MemoryChannel(first, back, there), MemoryChannel(second, there, back)
