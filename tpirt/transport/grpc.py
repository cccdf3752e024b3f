"""gRPC as transport: the worker's server, the master's client, and their channels.

Reference for the options: gRPC core's channel arguments and its keepalive guide. Keepalive pings
are answered by gRPC's own threads, so a peer that computes for a long time is not taken for dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import version
from typing import Any, TypeVar

# gRPC's core reads this once, when it is loaded. Its own log lines (a peer's goodbye, say) mean
# nothing to a user; what matters arrives as our errors.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# Our children exec at once: gRPC need not stop its threads around a fork, which can abort.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# Whoever waits for a completion polls the sockets itself, instead of being woken by a pool of
# threads that do: a round trip of 16 KiB takes 155 us instead of 240 (docs/collectives.md). The
# names are those of one version; another one logs an error when it meets names it does not know.
if version("grpcio").startswith("1.85."):
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

import grpc
import grpc.aio

from tpirt.errors import (
    HandshakeError,
    PeerLostError,
    PeerUnreachableError,
    StoreError,
    TpirtError,
    TransportError,
)
from tpirt.transport.base import Channel, PeerService, closed, silent
from tpirt.transport.codec import Frame
from tpirt.transport.deadline import Deadline
from tpirt.transport.pb import tpirt_pb2 as pb
from tpirt.transport.tcp import MAX_FRAME_BYTES, TcpChannel, TcpListener, connect

_T = TypeVar("_T")
_SERVICE = "tpirt.v1.Peer"
_OFFER = "tpirt-tcp"  # metadata of an answer: where frames may go instead; see tpirt.transport.tcp
_OFFER_S = 2.0  # for it to come
_KEEPALIVE_MS = 2_000
_KEEPALIVE_TIMEOUT_MS = 6_000  # a large frame on a slow link may stand before the answer
_PATIENCE_S = 3.0  # with a peer that is just being started
_RETRY_S = 0.25
_LEAVE_S = 10.0  # for a session to end by itself: threads that read or compute a block

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
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
    ("grpc.initial_reconnect_backoff_ms", int(_RETRY_S * 1e3)),
    ("grpc.max_reconnect_backoff_ms", int(_RETRY_S * 1e3)),
)


class GrpcChannel:
    """A session's stream; the same on the master's and the worker's side.

    ``call`` is the client's stream call or the server's servicer context: both have ``read`` and
    ``write`` coroutines and ``cancel``.
    """

    def __init__(self, peer_id: str, call: Any):
        self.peer_id = peer_id
        self.via = "grpc"
        self.bytes_sent = 0
        self.bytes_received = 0
        self._call = call
        self._closed = False
        self._deadline = Deadline()
        self._unread: asyncio.Task[Frame] | None = None

    def unread(self, frame: asyncio.Task[Frame]) -> None:
        """Have the next :meth:`recv` return what has been read already."""
        self._unread = frame

    async def send(self, frame: Frame) -> None:
        """See :class:`tpirt.transport.base.Channel`."""
        self._check_open()
        data = frame.data
        try:
            await self._call.write(data)
        except (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.BaseError) as exc:
            raise await self._lost(exc) from exc
        self.bytes_sent += len(data)

    async def recv(self, timeout_s: float | None = None) -> Frame:
        """See :class:`tpirt.transport.base.Channel`."""
        self._check_open()
        if self._unread is not None:
            unread, self._unread = self._unread, None
            return await unread
        try:
            data = await self._deadline.wait(self._read(), timeout_s)
        except TimeoutError as exc:
            raise silent(self.peer_id, timeout_s) from exc
        except (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.BaseError) as exc:
            raise await self._lost(exc) from exc
        if data is grpc.aio.EOF:
            raise await self._lost(None)
        self.bytes_received += len(data)
        return Frame.of(data, self.peer_id)

    async def aclose(self) -> None:
        """See :class:`tpirt.transport.base.Channel`.

        On a worker's side the stream itself ends when the service's ``session`` returns.
        """
        self._closed = True
        self._deadline.close()
        cancel = getattr(self._call, "cancel", None)
        if cancel is not None:
            cancel()

    def _check_open(self) -> None:
        if self._closed:
            raise closed(self.peer_id)

    async def _read(self) -> Any:
        """Read, and tell our task's cancellation from that of the call, which looks the same."""
        try:
            return await self._call.read()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                self._check_open()
            self._closed = True  # a cancelled read has torn the stream down
            raise

    async def _lost(self, exc: BaseException | None) -> PeerLostError:
        details = ""
        if isinstance(exc, grpc.aio.AioRpcError):
            details = exc.details() or exc.code().name.lower()
        elif isinstance(self._call, grpc.aio.Call) and self._call.done():
            details = await self._call.details()
        return _lost(self.peer_id, details)


class GrpcPeerClient:
    """See :class:`tpirt.transport.base.PeerClient`."""

    def __init__(self, address: str):
        self.address = address
        self.peer_id = address
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._calls: list[GrpcChannel | TcpChannel] = []

    async def hello(self, request: pb.HelloRequest, timeout_s: float) -> pb.HelloReply:
        """See :class:`tpirt.transport.base.PeerClient`."""
        call = self._channel.unary_unary(
            f"/{_SERVICE}/Hello",
            request_serializer=pb.HelloRequest.SerializeToString,
            response_deserializer=pb.HelloReply.FromString,
        )
        loop = asyncio.get_running_loop()
        started = loop.time()
        while True:
            left = timeout_s - (loop.time() - started)
            try:
                reply = await call(request, timeout=max(left, _RETRY_S))
            except grpc.aio.AioRpcError as exc:
                refused = exc.code() is grpc.StatusCode.UNAVAILABLE and not _is_foreign(exc)
                if not refused or loop.time() - started > min(_PATIENCE_S, timeout_s):
                    raise _unreachable(self.address, exc, timeout_s) from exc
                await asyncio.sleep(_RETRY_S)
            else:
                assert isinstance(reply, pb.HelloReply)
                return reply

    async def put_slice(self, chunks: AsyncIterator[pb.SliceChunk]) -> pb.PutSliceReply:
        """See :class:`tpirt.transport.base.PeerClient`."""
        failure: list[Exception] = []

        async def watched() -> AsyncIterator[pb.SliceChunk]:
            # gRPC keeps an error of what it iterates over to itself and cancels the call.
            try:
                async for chunk in chunks:
                    yield chunk
            except Exception as exc:
                failure.append(exc)
                raise

        call = self._channel.stream_unary(
            f"/{_SERVICE}/PutSlice",
            request_serializer=pb.SliceChunk.SerializeToString,
            response_deserializer=pb.PutSliceReply.FromString,
        )(watched())
        try:
            reply = await call
        except asyncio.CancelledError:
            if failure:
                raise failure[0] from None
            raise
        except grpc.aio.AioRpcError as exc:
            if exc.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise StoreError(f"peer {self.peer_id}: {exc.details()}") from exc
            raise _lost(self.peer_id, exc.details() or exc.code().name.lower()) from exc
        assert isinstance(reply, pb.PutSliceReply)
        return reply

    async def open_session(self) -> Channel:
        """See :class:`tpirt.transport.base.PeerClient`."""
        return await self._open("Session")

    async def open_link(self) -> Channel:
        """See :class:`tpirt.transport.base.PeerClient`."""
        return await self._open("Link")

    async def aclose(self) -> None:
        """See :class:`tpirt.transport.base.PeerClient`."""
        for call in self._calls:
            await call.aclose()
        await self._channel.close(grace=None)

    async def _open(self, method: str) -> Channel:
        """Make a call, and the connection beside it if there can be one."""
        call = self._channel.stream_stream(f"/{_SERVICE}/{method}")()
        channel = GrpcChannel(self.peer_id, call)
        self._calls.append(channel)
        try:
            async with asyncio.timeout(_OFFER_S):
                offer = dict(await call.initial_metadata()).get(_OFFER)
        except (TimeoutError, grpc.RpcError):
            return channel  # whoever reads from it will hear of it
        try:
            if offer:
                beside = TcpChannel(await connect(self.address, str(offer)), channel)
                self._calls.remove(channel)  # the connection ends it
                self._calls.append(beside)
                return beside
        except (OSError, ValueError) as exc:
            channel.via = f"grpc ({exc})"
        return channel


class GrpcPeerServer:
    """Serves a :class:`~tpirt.transport.base.PeerService` on one address."""

    def __init__(self, service: PeerService):
        self._service = service
        self._running: set[asyncio.Task[Any]] = set()  # handlers, and what ends their connections
        self._listener: TcpListener | None = None
        self._server = grpc.aio.server(options=_OPTIONS)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(_SERVICE, self._handlers()),)
        )

    async def start(self, host: str, port: int) -> int:
        """Listen; port 0 takes a free one. Returns the port.

        Raises:
            TransportError: the address is in use or not this machine's.
        """
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound: int = self._server.add_insecure_port(address)
        except RuntimeError as exc:
            raise TransportError(
                f"cannot listen on {address}: the port is in use, or the address is not this "
                "machine's; choose another with --listen"
            ) from exc
        await self._server.start()
        self._listener = TcpListener.beside(host, bound)
        return bound

    async def aclose(self) -> None:
        """Stop listening and end every session, whose own ends it waits for."""
        if self._listener is not None:
            await self._listener.aclose()
        await self._server.stop(grace=None)
        # gRPC does not; cancelled with the loop, it would print the traceback of each.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_S):
                while self._running:
                    await asyncio.wait(self._running)

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        async def hello(request: pb.HelloRequest, _: Any) -> pb.HelloReply:
            return await self._service.hello(request)

        async def put_slice(chunks: AsyncIterator[pb.SliceChunk], context: Any) -> Any:
            return await self._guarded(lambda: self._service.put_slice(chunks), context)

        async def session(_: Any, context: Any) -> None:
            await self._stream(f"master {_address(context)}", context, self._service.session)

        async def link(_: Any, context: Any) -> None:
            await self._stream(_address(context), context, self._service.link)

        return {
            "Hello": grpc.unary_unary_rpc_method_handler(
                hello,
                request_deserializer=pb.HelloRequest.FromString,
                response_serializer=pb.HelloReply.SerializeToString,
            ),
            "PutSlice": grpc.stream_unary_rpc_method_handler(
                put_slice,
                request_deserializer=pb.SliceChunk.FromString,
                response_serializer=pb.PutSliceReply.SerializeToString,
            ),
            "Session": grpc.stream_stream_rpc_method_handler(session),
            "Link": grpc.stream_stream_rpc_method_handler(link),
        }

    async def _stream(
        self, caller: str, context: Any, serve: Callable[[Channel], Awaitable[None]]
    ) -> None:
        async def work() -> None:
            channel = await self._accept(GrpcChannel(caller, context), context)
            try:
                await serve(channel)
            finally:
                if isinstance(channel, TcpChannel):  # after the call, whose status says why
                    self._track(asyncio.create_task(channel.leave()))

        await self._guarded(work, context)

    async def _accept(self, channel: GrpcChannel, context: Any) -> Channel:
        """Offer a connection beside the call; the caller takes it, or speaks here."""
        if self._listener is None:
            await context.send_initial_metadata(())
            return channel
        offer, connected = self._listener.offer()
        await context.send_initial_metadata(((_OFFER, offer),))
        spoken = asyncio.create_task(channel.recv())
        either: set[asyncio.Future[Any]] = {connected, spoken}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            spoken.cancel()
            self._listener.withdraw(connected)
            raise
        channel.unread(spoken)
        if connected.done() and not spoken.done():
            return TcpChannel(connected.result(), channel)
        self._listener.withdraw(connected)
        return channel

    def _track(self, task: asyncio.Task[Any]) -> None:
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _guarded(self, work: Callable[[], Awaitable[_T]], context: Any) -> _T | None:
        """Run a handler; an error of our tree becomes an RPC status with its message."""
        task = asyncio.current_task()
        assert task is not None
        self._track(task)
        try:
            return await work()
        except PeerLostError:
            return None  # the master left: nobody is there to be told
        except TpirtError as exc:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(exc))
            return None


def _lost(peer_id: str, details: str | None) -> PeerLostError:
    """Word the end of a connection for somebody who does not know gRPC."""
    details = details or "the connection closed"
    if "ping timeout" in details or "keepalive" in details:
        why = (
            f"it has not answered for {_KEEPALIVE_TIMEOUT_MS / 1e3:g} s; it hangs, or its link does"
        )
    elif any(
        sign in details for sign in ("Socket closed", "reset by peer", "Broken pipe", "GOAWAY")
    ):
        why = f"it ended, was killed, or its machine went away ({details})"
    else:
        why = details
    return PeerLostError(f"peer {peer_id}: connection lost: {why}")


def _is_foreign(exc: grpc.aio.AioRpcError) -> bool:
    """Tell whether whoever answered does not speak our protocol."""
    return exc.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL) or (
        "Failed parsing HTTP/2" in (exc.details() or "")
    )


def _unreachable(address: str, exc: grpc.aio.AioRpcError, timeout_s: float) -> TpirtError:
    details = exc.details() or ""
    if _is_foreign(exc):
        return HandshakeError(
            f"peer {address}: something else than a tpirt peer answers there "
            f"({details.rpartition('last error: ')[2]}); check the port"
        )
    if exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        why = f"no answer within {timeout_s:g} s"
    elif "Connection refused" in details:
        why = "nothing listens there (connection refused)"
    elif "lookup" in details or "resolving" in details:
        why = "the host name is unknown"
    else:
        why = details.rpartition("last error: ")[2]
    return PeerUnreachableError(
        f"peer {address}: {why}; is `tpirt peer --listen ...` running there, and the port open?"
    )


def _address(context: Any) -> str:
    """Where a caller is; gRPC says ``ipv4:127.0.0.1:5`` or ``ipv6:%5B::1%5D:5``."""
    address: str = context.peer().partition(":")[2]
    return address.replace("%5B", "[").replace("%5D", "]")
