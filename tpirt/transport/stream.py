"""The common part of all channels: frames in and out of a stream of bytes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence

from tpirt.errors import PeerLostError, TpirtError, TransportError
from tpirt.transport.base import Carrier, Receiver
from tpirt.transport.frame import Frame, FrameReader

Buffer = memoryview | bytes


class Outgoing:
    """A frame that waits to be sent, or the rest of one.

    Attributes:
        views: the bytes that are left.
        done: done when the carrier has taken all of them.
    """

    __slots__ = ("done", "views")

    def __init__(self, views: Iterable[Buffer], sent: int):
        self.views: list[memoryview] = [memoryview(view) for view in views if len(view)]
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.skip(sent)

    def skip(self, count: int) -> None:
        """Drop the first ``count`` bytes, which are sent."""
        while self.views and count >= len(self.views[0]):
            count -= len(self.views.pop(0))
        if count:
            self.views[0] = self.views[0][count:]

    def cut(self, limit: int) -> bytes:
        """Return up to ``limit`` bytes; they are still to be sent."""
        return cut(self.views, limit)

    def keep(self) -> None:
        """Copy what is left: its memory belongs to a send that was cancelled."""
        self.views = [memoryview(data)] if (data := b"".join(self.views)) else []
        self.done = asyncio.get_running_loop().create_future()

    def fail(self, exc: TpirtError) -> None:
        """Wake the sender; there may be none any more."""
        if not self.done.done():
            self.done.set_exception(exc)
            self.done.exception()  # nobody need retrieve it


class StreamChannel:
    """See :class:`tpirt.transport.base.Channel`.

    A carrier implements ``aclose``, :meth:`_begin`, :meth:`_write` and :meth:`_write_later`; it
    hands frames to :meth:`_deliver` and reports with :meth:`_lost` that nothing more comes.
    """

    def __init__(self, peer_id: str, carrier: Carrier):
        self.peer_id = peer_id
        self.carrier = carrier
        self.bytes_sent = 0
        self.bytes_received = 0
        self._reader = FrameReader(peer_id)
        self._receiver: Receiver | None = None
        self._outbox: deque[Outgoing] = deque()
        self._error: TpirtError | None = None  # why the channel is of no use any more

    @property
    def frame_limit(self) -> int:
        """See :class:`tpirt.transport.base.Channel`."""
        return self._reader.limit

    @frame_limit.setter
    def frame_limit(self, limit: int) -> None:
        self._reader.limit = limit

    def start(self, receiver: Receiver) -> None:
        """See :class:`tpirt.transport.base.Channel`."""
        if self._error is not None:
            asyncio.get_running_loop().call_soon(receiver.on_lost, self._error)
            return
        self._receiver = receiver
        self._begin()

    def poll(self) -> None:
        """See :class:`tpirt.transport.base.Channel`."""

    async def send(self, frame: Frame) -> None:
        """See :class:`tpirt.transport.base.Channel`."""
        if self._error is not None:
            raise self._error
        parts = frame.parts()
        sent = 0 if self._outbox else self._write(parts)
        if sent == frame.nbytes:
            return
        outgoing = self._enqueue(parts, sent)
        try:
            await outgoing.done
        except asyncio.CancelledError:
            outgoing.keep()
            raise

    def send_nowait(self, frame: Frame) -> bool:
        """See :class:`tpirt.transport.base.Channel`."""
        if self._error is not None or self._outbox:
            return False
        parts = frame.parts()
        sent = self._write(parts)
        if sent < frame.nbytes:
            self._enqueue(parts, sent).keep()
        return True

    # -- what a carrier implements ---------------------------------------------------------

    def _begin(self) -> None:
        """Begin to read."""
        raise NotImplementedError

    def _write(self, parts: Sequence[Buffer]) -> int:
        """Write what the carrier takes at once; returns the number of bytes. Never raises."""
        return 0

    def _write_later(self) -> None:
        """Have :meth:`_flush` called when the carrier takes more."""
        raise NotImplementedError

    def _write_no_more(self) -> None:
        """Nothing is left to be written."""

    # -- what a carrier uses ---------------------------------------------------------------

    def _flush(self) -> None:
        """Write from the outbox what the carrier takes at once."""
        while self._outbox:
            outgoing = self._outbox[0]
            outgoing.skip(self._write(outgoing.views))
            if outgoing.views:
                return
            self._sent()
        self._write_no_more()

    def _sent(self) -> None:
        """Take the first frame off the outbox; all of it is sent."""
        outgoing = self._outbox.popleft()
        if not outgoing.done.done():
            outgoing.done.set_result(None)

    def _deliver(self, frames: Iterable[Frame]) -> None:
        """Hand frames to the receiver, until it closes the channel."""
        try:
            for frame in frames:
                if self._receiver is None:
                    return
                self._receiver.on_frame(frame)
        except TpirtError as exc:
            self._lost(exc)
        except Exception as exc:
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"peer {self.peer_id}: handling a frame failed", "exception": exc}
            )
            self._lost(TransportError(f"peer {self.peer_id}: handling a frame failed: {exc!r}"))

    def _lost(self, exc: TpirtError) -> None:
        """Give the channel up and tell its owner, once."""
        receiver = self._receiver
        self._give_up(exc)
        if receiver is not None:
            receiver.on_lost(exc)

    def _give_up(self, exc: TpirtError) -> None:
        """Refuse all sends, those under way included; deliver nothing more."""
        self._receiver = None
        self._reader.close()
        self._error = self._error or exc
        while self._outbox:
            self._outbox.popleft().fail(self._error)

    def _enqueue(self, parts: Iterable[Buffer], sent: int) -> Outgoing:
        outgoing = Outgoing(parts, sent)
        if self._error is not None:  # the attempt to write has shown it
            outgoing.fail(self._error)
            return outgoing
        self._outbox.append(outgoing)
        if len(self._outbox) == 1:
            self._write_later()
        return outgoing


def cut(views: Iterable[Buffer], limit: int) -> bytes:
    """Join the first ``limit`` bytes of some views."""
    pieces = []
    for view in views:
        pieces.append(view[:limit])
        limit -= len(pieces[-1])
        if not limit:
            break
    return b"".join(pieces)


def closed(peer_id: str) -> PeerLostError:
    """Return the error of a channel that its own side has closed."""
    return PeerLostError(f"peer {peer_id}: the channel is closed", peer_id=peer_id)
