"""The seam between what ranks say and what carries it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from tpirt.errors import PeerLostError
from tpirt.transport.codec import Frame
from tpirt.transport.pb import tpirt_pb2 as pb


class Channel(Protocol):
    """An ordered, reliable, two-way stream of frames to one other peer.

    One coroutine may send while one other receives. A cancelled ``recv`` may close the channel:
    cancel only what is being given up.

    Attributes:
        peer_id: whom errors name.
        via: what carries the frames, and in brackets why nothing better does.
        bytes_sent, bytes_received: so far.
    """

    peer_id: str
    via: str
    bytes_sent: int
    bytes_received: int

    async def send(self, frame: Frame) -> None:
        """Hand ``frame`` over, in order.

        Raises:
            PeerLostError: the other side is gone.
        """

    async def recv(self, timeout_s: float | None = None) -> Frame:
        """Wait for the next frame; what it says is read, and refused if it is none, by its user.

        Raises:
            PeerLostError: the other side is gone, or said nothing for ``timeout_s``.
        """

    async def aclose(self) -> None:
        """End the stream; the other side's ``recv`` fails. Safe to call twice."""


def silent(peer_id: str, timeout_s: float | None) -> PeerLostError:
    """What a channel's ``recv`` raises at its deadline."""
    return PeerLostError(
        f"peer {peer_id}: said nothing for {timeout_s:g} s; it hangs, or its link does"
    )


def closed(peer_id: str) -> PeerLostError:
    """What a channel raises whose own side has closed it."""
    return PeerLostError(f"peer {peer_id}: the channel is closed")


class PeerService(Protocol):
    """What a worker answers; a transport's server calls it."""

    async def hello(self, request: pb.HelloRequest) -> pb.HelloReply:
        """Tell who this peer is."""

    async def put_slice(self, chunks: AsyncIterator[pb.SliceChunk]) -> pb.PutSliceReply:
        """Store a slice."""

    async def session(self, channel: Channel) -> None:
        """Serve one master until it leaves."""

    async def link(self, channel: Channel) -> None:
        """Let another worker of the same session have a channel, until the session ends."""


class PeerClient(Protocol):
    """A master's way to one worker, or another worker's."""

    peer_id: str
    address: str

    async def hello(self, request: pb.HelloRequest, timeout_s: float) -> pb.HelloReply:
        """Ask who it is.

        Raises:
            PeerUnreachableError: nobody answers within ``timeout_s``.
        """

    async def put_slice(self, chunks: AsyncIterator[pb.SliceChunk]) -> pb.PutSliceReply:
        """Upload a slice.

        Raises:
            PeerLostError: the peer is gone.
            StoreError: the peer could not keep it.
        """

    async def open_session(self) -> Channel:
        """Begin a session.

        Raises:
            HandshakeError: the peer serves another master.
        """

    async def open_link(self) -> Channel:
        """Open a worker's channel to another worker; nothing is known of it until it answers."""

    async def aclose(self) -> None:
        """Close the connection."""
