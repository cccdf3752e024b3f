"""Requests and uploads, and the bounds that gRPC keeps against strangers."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from tpirt.errors import (
    DamagedLinkError,
    HandshakeError,
    IdentityError,
    PeerError,
    PeerLostError,
    PeerUnreachableError,
    StoreError,
    TpirtError,
    TransportError,
)
from tpirt.identity.names import PEER
from tpirt.identity.trust import LOCAL, Trust
from tpirt.transport import address, grpc_channel, tickets
from tpirt.transport import grpc as transport
from tpirt.transport.address import Address, Endpoint
from tpirt.transport.base import Carrier, Channel
from tpirt.transport.finding import Device, find
from tpirt.transport.frame import Frame, Kind
from tpirt.transport.grpc import GrpcPeerClient, GrpcPeerServer
from tpirt.transport.grpc_channel import GrpcChannel

TIMEOUT_S = 10.0
ANYONE = Trust(PEER, insecure=True)
MIB = 1 << 20


class Service:
    """Answers with what it got; keeps sessions open."""

    def __init__(self) -> None:
        self.sessions: asyncio.Queue[Channel] = asyncio.Queue()
        self.held = asyncio.Event()  # an upload that nobody reads on

    async def answer(self, method: str, request: bytes) -> bytes:
        if request == b"full":
            raise StoreError("disk full")
        if request == b"garbage":
            raise TransportError("malformed message")
        if request == b"stranger":
            raise IdentityError("not of this cluster")
        return method.encode() + b":" + request

    async def receive(self, method: str, chunks: AsyncIterator[bytes]) -> bytes:
        total = 0
        async for chunk in chunks:
            total += len(chunk)
            if chunk == b"refuse":
                raise StoreError("no room")
            if chunk == b"damaged":
                raise DamagedLinkError("checksum mismatch")
            if chunk == b"hang":
                await self.held.wait()
        return str(total).encode()

    async def session(self, channel: Channel) -> None:
        self.sessions.put_nowait(channel)
        await asyncio.Event().wait()

    link = session


@asynccontextmanager
async def peer() -> AsyncIterator[tuple[GrpcPeerClient, Service]]:
    service = Service()
    server = GrpcPeerServer(service)
    client = GrpcPeerClient(f"127.0.0.1:{await server.start('127.0.0.1', 0)}")
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield client, service
    finally:
        service.held.set()
        await client.aclose()
        await server.aclose()


async def chunks_of(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


# -- requests ----------------------------------------------------------------------------------


async def test_requests_are_answered_and_refused_with_the_peers_words() -> None:
    async with peer() as (client, _):
        assert await client.call("Hello", b"me", TIMEOUT_S) == b"Hello:me"
        assert await client.call("Inventory", b"", TIMEOUT_S) == b"Inventory:"
        with pytest.raises(PeerError, match=rf"^peer {client.address}: disk full$"):
            await client.call("Inventory", b"full", TIMEOUT_S)


async def test_what_a_peer_got_in_the_clear_may_not_be_what_was_sent() -> None:
    async with peer() as (client, _):
        with pytest.raises(DamagedLinkError, match="malformed message; it may have been damaged"):
            await client.call("Hello", b"garbage", TIMEOUT_S)
        with pytest.raises(PeerError, match=r"not of this cluster$"):
            await client.call("Hello", b"stranger", TIMEOUT_S)


async def test_a_method_that_the_peer_does_not_know_is_another_service() -> None:
    async with peer() as (client, _):
        with pytest.raises(HandshakeError, match="something else than a tpirt peer"):
            await client.call("Unknown", b"", TIMEOUT_S)


class Heard:
    """What comes over a channel."""

    def __init__(self) -> None:
        self.frames: asyncio.Queue[Frame] = asyncio.Queue()

    def on_frame(self, frame: Frame) -> None:
        self.frames.put_nowait(frame)

    def on_lost(self, exc: TpirtError) -> None:
        pass


async def call_of_nameless_method(address: str) -> None:
    """Make a call of a method whose name is not UTF-8; gRPC's clients refuse to."""
    names = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/tpirt.v1.Peer/\xaf")]
    names += [(b":authority", b"x"), (b"content-type", b"application/grpc"), (b"te", b"trailers")]
    headers = b"".join(b"\0%c%b%c%b" % (len(n), n, len(v), v) for n, v in names)
    settings = b"\0\0\0\4\0\0\0\0\0"
    _, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
    writer.write(len(headers).to_bytes(3, "big") + b"\1\4\0\0\0\1" + headers)
    await writer.drain()
    writer.close()


async def test_a_method_whose_name_is_no_text_ends_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It stops gRPC's server, whose calls under way go on; another one takes its port."""
    async with peer() as (client, service):
        channel = await client.open_session()
        heard = Heard()
        (await service.sessions.get()).start(heard)
        for count in range(1, 4):
            await call_of_nameless_method(client.address)
            while caplog.text.count("gRPC is started again") < count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            other = GrpcPeerClient(client.address)
            assert await other.call("Hello", b"", TIMEOUT_S) == b"Hello:"
            await other.aclose()
        await channel.send(Frame.of(Kind.MESSAGE, b"still here"))
        assert (await heard.frames.get()).message == b"still here"
    gc.collect()  # asyncio reports a task's error when the task is gone
    assert not [record for record in caplog.records if record.name == "asyncio"]


async def test_a_closed_client_connects_again() -> None:
    async with peer() as (client, _):
        for _ in range(2):
            assert await client.call("Hello", b"me", TIMEOUT_S) == b"Hello:me"
            await client.aclose()


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Objects go when nothing refers to them, and at no other time."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def calls() -> list[object]:
    """What keeps a connection of gRPC's open, even one that was closed."""
    return [each for each in gc.get_objects() if issubclass(type(each), grpc.aio.Call)]


@pytest.mark.usefixtures("no_collection")
async def test_a_closed_client_keeps_no_connection() -> None:
    async with peer() as (client, service):
        channels = [await client.open_session(), await client.open_link()]
        for channel in channels:
            channel.start(Heard())
        channels.append(await client.open_session())  # and one that is never read
        with pytest.raises(StoreError, match="no room"):
            await client.upload("PutUnits", chunks_of(b"refuse"), TIMEOUT_S)
        with pytest.raises(PeerLostError, match="took nothing"):
            await client.upload("PutUnits", chunks_of(b"hang", *[bytes(MIB)] * 50), 0.1)
        for _ in channels:
            service.sessions.get_nowait()
        await client.aclose()
        while calls():  # noqa: ASYNC110 - gRPC's own tasks end
            await asyncio.sleep(0.01)


async def test_nobody_there() -> None:
    client = GrpcPeerClient("127.0.0.1:1")
    with pytest.raises(PeerUnreachableError, match="nothing listens there"):
        await client.call("Hello", b"", 0.3)
    await client.aclose()


async def test_a_name_that_nobody_knows() -> None:
    client = GrpcPeerClient("no-such-host.invalid")
    with pytest.raises(PeerUnreachableError, match=r"peer no-such-host\.invalid:50051: the host"):
        await client.call("Hello", b"", 0.3)
    await client.aclose()


async def test_a_request_ends_that_grpc_cannot_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends none at its deadline that waits for the link to take what was written before."""

    class Stuck:
        def unary_unary(self, _: str) -> Any:
            return lambda request, timeout: asyncio.Event().wait()

        async def close(self, grace: None) -> None:
            pass

    monkeypatch.setattr(GrpcPeerClient, "_connect", lambda _: Stuck())
    async with peer() as (client, _):
        with pytest.raises(PeerUnreachableError, match=r"does not answer within 0\.2 s"):
            await client.call("Hello", b"", 0.2)


async def test_a_port_that_accepts_and_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = GrpcPeerClient(f"127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(PeerUnreachableError, match="something listens there"):
            await client.call("Hello", b"", 0.3)
        await client.aclose()


# -- where a peer listens ----------------------------------------------------------------------


def name(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    """Have the host name ``kitchen`` stand for addresses."""
    original = address.resolve

    async def resolve(asked: Address, *, listening: bool = False) -> list[Endpoint]:
        named = hosts if asked.host == "kitchen" else (asked.host,)
        found = [await original(Address(host, asked.port), listening=listening) for host in named]
        return [endpoint for endpoints in found for endpoint in endpoints]

    for module in (transport, tickets):
        monkeypatch.setattr(module, "resolve", resolve)


async def test_a_peer_listens_on_every_address_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = ["::1", "127.0.0.1", "127.0.1.1"]
    name(monkeypatch, "192.0.2.1", *hosts)  # the first one is not this machine's
    service = Service()
    server = GrpcPeerServer(service, trust=ANYONE)
    port = await server.start("kitchen", 0)
    assert server.hosts == hosts
    for host in hosts:
        client = GrpcPeerClient(str(Address(host, port)))
        assert await client.call("Hello", b"", TIMEOUT_S) == b"Hello:"
        assert (await client.open_session()).carrier.kind == "tcp"
        await service.sessions.get()
        await client.aclose()
    await server.aclose()


async def test_a_port_that_is_taken_on_one_address_is_not_listened_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name(monkeypatch, "::1", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TransportError, match=f"cannot listen on kitchen:{port}: the port is"):
            await GrpcPeerServer(Service()).start("kitchen", port)


@pytest.mark.parametrize(
    ("host", "why"),
    [("192.0.2.1", "the address is not this machine's"), ("no-such-host.invalid", "")],
)
async def test_an_address_of_nobody_here_is_not_listened_on(host: str, why: str) -> None:
    with pytest.raises(TransportError, match=f"cannot listen on {host}:1: {why}"):
        await GrpcPeerServer(Service(), trust=ANYONE).start(host, 1)


# -- uploads -----------------------------------------------------------------------------------


async def test_uploads_arrive() -> None:
    async with peer() as (client, _):
        chunks = chunks_of(*[bytes(MIB)] * 5)
        assert await client.upload("PutUnits", chunks, TIMEOUT_S) == str(5 * MIB).encode()
        assert await client.upload("PutUnits", chunks_of(), TIMEOUT_S) == b"0"


async def test_a_refused_upload_says_why_however_much_is_to_come() -> None:
    async with peer() as (client, _):
        for rest in ([], [bytes(MIB)] * 50):
            with pytest.raises(StoreError, match="no room"):
                await client.upload("PutUnits", chunks_of(b"refuse", *rest), TIMEOUT_S)


async def test_an_upload_that_is_damaged_on_its_way_is_lost() -> None:
    """It is sent again; one that is refused is not."""
    async with peer() as (client, _):
        for rest in ([], [bytes(MIB)] * 50):
            with pytest.raises(PeerLostError, match=f"{client.address}: connection lost:"):
                await client.upload("PutUnits", chunks_of(b"damaged", *rest), TIMEOUT_S)


async def test_an_upload_without_progress_is_given_up() -> None:
    async with peer() as (client, _):
        for rest in ([], [bytes(MIB)] * 50):  # in the answer, and in a chunk
            with pytest.raises(PeerLostError, match=r"took nothing for 0\.3 s"):
                await client.upload("PutUnits", chunks_of(b"hang", *rest), 0.3)


async def test_a_slow_upload_is_not_one_without_progress() -> None:
    async def slow() -> AsyncIterator[bytes]:
        for _ in range(6):
            await asyncio.sleep(0.1)
            yield bytes(1000)

    async with peer() as (client, _):
        assert await client.upload("PutUnits", slow(), 0.3) == b"6000"


@pytest.mark.parametrize("error", [StoreError("cannot read"), TimeoutError(), ZeroDivisionError()])
async def test_errors_of_the_sources_own_are_kept(error: Exception) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"some"
        raise error

    async with peer() as (client, _):
        with pytest.raises(type(error)) as caught:
            await client.upload("PutUnits", broken(), TIMEOUT_S)
        assert caught.value is error


async def test_an_upload_to_a_peer_that_leaves_is_lost() -> None:
    server = GrpcPeerServer(Service())
    client = GrpcPeerClient(f"127.0.0.1:{await server.start('127.0.0.1', 0)}")

    async def chunks() -> AsyncIterator[bytes]:
        yield b"some"
        await server.aclose()
        for _ in range(50):
            yield bytes(MIB)

    with pytest.raises(PeerLostError, match="connection lost"):
        await asyncio.wait_for(client.upload("PutUnits", chunks(), TIMEOUT_S), TIMEOUT_S)
    await client.aclose()


async def test_an_upload_can_be_cancelled() -> None:
    async with peer() as (client, _):
        chunks = chunks_of(b"hang", *[bytes(MIB)] * 50)
        uploading = asyncio.create_task(client.upload("PutUnits", chunks, TIMEOUT_S))
        await asyncio.sleep(0.1)
        uploading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await uploading
        assert await client.call("Hello", b"", TIMEOUT_S) == b"Hello:"


# -- streams -----------------------------------------------------------------------------------


async def test_last_frames_come_before_the_end_that_a_write_shows() -> None:
    """The other side said why it leaves, and left; a write fails before that is read."""

    class EndedCall:
        async def write(self, _: bytes) -> None:
            raise asyncio.InvalidStateError

        async def read(self) -> Any:
            await asyncio.sleep(0.05)
            return b"".join(Frame.of(Kind.MESSAGE).parts()) if not came else grpc.aio.EOF

    class Inbox:
        def on_frame(self, frame: Frame) -> None:
            came.append(frame)

        def on_lost(self, exc: TpirtError) -> None:
            came.append(exc)

    came: list[Frame | TpirtError] = []
    channel = GrpcChannel("worker", EndedCall())
    channel.start(Inbox())
    with pytest.raises(PeerLostError):
        await channel.send(Frame.of(Kind.MESSAGE))
    assert [type(each) for each in came] == [Frame, PeerLostError]
    await channel.aclose()


async def test_a_peer_that_takes_nothing_of_a_call_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class StuckCall:
        async def write(self, _: bytes) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(grpc_channel, "CONNECT_S", 0.05)
    channel = GrpcChannel("worker", StuckCall())
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(PeerLostError, match=r"worker: took nothing for 0.05 s"):
            await channel.stay()
    await channel.aclose()


# -- strangers ---------------------------------------------------------------------------------


@asynccontextmanager
async def stranger(address: str, **options: Any) -> AsyncIterator[grpc.aio.Channel]:
    unbounded = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=unbounded, **options) as channel:
        yield channel


Attack = Callable[[grpc.aio.Channel, bytes], Any]


async def unary(channel: grpc.aio.Channel, data: bytes) -> None:
    await channel.unary_unary("/tpirt.v1.Peer/Hello")(data)


async def uploading(channel: grpc.aio.Channel, data: bytes) -> None:
    await channel.stream_unary("/tpirt.v1.Peer/PutUnits")(chunks_of(data))


async def streaming(channel: grpc.aio.Channel, data: bytes) -> None:
    call = channel.stream_stream("/tpirt.v1.Peer/Session")()
    await call.write(data)
    await call.read()


@pytest.mark.parametrize("attack", [unary, uploading, streaming])
@pytest.mark.parametrize(
    ("compression", "code"),
    [
        (grpc.Compression.NoCompression, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (grpc.Compression.Gzip, grpc.StatusCode.UNIMPLEMENTED),
        (grpc.Compression.Deflate, grpc.StatusCode.UNIMPLEMENTED),
    ],
    ids=str,
)
async def test_large_and_compressed_messages_are_refused(
    attack: Attack, compression: grpc.Compression, code: grpc.StatusCode
) -> None:
    async with (
        peer() as (client, service),
        stranger(client.address, compression=compression) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await attack(channel, bytes(32 * MIB))
        assert caught.value.code() in (code, grpc.StatusCode.INTERNAL)
        assert service.sessions.empty()
        assert await client.call("Hello", b"", TIMEOUT_S) == b"Hello:"


async def test_a_peer_that_compresses_its_answers_is_refused() -> None:
    async def zeros(*_: Any) -> bytes:
        return bytes(32 * MIB)

    unbounded = [("grpc.max_send_message_length", -1)]
    server = grpc.aio.server(options=unbounded, compression=grpc.Compression.Gzip)
    handlers = {"Hello": grpc.unary_unary_rpc_method_handler(zeros)}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("tpirt.v1.Peer", handlers),)
    )
    client = GrpcPeerClient(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    with pytest.raises(TpirtError):
        await client.call("Hello", b"", TIMEOUT_S)
    await client.aclose()
    await server.stop(None)


async def test_callers_that_neither_connect_nor_speak_are_dropped() -> None:
    async with peer() as (client, service), stranger(client.address) as channel:
        calls = [
            channel.stream_stream(f"/tpirt.v1.Peer/{method}")() for method in ("Session", "Link")
        ]
        async with asyncio.timeout(8):
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError, match="nor spoke within 5 s"):
                    await call.read()
        assert service.sessions.empty()


async def test_a_caller_that_stays_on_the_call_need_not_speak_soon() -> None:
    class Inbox:
        def on_frame(self, frame: Frame) -> None:
            came.set_result(frame)

        def on_lost(self, exc: TpirtError) -> None:
            came.set_exception(exc)

    async with peer() as (client, service), stranger(client.address) as channel:
        came: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        call = channel.stream_stream("/tpirt.v1.Peer/Session")()
        await call.write(b"")
        session = await service.sessions.get()
        assert session.carrier == Carrier("grpc", "the caller did not connect")
        session.start(Inbox())
        for part in Frame.of(Kind.MESSAGE, b"hello").parts():
            await call.write(part)
        assert (await came).message == b"hello"


async def test_a_device_has_no_name_where_no_certificates_are_shown() -> None:
    async def nowhere(identity: str) -> list[Address]:
        return []

    server = GrpcPeerServer(Service())
    port = await server.start("127.0.0.1", 0)
    device = Device("kitchen", "k1", (Address("127.0.0.1", port),), nowhere)
    with pytest.raises(IdentityError, match=r"peer kitchen: .*shows no certificate, as on this"):
        await find(device, LOCAL)
    await server.aclose()
