"""The interface between the protocol and the carriers of its bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tpirt.errors import TpirtError
from tpirt.transport.frame import Frame

if TYPE_CHECKING:
    from tpirt.identity.certificates import Certificate


class Carrier(NamedTuple):
    """The way frames travel, the reason why nothing better carries them, and what seals them."""

    kind: str  # tcp, grpc or memory
    reason: str = ""
    seal: str = ""  # a cipher, or TLS; empty in the clear


class Receiver(Protocol):
    """The owner's side of a channel; the channel calls it on the event loop.

    A :class:`~tpirt.errors.TpirtError` raised by ``on_frame`` ends the channel and is handed to
    ``on_lost``. Any other exception is a bug: it goes to the loop's exception handler, with its
    traceback, and ``on_lost`` gets a ``TransportError``.
    """

    def on_frame(self, frame: Frame) -> None:
        """Take the next frame, in order."""

    def on_lost(self, exc: TpirtError) -> None:
        """Take note that nothing more comes; called once, and not after ``aclose``.

        ``exc`` is a ``PeerLostError`` if the other side is gone, a ``TransportError`` if it sent
        something that is not a frame or is too large. The channel still has to be closed.
        """


class Channel(Protocol):
    """An ordered, reliable, two-way stream of frames to one other peer.

    Attributes:
        peer_id: the peer's name in errors.
        carrier: what carries the frames.
        bytes_sent, bytes_received: so far, headers included. They also move while only a part of
            a large frame is through: a peer whose counters move is alive.
        frame_limit: largest message plus payload that is accepted, in bytes; checked before memory
            is allocated. 64 KiB until the owner raises it. Applies to frames that come later.
    """

    peer_id: str
    carrier: Carrier
    bytes_sent: int
    bytes_received: int
    frame_limit: int

    def start(self, receiver: Receiver) -> None:
        """Begin to read, once. Frames that came before are delivered in order.

        On a channel that is closed or lost already, ``on_lost`` is called soon.
        """

    def poll(self) -> None:
        """Deliver what has arrived already, without waiting.

        Does nothing over gRPC, whose library reads on its own schedule.
        """

    async def send(self, frame: Frame) -> None:
        """Send a frame; returns when the carrier has taken all of it.

        Several tasks may send; frames do not interleave and keep the order of the calls. The
        payload's memory may be changed once this returns or is cancelled. A cancelled send still
        sends the whole frame, in the background, and leaves the channel usable.

        Raises:
            PeerLostError: the other side is gone, or the channel is closed.
            TransportError: the other side sent garbage before.
        """

    def send_nowait(self, frame: Frame) -> bool:
        """Send a small frame (a heartbeat) unless others wait to be sent; False if they do.

        Also False on a channel that is closed or lost.
        """

    async def aclose(self) -> None:
        """End the stream. Sends under way raise ``PeerLostError``. Safe to call twice.

        On a server's side the call ends when the service's ``session`` or ``link`` returns.
        """


class PeerService(Protocol):
    """The handlers of a peer; a transport's server calls them.

    A ``TpirtError`` that they raise reaches the caller with its message.
    """

    async def answer(self, method: str, request: bytes) -> bytes:
        """Answer a request: ``Hello``, ``Inventory`` or ``Renew``."""

    async def receive(self, method: str, chunks: AsyncIterator[bytes]) -> bytes:
        """Take an upload: ``PutUnits``."""

    async def session(self, channel: Channel) -> None:
        """Serve one master until it leaves."""

    async def link(self, channel: Channel) -> None:
        """Use a channel from another worker of the same session, until the session ends."""


class PeerClient(Protocol):
    """A way to one peer.

    Attributes:
        certificate: what it has shown; None before the first call, and where nothing is proved.
    """

    peer_id: str
    address: str
    certificate: Certificate | None

    async def connect(self) -> None:
        """Learn who answers, before anything is asked; else the first call does it.

        Raises:
            PeerUnreachableError: nobody answers.
            IdentityError: not a peer of this cluster.
        """

    async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        """Make one request.

        Cancelled, the answer is ignored; the peer may have done what was asked.

        Raises:
            PeerUnreachableError: no answer within ``timeout_s``.
            HandshakeError: something else than a tpirt peer answers.
            PeerError: the peer could not do it.
            DamagedLinkError: what the peer got, in the clear, was no request.
        """

    async def upload(self, method: str, chunks: AsyncIterator[bytes], timeout_s: float) -> bytes:
        """Send chunks of at most 1 MiB; returns the answer.

        Failed or cancelled, the call has ended, and the peer's ``receive`` fails or is cancelled.

        Raises:
            PeerLostError: the peer is gone, or took no chunk for ``timeout_s``.
            StoreError: the peer could not keep it.
        """

    async def open_session(self) -> Channel:
        """Open a master's channel to a worker; whether it is accepted shows when it is read.

        Cancelled, a call that was begun ends when the client is closed.
        """

    async def open_link(self) -> Channel:
        """Open a worker's channel to another worker; else as :meth:`open_session`."""

    async def aclose(self) -> None:
        """Close the connection and every channel; requests under way fail.

        A later call connects again. Cancelled, what was not closed yet stays open.
        """
