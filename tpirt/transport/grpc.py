"""gRPC as transport: a peer's server, and the client of another peer.

Requests, answers and streams are bytes all through. See :mod:`tpirt.transport.grpc_channel` for the
options, and :mod:`tpirt.transport.tcp` for the connections that carry frames instead of a stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

# Its environment variables have to be set before gRPC is loaded.
from tpirt.transport.grpc_channel import (  # isort: skip
    CONNECT_S,
    ERRORS,
    OPTIONS,
    RETRY_S,
    GrpcChannel,
    details_of,
    is_foreign,
    lost,
    own,
    server_options,
    unreachable,
)

import grpc
import grpc.aio

from tpirt.errors import (
    DamagedLinkError,
    HandshakeError,
    IdentityError,
    PeerError,
    PeerLostError,
    StoreError,
    TpirtError,
    TransportError,
)
from tpirt.identity.names import MASTER, PEER
from tpirt.identity.trust import INSECURE, Trust
from tpirt.transport.address import DEFAULT_PORT, Address, Endpoint, resolve
from tpirt.transport.backlog import Backlog
from tpirt.transport.base import Channel, PeerService
from tpirt.transport.finding import Device, find
from tpirt.transport.tcp import TcpChannel
from tpirt.transport.tickets import TcpListener, connect
from tpirt.transport.tls import (
    Met,
    caller,
    client_credentials,
    meet,
    refusal_to_listen,
    server_credentials,
    speaks_tls,
)

if TYPE_CHECKING:
    from tpirt.identity.certificates import Certificate

_log = logging.getLogger("tpirt.transport")

_T = TypeVar("_T")
_UNAVAILABLE, _CANCELLED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED
_SERVICE = "tpirt.v1.Peer"
_OFFER = "tpirt-tcp"  # metadata of an answer: where frames may go; see tpirt.transport.tickets
_CIPHER = "tpirt-cipher"  # metadata of a protected call: what the caller would seal frames with
_REFUSAL = "tpirt-refusal-bin"  # metadata of an answer: why an upload is refused
_HEARD_S = 5.0  # for an uploader to hear that it is refused
_OFFER_S = 2.0  # for it to come
_PATIENCE_S = 3.0  # with a peer that is just being started
_SPEAK_S = 5.0  # for a caller to connect, or to say that it stays on the call
_MOST_SILENT = 32  # callers that have done neither: each may send a message of 4 MiB
_CHECK_S = 0.1  # whether gRPC's server still runs
_LEAVE_S = 10.0  # for a session to end by itself: threads that read or compute a block


def _is_news(record: logging.LogRecord) -> bool:
    """False for what asyncio reports of a server of gRPC that stops; see `_keep_serving`."""
    exc = record.exc_info[1] if record.exc_info else None
    if not isinstance(exc, UnicodeDecodeError) or exc.__traceback__ is None:
        return True
    return not exc.__traceback__.tb_frame.f_code.co_filename.endswith("aio/server.pyx.pxi")


logging.getLogger("asyncio").addFilter(_is_news)


class GrpcPeerClient:
    """See :class:`tpirt.transport.base.PeerClient`."""

    def __init__(self, peer: str | Device, trust: Trust | None = None, known: Sequence[str] = ()):
        """Connect to ``HOST[:PORT]``, or to a device wherever it is, at the first call.

        Without ``trust``, this user's as a master. ``known`` are names of devices that could be
        meant, should the host be unknown.

        Raises:
            ConfigError: not an address.
        """
        self._device = peer if isinstance(peer, Device) else None
        if isinstance(peer, str):
            self._address = Address.parse(peer)
            self.peer_id = str(self._address)
        else:
            self._address = peer.places[0] if peer.places else Address(peer.name, DEFAULT_PORT)
            self.peer_id = peer.name
        self.address = str(self._address)
        self.certificate: Certificate | None = None
        self._trust = trust or Trust(MASTER)
        self._known = known
        self._met = self._address  # in digits, once it was met
        self._connection: grpc.aio.Channel | None = None
        self._connecting = asyncio.Lock()
        self._calls: list[Channel] = []

    async def _channel(self) -> grpc.aio.Channel:
        """The connection, made at the first call.

        Raises:
            AioRpcError: nobody answers.
            IdentityError: not a peer of this cluster.
            PeerUnreachableError: a device that was looked for is nowhere.
        """
        async with self._connecting:
            if self._connection is None:
                self._met, self.certificate = await self._meet()
                self._connection = self._connect()
            return self._connection

    async def _meet(self) -> Met:
        """Find out who answers; a peer that was met once stays the one that is meant."""
        if self._device is not None:
            self._address, found = await find(self._device, self._trust)
            self.address = str(self._address)
            return found
        try:
            met = await meet(self._address, self._trust)
        except TimeoutError:
            raise _failure(_UNAVAILABLE, "no SETTINGS within the time") from None
        except OSError as exc:
            raise _failure(_UNAVAILABLE, exc.strerror or str(exc)) from exc
        before, shown = self.certificate, met.certificate
        if before is not None and (shown is None or shown.subject != before.subject):
            raise IdentityError(
                f"peer {self.peer_id}: another device answers there now; {before.name} was met "
                "before"
            )
        return met

    def _connect(self) -> grpc.aio.Channel:
        uri, identity = self._met.uri, self._trust.identity
        if self.certificate is None or identity is None:
            return grpc.aio.insecure_channel(uri, options=OPTIONS)
        pinned = ("grpc.ssl_target_name_override", self.certificate.subject.own_host)
        return grpc.aio.secure_channel(
            uri, client_credentials(identity), options=(*OPTIONS, pinned)
        )

    async def connect(self) -> None:
        """See :class:`tpirt.transport.base.PeerClient`."""
        await self._connected()

    async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        """See :class:`tpirt.transport.base.PeerClient`."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        while True:
            left = timeout_s - (loop.time() - started)
            try:
                channel = await self._channel()
                reply = await _answer(channel, method, request, max(left, RETRY_S))
            except grpc.aio.AioRpcError as exc:
                if exc.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    raise PeerError(f"peer {self.peer_id}: {details_of(exc)}") from exc
                if exc.code() is grpc.StatusCode.DATA_LOSS:
                    raise DamagedLinkError(f"peer {self.peer_id}: {details_of(exc)}") from exc
                # A server that is started again cancels what has just come.
                refused = exc.code() in (_UNAVAILABLE, _CANCELLED) and not is_foreign(exc)
                if not refused or loop.time() - started > min(_PATIENCE_S, timeout_s):
                    if refused and await self._is_protected():
                        raise IdentityError(self._unprotected()) from exc
                    raise unreachable(self._address, exc, timeout_s, self._known) from exc
                await asyncio.sleep(RETRY_S)
            else:
                return reply

    async def upload(self, method: str, chunks: AsyncIterator[bytes], timeout_s: float) -> bytes:
        """See :class:`tpirt.transport.base.PeerClient`."""
        try:
            channel = await self._channel()
        except grpc.aio.AioRpcError as exc:
            raise lost(self.peer_id, details_of(exc)) from exc
        call = channel.stream_unary(f"/{_SERVICE}/{method}")()

        async def timely(operation: Awaitable[_T]) -> _T:
            try:
                async with asyncio.timeout(timeout_s):
                    return await own(operation, self.peer_id)
            except TimeoutError:
                raise PeerLostError(
                    f"peer {self.peer_id}: took nothing for {timeout_s:.3g} s; "
                    "it hangs, or its link does",
                    peer_id=self.peer_id,
                ) from None

        answered = asyncio.ensure_future(call.initial_metadata())
        try:
            with contextlib.suppress(*ERRORS):
                async for chunk in chunks:
                    if answered.done():  # before the end: it wants no more
                        break
                    await timely(call.write(chunk))
                else:
                    await timely(call.done_writing())
                refusal = dict(await timely(answered)).get(_REFUSAL)
                if refusal is not None:
                    raise StoreError(f"peer {self.peer_id}: {bytes(refusal).decode()}")
            return await timely(call)
        except grpc.aio.AioRpcError as exc:
            if exc.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise StoreError(f"peer {self.peer_id}: {details_of(exc)}") from exc
            raise lost(self.peer_id, details_of(exc)) from exc
        finally:
            answered.cancel()
            call.cancel()
            # Its end has to be taken note of, or the call keeps itself, and the connection.
            await asyncio.gather(answered, _end_of(call), return_exceptions=True)

    async def open_session(self) -> Channel:
        """See :class:`tpirt.transport.base.PeerClient`."""
        return await self._open("Session")

    async def open_link(self) -> Channel:
        """See :class:`tpirt.transport.base.PeerClient`."""
        return await self._open("Link")

    async def aclose(self) -> None:
        """See :class:`tpirt.transport.base.PeerClient`."""
        calls, self._calls = self._calls, []
        for call in calls:
            await call.aclose()
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close(grace=None)

    async def _connected(self) -> grpc.aio.Channel:
        try:
            return await self._channel()
        except grpc.aio.AioRpcError as exc:
            raise unreachable(self._address, exc, CONNECT_S, self._known) from exc

    async def _open(self, method: str) -> Channel:
        """Make a call, and the connection for its frames if there can be one."""
        connection = await self._connected()
        protected = self.certificate is not None
        call = connection.stream_stream(f"/{_SERVICE}/{method}")(
            metadata=((_CIPHER, await _cipher()),) if protected else None
        )
        channel = GrpcChannel(self.peer_id, call, protected=protected)
        self._calls.append(channel)
        try:
            async with asyncio.timeout(_OFFER_S):
                offer = dict(await call.initial_metadata()).get(_OFFER)
        except (TimeoutError, grpc.RpcError):
            return channel  # its reader will learn why
        try:
            if offer:
                admitted = await connect(self._met, str(offer), sealed=protected)
                connected = TcpChannel(admitted, channel)
                self._calls.append(connected)
                return connected
            why = "the peer offers no TCP port"
        except (OSError, ValueError) as exc:
            why = str(exc)
        channel.carrier = channel.carrier._replace(reason=why)
        await channel.stay()
        return channel

    async def _is_protected(self) -> bool:
        """Whether what was connected to without an identity wants TLS."""
        in_the_clear = self._connection is not None and self._trust.identity is None
        return in_the_clear and await speaks_tls(self._met)

    def _unprotected(self) -> str:
        return f"peer {self.peer_id}: it uses TLS, and this device does not; " + (
            f"leave out --insecure (and {INSECURE}=1) here"
            if self._trust.insecure
            else "run `tpirt cluster init` and `cluster invite` here, and start it with --join"
        )


class GrpcPeerServer:
    """Serves a :class:`~tpirt.transport.base.PeerService` on every address of a host.

    Attributes:
        hosts: these addresses, in digits; empty before :meth:`start`.
        is_protected: whether it uses TLS, as it does beyond loopback.
    """

    def __init__(
        self,
        service: PeerService,
        most_connections: int = 1024,
        trust: Trust | None = None,
    ):
        """Serve ``service``; ``most_connections`` of gRPC's are open at a time.

        Without ``trust``, with this user's identity as a peer where one is needed.
        """
        self.is_protected = False
        self._trust = trust or Trust(PEER)
        self.hosts: list[str] = []
        self._service = service
        self._running: set[asyncio.Task[Any]] = set()  # handlers, and what ends their connections
        self._listener: TcpListener | None = None
        self._silent = Backlog(_MOST_SILENT)
        self._options = server_options(most_connections)
        self._server = self._new_server()
        self._retired: set[grpc.aio.Server] = set()  # have stopped; calls on them may go on
        self._keeping: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; port 0 takes a free one. Returns the port.

        Raises:
            TransportError: the host is unknown or not this machine, or the port is in use on one
                of its addresses.
            IdentityError: beyond loopback, and without a certificate that was not waived.
        """
        address = Address(host, port)
        try:
            wanted = await resolve(address, listening=True)
            beyond = not all(endpoint.is_loopback for endpoint in wanted)
            if beyond and not self._trust.insecure:
                if await asyncio.to_thread(lambda: self._trust.identity) is None:
                    raise IdentityError(refusal_to_listen(address))
                self.is_protected = True
            endpoints = self._bind(wanted)
        except OSError as exc:
            raise TransportError(
                f"cannot listen on {address}: {_why_not(exc)}; choose another address or port"
            ) from exc
        await self._server.start()
        self._keeping = asyncio.create_task(self._keep_serving(endpoints))
        self.hosts = [endpoint.host for endpoint in endpoints]
        bound: int = endpoints[0].where[1]
        self._listener = TcpListener.beside(endpoints, bound)
        return bound

    def _new_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(options=self._options)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(_SERVICE, self._handlers()),)
        )
        return server

    async def _keep_serving(self, endpoints: Sequence[Endpoint]) -> None:
        """Start a new server when gRPC's has stopped: a method whose name is not UTF-8 does that.

        Calls under way on the old one go on.
        """
        while True:
            try:
                if not await self._server.wait_for_termination(_CHECK_S):
                    return
            except UnicodeDecodeError:
                _log.warning("a caller sent a name that is no text; gRPC is started again")
                self._retired.add(self._server)
                self._track(asyncio.create_task(self._retire(self._server)))
                self._server = self._new_server()
                await self._bind_again(endpoints)
                await self._server.start()

    async def _retire(self, server: grpc.aio.Server) -> None:
        """Release a server that has stopped once its calls have ended."""
        with contextlib.suppress(UnicodeDecodeError):
            await server.wait_for_termination()
        await server.stop(grace=None)
        self._retired.discard(server)

    async def _bind_again(self, endpoints: Sequence[Endpoint]) -> None:
        while True:
            try:
                self._bind(endpoints)
            except OSError:  # the old server has not let go of the port yet
                await asyncio.sleep(_CHECK_S)
            else:
                return

    def _bind(self, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        """Listen on one port of all addresses that this machine has; returns them with the port.

        Raises:
            OSError: it has none of them, or the port is in use on one.
        """
        credentials = server_credentials(self._trust) if self.is_protected else None
        bound: list[Endpoint] = []
        foreign: OSError | None = None  # a name may have an address that this machine has not now
        for endpoint in endpoints:
            wanted = endpoint.at(bound[0].where[1]) if bound else endpoint
            address = Address(wanted.host, wanted.where[1])
            try:
                if credentials is None:
                    port = self._server.add_insecure_port(str(address))
                else:
                    port = self._server.add_secure_port(str(address), credentials)
                bound.append(wanted.at(port))
            except RuntimeError:
                exc = _bind_error(wanted)
                if exc.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise exc from None
                foreign = exc
        if foreign is not None and not bound:
            raise foreign
        return bound

    async def aclose(self) -> None:
        """Stop listening and end every session, whose own ends it waits for."""
        if self._listener is not None:
            await self._listener.aclose()
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        for server in (self._server, *self._retired):
            await server.stop(grace=None)
        # gRPC does not; cancelled with the loop, it would print the traceback of each.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_S):
                while self._running:
                    await asyncio.wait(self._running)

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        def answer(method: str) -> grpc.RpcMethodHandler[Any, Any]:
            async def handle(request: bytes, context: Any) -> bytes | None:
                return await self._guarded(lambda: self._answer(method, request), context)

            return grpc.unary_unary_rpc_method_handler(handle)

        async def put_units(chunks: AsyncIterator[bytes], context: Any) -> bytes | None:
            async def take() -> bytes:
                try:
                    return await self._service.receive("PutUnits", chunks)
                except DamagedLinkError:
                    raise
                except TpirtError as exc:
                    await _refuse(chunks, context, exc)
                    raise

            return await self._guarded(take, context)

        async def session(_: Any, context: Any) -> None:
            await self._stream(f"master {_address(context)}", context, self._service.session)

        async def link(_: Any, context: Any) -> None:
            await self._stream(_address(context), context, self._service.link, PEER)

        return {
            "Hello": answer("Hello"),
            "Inventory": answer("Inventory"),
            "Renew": answer("Renew"),
            "Status": answer("Status"),
            "PutUnits": grpc.stream_unary_rpc_method_handler(put_units),
            "Session": grpc.stream_stream_rpc_method_handler(session),
            "Link": grpc.stream_stream_rpc_method_handler(link),
        }

    async def _answer(self, method: str, request: bytes) -> bytes:
        try:
            return await self._service.answer(method, request)
        except TransportError as exc:
            if self.is_protected or isinstance(exc, HandshakeError):
                raise
            raise DamagedLinkError.of(exc) from None

    async def _stream(
        self,
        peer_id: str,
        context: Any,
        serve: Callable[[Channel], Awaitable[None]],
        role: str = MASTER,
    ) -> None:
        call = GrpcChannel(peer_id, context, protected=self.is_protected)

        async def work() -> None:
            channel = await self._silent.wait(peer_id, self._accept(call, context))
            try:
                await serve(channel)
            finally:
                if isinstance(channel, TcpChannel):  # after the call, whose status says why
                    self._track(asyncio.create_task(channel.leave()))

        try:
            await self._guarded(work, context, role)
        finally:
            await call.aclose()

    async def _accept(self, call: GrpcChannel, context: Any) -> Channel:
        """Offer a connection for the call's frames; the caller takes it, or speaks on the call.

        Raises:
            TransportError: it does neither.
            PeerLostError: its call ends first, or what it says is refused.
        """
        if self._listener is None:
            await context.send_initial_metadata(())
            call.carrier = call.carrier._replace(reason="no TCP port is free here")
            return call
        offer, connected = self._listener.offer(await self._agree(call, context))
        spoken = call.first()
        try:
            await context.send_initial_metadata(((_OFFER, offer),))
            either: set[asyncio.Future[Any]] = {connected, spoken}
            done, _ = await asyncio.wait(
                either, timeout=_SPEAK_S, return_when=asyncio.FIRST_COMPLETED
            )
        except BaseException:
            self._listener.withdraw(connected)
            raise
        if connected in done and spoken not in done:
            return TcpChannel(connected.result(), call, served=True)
        self._listener.withdraw(connected)
        if not done:
            raise TransportError(
                f"peer {call.peer_id}: it neither connected nor spoke within {_SPEAK_S:g} s"
            )
        if spoken.cancelled() or spoken.exception() or spoken.result() is grpc.aio.EOF:
            raise PeerLostError(f"peer {call.peer_id}: its call ended before it said anything")
        call.carrier = call.carrier._replace(reason="the caller did not connect")
        return call

    async def _agree(self, call: GrpcChannel, context: Any) -> str:
        """The cipher of a protected call's connection; empty in the clear.

        Raises:
            TransportError: the caller names none that is known.
        """
        if not self.is_protected:
            return ""
        from tpirt.transport.sealing import agreed

        wanted = str(dict(context.invocation_metadata() or ()).get(_CIPHER, ""))
        try:
            return await asyncio.to_thread(agreed, wanted)
        except ValueError as exc:
            raise TransportError(f"peer {call.peer_id}: {exc}") from None

    def _track(self, task: asyncio.Task[Any]) -> None:
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _guarded(
        self, work: Callable[[], Awaitable[_T]], context: Any, role: str = MASTER
    ) -> _T | None:
        """Run a handler for a caller in a role; an error of our tree becomes an RPC status."""
        task = asyncio.current_task()
        assert task is not None
        self._track(task)
        try:
            if self.is_protected and caller(context).role != role:
                raise IdentityError(f"only a {role} of its cluster may ask for this")
            return await work()
        except TpirtError as exc:
            if type(exc) is not PeerLostError:  # else the master left: nobody is there to be told
                await context.abort(_status(exc), str(exc))
            return None


async def _end_of(call: grpc.aio.StreamUnaryCall[bytes, bytes]) -> None:
    await call


async def _cipher() -> str:
    from tpirt.transport.sealing import fastest  # 15 MB, not needed on loopback

    return await asyncio.to_thread(fastest)


async def _answer(
    channel: grpc.aio.Channel, method: str, request: bytes, timeout_s: float
) -> bytes:
    """Make a request; gRPC's own deadline ends none that waits behind a write on a cut link.

    Raises:
        AioRpcError: as of gRPC.
    """
    call = channel.unary_unary(f"/{_SERVICE}/{method}")
    try:
        async with asyncio.timeout(timeout_s):
            reply: bytes = await call(request, timeout=timeout_s)
            return reply
    except TimeoutError:
        raise _failure(grpc.StatusCode.DEADLINE_EXCEEDED) from None


def _failure(code: grpc.StatusCode, details: str = "") -> grpc.aio.AioRpcError:
    """What gRPC would raise."""
    none = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, none, none, details)


def _bind_error(endpoint: Endpoint) -> OSError:
    """Find out why gRPC cannot listen there, which it does not say."""
    try:
        endpoint.listen().close()
    except OSError as exc:
        return exc
    return OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))  # and free again


def _why_not(exc: OSError) -> str:
    """Say why an address cannot be listened on."""
    if exc.errno == errno.EADDRINUSE:
        return "the port is in use"
    if exc.errno == errno.EADDRNOTAVAIL:
        return "the address is not this machine's"
    return (os.strerror(exc.errno) if exc.errno and exc.errno > 0 else str(exc.strerror)).lower()


def _status(exc: TpirtError) -> grpc.StatusCode:
    """How a caller is told: it may try again what was damaged on its way."""
    damaged = isinstance(exc, DamagedLinkError)
    return grpc.StatusCode.DATA_LOSS if damaged else grpc.StatusCode.FAILED_PRECONDITION


async def _refuse(chunks: AsyncIterator[bytes], context: Any, exc: TpirtError) -> None:
    """Tell an uploader why, and take what it still sends until it has heard.

    A call that ended while its caller writes would show there as an internal error of gRPC's.
    """
    with contextlib.suppress(*ERRORS, TimeoutError):
        async with asyncio.timeout(_HEARD_S):
            await context.send_initial_metadata(((_REFUSAL, str(exc).encode()),))
            async for _ in chunks:
                pass


def _address(context: Any) -> str:
    """Return a caller's address; gRPC says ``ipv4:127.0.0.1:5`` or ``ipv6:%5B::1%5D:5``."""
    address: str = context.peer().partition(":")[2]
    return address.replace("%5B", "[").replace("%5D", "]")
