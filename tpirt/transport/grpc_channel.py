"""gRPC's options, a channel over one of its streams, and the wording of its errors.

Reference for the options: gRPC core's channel arguments and its keepalive guide. Keepalive pings
are answered by gRPC's own threads, so a peer that computes for a long time is not taken for dead.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Sequence
from importlib.metadata import version
from typing import Any, TypeVar

# gRPC's core reads these once, when it is loaded. Its own log lines (a peer's goodbye, say) mean
# nothing to a user; what matters arrives as our errors.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# Names that only the system's resolver knows, such as pi.local: gRPC's own asks DNS alone.
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")
# Our children exec at once: gRPC need not stop its threads around a fork, which can abort.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# A task that waits for a completion polls the sockets itself, instead of being woken by a pool of
# threads that do: a round trip of 16 KiB takes 155 us instead of 240 (docs/collectives.md). The
# names are those of one version; another one logs an error about names it does not know.
if version("grpcio").startswith("1.85."):
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

import grpc
import grpc.aio

from tpirt.errors import HandshakeError, PeerLostError, PeerUnreachableError, TpirtError
from tpirt.printable import printable_line
from tpirt.transport.address import Address
from tpirt.transport.base import Carrier
from tpirt.transport.stream import StreamChannel, closed

_T = TypeVar("_T")

RETRY_S = 0.25
CONNECT_S = 5.0  # for a connection to stand, and the other side to speak HTTP/2
_LAST_WORDS_S = 0.5  # for what a call still brings after a write has failed
MESSAGE_BYTES = 64 << 10  # of a stream in one gRPC message: progress is seen by whole ones
_MESSAGE_LIMIT = 4 << 20  # of requests and uploads: the digests of a large model's units
_KEEPALIVE_MS = 2_000
# Far above what a slow link may take: heartbeats tell whether a peer is alive, not these pings.
_KEEPALIVE_TIMEOUT_MS = 120_000

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", _MESSAGE_LIMIT),
    ("grpc.max_receive_message_length", _MESSAGE_LIMIT),
    # A fixed window. One that grows with the link's delay fills the buffers of a slow link, and is
    # opened again by halves: at 100 kbit/s a sender waits for most of a minute, as for a dead peer.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 128 << 10),
    # Accept no compression: a message of 1 MB could become 1 GB.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    # The one that counts: gRPC core never starts its keepalive timer (grpc/grpc#39239), so that a
    # ping without an answer is noticed by this timeout alone, after a minute by default.
    ("grpc.http2.ping_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server beside it
    ("grpc.enable_retries", 0),  # streams are never retried; what would do it costs every message
    ("grpc.enable_http_proxy", 0),  # peers are on the local network
    # A client that connects again must not get the dead connection of the one before.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.min_reconnect_backoff_ms", int(CONNECT_S * 1e3)),  # and the limit of an attempt
    ("grpc.initial_reconnect_backoff_ms", int(RETRY_S * 1e3)),
    ("grpc.max_reconnect_backoff_ms", int(RETRY_S * 1e3)),
)

_HANDSHAKE_MS = 5_000  # for a connection to begin to speak HTTP/2
_IDLE_MS = 20_000  # for a connection without a call; a client connects again when it needs one
_MOST_STREAMS = 16  # calls at a time on one connection: a master makes one or two

ERRORS = (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.BaseError)


def server_options(most_connections: int) -> tuple[tuple[str, int], ...]:
    """Return a server's options: how much callers may take that nobody knows."""
    return (
        *OPTIONS,
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
        ("grpc.max_concurrent_streams", _MOST_STREAMS),
        ("grpc.max_allowed_incoming_connections", most_connections),
    )


class GrpcChannel(StreamChannel):
    """Frames over a call's stream of messages, whose boundaries mean nothing.

    ``call`` is the client's stream call or the server's servicer context: both have ``read`` and
    ``write`` coroutines, and the client's has ``cancel``.
    """

    def __init__(self, peer_id: str, call: Any, *, protected: bool = False):
        super().__init__(peer_id, Carrier("grpc", seal="TLS" if protected else ""))
        self._call = call
        self._ahead: asyncio.Task[Any] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._writing: asyncio.Task[None] | None = None

    def first(self) -> asyncio.Task[Any]:
        """Read one message ahead of :meth:`start`; done when it is here, or the call's end is."""
        self._ahead = asyncio.create_task(self._read())
        self._ahead.add_done_callback(_retrieve)  # the channel may never be started
        return self._ahead

    async def aclose(self) -> None:
        """See :class:`tpirt.transport.base.Channel`."""
        self._give_up(closed(self.peer_id))
        tasks = [task for task in (self._ahead, self._reading, self._writing) if task is not None]
        for task in tasks:
            task.cancel()
        cancel = getattr(self._call, "cancel", None)
        if cancel is not None:
            cancel()
        # gRPC's connection is closed when nothing refers to a call on it any more, and a task that
        # was cancelled does, by its traceback.
        self._call = self._ahead = self._reading = self._writing = None
        await asyncio.gather(*tasks, return_exceptions=True)

    async def stay(self) -> None:
        """Tell the server, with an empty message, that no connection will come for this call.

        Raises:
            PeerLostError: it does not take the message within ``CONNECT_S``; the call has ended.
        """
        if self._error is not None:
            return
        try:
            async with asyncio.timeout(CONNECT_S):
                await own(self._call.write(b""), self.peer_id)
        except TimeoutError:
            raise PeerLostError(
                f"peer {self.peer_id}: took nothing for {CONNECT_S:g} s; it hangs, or its link "
                "does",
                peer_id=self.peer_id,
            ) from None
        except (*ERRORS, PeerLostError):
            pass  # the reader will learn why

    async def _read(self) -> Any:
        return await own(self._call.read(), self.peer_id)

    def _begin(self) -> None:
        self._reading = asyncio.create_task(self._read_all())

    async def _read_all(self) -> None:
        try:
            data = await (self._ahead or self._read())
            while data is not grpc.aio.EOF:
                self.bytes_received += len(data)
                self._deliver(self._reader.feed(data))
                if self._receiver is None:
                    return
                data = await self._read()
        except PeerLostError as exc:
            self._lost(exc)
        except ERRORS as exc:
            self._lost(await self._reason(exc))
        else:
            self._lost(await self._reason(None))

    def _write_later(self) -> None:
        self._writing = asyncio.create_task(self._write_all())

    async def _write_all(self) -> None:
        try:
            while self._outbox:
                outgoing = self._outbox[0]
                while piece := outgoing.cut(MESSAGE_BYTES):
                    await own(self._call.write(piece), self.peer_id)
                    outgoing.skip(len(piece))
                    self.bytes_sent += len(piece)
                self._sent()
        except (PeerLostError, *ERRORS) as exc:
            if self._reading is not None:  # the last frames of the other side come first
                await asyncio.wait({self._reading}, timeout=_LAST_WORDS_S)
            self._lost(exc if isinstance(exc, PeerLostError) else await self._reason(exc))

    async def _reason(self, exc: BaseException | None) -> PeerLostError:
        details = ""
        if isinstance(exc, grpc.aio.AioRpcError):
            details = details_of(exc)
        elif isinstance(self._call, grpc.aio.Call) and self._call.done():
            details = printable_line(await self._call.details() or "")
        return lost(self.peer_id, details)


def _retrieve(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


async def own(operation: Awaitable[_T], peer_id: str) -> _T:
    """Await an operation of a call, and tell our task's cancellation from that of the call.

    Raises:
        PeerLostError: the call was cancelled, which looks the same.
    """
    try:
        return await operation
    except asyncio.CancelledError:
        if _is_cancelled():
            raise
        raise lost(peer_id, "the call was cancelled") from None


def _is_cancelled() -> bool:
    task = asyncio.current_task()  # not in the frame of a traceback that the task itself keeps
    return task is not None and task.cancelling() > 0


def details_of(exc: grpc.aio.AioRpcError) -> str:
    """Return what the other side says about an error, fit for a terminal."""
    return printable_line(exc.details() or exc.code().name.lower())


def lost(peer_id: str, details: str | None) -> PeerLostError:
    """Word the end of a connection for a user who does not know gRPC."""
    details = details or "the connection closed"
    if "ping timeout" in details or "keepalive" in details:
        why = (
            f"it has not answered for {_KEEPALIVE_TIMEOUT_MS / 1e3:g} s; it hangs, or its link does"
        )
    elif any(
        sign in details for sign in ("Socket closed", "reset by peer", "Broken pipe", "GOAWAY")
    ):
        why = f"it ended, was killed, or its machine went away ({details})"
    elif "Cancelling all calls" in details:
        why = "it was stopped"
    else:
        why = details
    return PeerLostError(f"peer {peer_id}: connection lost: {why}", peer_id=peer_id)


def is_foreign(exc: grpc.aio.AioRpcError) -> bool:
    """Tell whether the service that answered does not speak our protocol."""
    return exc.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL) or (
        "Failed parsing HTTP/2" in (exc.details() or "")
    )


def unreachable(
    address: Address, exc: grpc.aio.AioRpcError, timeout_s: float, known: Sequence[str] = ()
) -> TpirtError:
    """Word a request that got no answer: the peer as the user gave it, why, and what to do.

    ``known`` are names that could be meant instead of an unknown host.
    """
    details = printable_line(exc.details() or "")
    cause = details.rpartition("last error: ")[2]
    if is_foreign(exc):
        return HandshakeError(
            f"peer {address}: something else than a tpirt peer answers there ({cause}); check the "
            "port"
        )
    if exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED or "SETTINGS" in details:
        wait_s = CONNECT_S if "SETTINGS" in details else timeout_s
        return PeerUnreachableError(
            f"peer {address}: something listens there, but does not answer within {wait_s:g} s; is "
            "it a tpirt peer, and not stopped or busy?"
        )
    for signs, why in _CAUSES.items():
        if any(sign in details for sign in signs):
            words = why.format(port=address.port, patience=f"{CONNECT_S:g} s")
            if known and "host name" in words:
                words += f". Devices of the cluster: {', '.join(known)}"
            return PeerUnreachableError(f"peer {address}: {words}")
    return PeerUnreachableError(f"peer {address}: {cause}; is `tpirt peer` running there?")


_CAUSES = {  # gRPC's and the system's words for it, ours, and what to do
    ("Name or service not known", "No address", "nodename nor servname", "does not resolve"): (
        "the host name is unknown; check its spelling, or give its IP address"
    ),
    ("in name resolution",): (
        "the host name cannot be looked up now; is this machine online? Or give its IP address"
    ),
    ("Connection refused",): (
        "nothing listens there (connection refused); is `tpirt peer` running there, on port {port} "
        "and on an address that others reach?"
    ),
    ("No route to host", "Network is unreachable", "Host is down"): (
        "there is no route to it; is it switched on and in this network?"
    ),
    ("Socket closed", "reset by peer"): (
        "something listens there, but hangs up; is it a tpirt peer, and not full?"
    ),
    ("hung up",): (
        "it uses TLS, but hung up before it said anything; is it just starting, or full? If not, "
        "is its clock right?"
    ),
    ("imed out", "imeout"): (
        "no answer within {patience}; is it switched on, and does its firewall allow port {port}?"
    ),
}
