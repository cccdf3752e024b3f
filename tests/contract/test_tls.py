"""Mutual TLS and sealed frames: who gets in, who does not, and what both sides are told."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tpirt.cluster.renewal import Renewal, keep_up, renew
from tpirt.cluster.worker_links import Switchboard, WorkerLinks
from tpirt.collectives.links import LinkSet
from tpirt.errors import (
    IdentityError,
    PeerError,
    PeerLostError,
    PeerUnreachableError,
    TpirtError,
    TransportError,
)
from tpirt.identity.names import MASTER, PEER
from tpirt.identity.trust import IDENTITY_FILE, Trust
from tpirt.protocol.messages import JoinLink, RenewRequest, decode, decode_call, encode_call
from tpirt.testing.identities import MadeCluster
from tpirt.transport import grpc as grpc_transport
from tpirt.transport import tickets
from tpirt.transport.address import Endpoint
from tpirt.transport.base import Carrier, Channel
from tpirt.transport.frame import Frame, Kind
from tpirt.transport.grpc import GrpcPeerClient, GrpcPeerServer
from tpirt.transport.tickets import TcpListener

TIMEOUT_S = 10.0
LARGE = 3 << 20
Relay = Callable[[bytes], bytes]


@pytest.fixture(autouse=True)
def _beyond_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this machine's loopback for a network."""
    monkeypatch.setattr(Endpoint, "is_loopback", False)


@pytest.fixture
def cluster(tmp_path: Path) -> MadeCluster:
    return MadeCluster(tmp_path / "master")


@dataclass
class Service:
    """Answers requests, and sends back the frames of a session or link."""

    async def answer(self, method: str, request: bytes) -> bytes:
        return method.encode()

    async def receive(self, method: str, chunks: AsyncIterator[bytes]) -> bytes:
        return b"".join([chunk async for chunk in chunks])

    async def session(self, channel: Channel) -> None:
        ends = asyncio.Event()
        channel.frame_limit = 2 * LARGE
        sending: set[asyncio.Task[None]] = set()

        class Echo:
            def on_frame(self, frame: Frame) -> None:
                sending.add(asyncio.create_task(channel.send(frame)))

            def on_lost(self, exc: TpirtError) -> None:
                ends.set()

        channel.start(Echo())
        await ends.wait()
        await asyncio.gather(*sending, return_exceptions=True)

    link = session


class Inbox:
    """What comes over a channel."""

    def __init__(self, channel: Channel) -> None:
        self.frames: asyncio.Queue[Frame | TpirtError] = asyncio.Queue()
        channel.frame_limit = 2 * LARGE
        channel.start(self)

    def on_frame(self, frame: Frame) -> None:
        self.frames.put_nowait(frame)

    def on_lost(self, exc: TpirtError) -> None:
        self.frames.put_nowait(exc)

    async def next(self) -> Frame:
        got = await asyncio.wait_for(self.frames.get(), TIMEOUT_S)
        if isinstance(got, TpirtError):
            raise got
        return got


@asynccontextmanager
async def serving(trust: Trust) -> AsyncIterator[str]:
    server = GrpcPeerServer(Service(), trust=trust)
    port = await server.start("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.aclose()


async def ask(address: str, trust: Trust, method: str = "Hello") -> bytes:
    client = GrpcPeerClient(address, trust)
    try:
        return await client.call(method, b"", TIMEOUT_S)
    finally:
        await client.aclose()


# -- who gets in -------------------------------------------------------------------------------


@pytest.mark.both_loops
async def test_a_master_of_the_cluster_gets_in_and_learns_whom_it_met(
    cluster: MadeCluster, tmp_path: Path
) -> None:
    peer = cluster.peer(tmp_path / "peer")
    async with serving(peer) as address:
        client = GrpcPeerClient(address, cluster.master)
        assert await client.call("Hello", b"", TIMEOUT_S) == b"Hello"
        assert peer.identity is not None
        assert client.certificate is not None
        assert client.certificate.subject == peer.identity.subject
        assert client.certificate.name == "kitchen"
        await client.aclose()


async def test_a_certificate_of_a_peer_is_none_of_a_master(
    cluster: MadeCluster, tmp_path: Path
) -> None:
    """Not even where its owner lies about its own role."""
    peer = cluster.peer(tmp_path / "peer")
    path = cluster.peer(tmp_path / "liar").folder / IDENTITY_FILE
    (tmp_path / "as" / MASTER).mkdir(parents=True)
    shutil.copy(path, tmp_path / "as" / MASTER)
    liar = Trust(PEER, tmp_path / "liar")
    async with serving(peer) as address:
        for method in ("Hello", "Inventory", "Renew"):
            with pytest.raises(PeerError, match="only a master of its cluster may ask for this"):
                await ask(address, liar, method)
        client = GrpcPeerClient(address, liar)
        inbox = Inbox(await client.open_session())
        with pytest.raises(TpirtError, match="only a master of its cluster"):
            await inbox.next()
        await client.aclose()
    async with serving(peer) as address:
        with pytest.raises(IdentityError, match=r"is not in .*members\.json"):  # peers are listed
            await ask(address, Trust(MASTER, _listing_nobody(cluster, tmp_path)))


def _listing_nobody(cluster: MadeCluster, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(cluster.folder, copy)
    (copy / MASTER / "members.json").unlink()
    Trust(MASTER, copy).registry.rewrite()
    return copy


async def test_links_are_for_peers_only(cluster: MadeCluster, tmp_path: Path) -> None:
    first, second = (cluster.peer(tmp_path / name) for name in ("first", "second"))
    async with serving(first) as address:
        client = GrpcPeerClient(address, second)
        channel = await client.open_link()
        inbox = Inbox(channel)
        await channel.send(Frame.of(Kind.MESSAGE, b"hello"))
        assert (await inbox.next()).message == b"hello"
        await client.aclose()
        client = GrpcPeerClient(address, cluster.master)
        inbox = Inbox(await client.open_link())
        with pytest.raises(TpirtError, match="only a peer of its cluster"):
            await inbox.next()
        await client.aclose()


async def test_a_revoked_peer_is_refused_by_name(cluster: MadeCluster, tmp_path: Path) -> None:
    peer = cluster.peer(tmp_path / "peer")
    cluster.master.registry.revoke("kitchen")
    async with serving(peer) as address:
        with pytest.raises(IdentityError, match=r"certificate of kitchen was revoked on 20\d\d-"):
            await ask(address, cluster.master)


async def test_an_expired_peer_is_told_apart(cluster: MadeCluster, tmp_path: Path) -> None:
    peer = cluster.peer(tmp_path / "peer", valid=timedelta(days=-1))
    async with serving(peer) as address:
        with pytest.raises(IdentityError, match="its certificate has expired"):
            await ask(address, cluster.master)


async def test_an_expired_master_is_turned_away(cluster: MadeCluster, tmp_path: Path) -> None:
    peer = cluster.peer(tmp_path / "peer")
    folder = tmp_path / "late"
    cluster.identity(folder / MASTER / IDENTITY_FILE, MASTER, valid=timedelta(days=-1))
    shutil.copy(cluster.master.folder / "members.json", folder / MASTER)
    async with serving(peer) as address:
        with pytest.raises(IdentityError, match="hung up when it saw this device's certificate"):
            await ask(address, Trust(MASTER, folder))


async def test_another_cluster_is_told_apart(cluster: MadeCluster, tmp_path: Path) -> None:
    stranger = MadeCluster(tmp_path / "other").peer(tmp_path / "peer")
    async with serving(stranger) as address:
        with pytest.raises(IdentityError, match="its certificate is of another cluster"):
            await ask(address, cluster.master)


async def test_without_a_certificate_there_is_neither_service_nor_use(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=r"--join .*--listen 127.0.0.1.*--insecure"):
        async with serving(Trust(PEER, tmp_path)):
            pass
    with pytest.raises(IdentityError, match=r"this device has no certificate.*cluster init"):
        await ask("127.0.0.1:1", Trust(MASTER, tmp_path))


async def test_a_peer_that_hangs_up_after_the_handshake_is_not_said_to_lack_ours(
    cluster: MadeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no place, or is starting; this device does use TLS."""
    identity = cluster.peer(tmp_path / "peer").identity
    assert identity is not None
    monkeypatch.setattr(grpc_transport, "_PATIENCE_S", 0.2)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.path)

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=context) as server:
        address = "{}:{}".format(*server.sockets[0].getsockname())
        with pytest.raises(PeerUnreachableError, match="but hung up before it said anything"):
            await ask(address, cluster.master)


async def test_both_sides_must_be_insecure_or_neither(
    cluster: MadeCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    insecure = Trust(MASTER, cluster.folder, insecure=True)
    async with serving(cluster.peer(tmp_path / "peer")) as address:
        with pytest.raises(IdentityError, match="it uses TLS, and this device does not; leave out"):
            await ask(address, insecure)
    async with serving(Trust(PEER, tmp_path / "none", insecure=True)) as address:
        with pytest.raises(IdentityError, match=r"does not use TLS.*--insecure here, too"):
            await ask(address, cluster.master)
        caplog.clear()
        for _ in range(2):
            assert await ask(address, insecure) == b"Hello"
        assert caplog.text.count(f"INSECURE: peer {address}") == 1


async def test_another_device_at_the_address_is_noticed(
    cluster: MadeCluster, tmp_path: Path
) -> None:
    first, second = (cluster.peer(tmp_path / name, name) for name in ("first", "second"))
    async with serving(first) as address:
        client = GrpcPeerClient(address, cluster.master)
        await client.call("Hello", b"", TIMEOUT_S)
        await client.aclose()
    port = int(address.rpartition(":")[2])
    server = GrpcPeerServer(Service(), trust=second)
    await server.start("127.0.0.1", port)
    with pytest.raises(IdentityError, match="another device answers there now; first was met"):
        await client.call("Hello", b"", TIMEOUT_S)
    await client.aclose()
    await server.aclose()


async def test_a_peer_that_hangs_up_when_it_starts_is_tried_again(
    cluster: MadeCluster, tmp_path: Path
) -> None:
    """Nothing is wrong with anybody's certificate."""
    peer = cluster.peer(tmp_path / "peer")
    assert peer.identity is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(peer.identity.path)
    hung_up = asyncio.Event()

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()
        hung_up.set()

    starting = await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=context)
    port = starting.sockets[0].getsockname()[1]
    asking = asyncio.create_task(ask(f"127.0.0.1:{port}", cluster.master))
    await asyncio.wait_for(hung_up.wait(), TIMEOUT_S)
    starting.close()
    server = GrpcPeerServer(Service(), trust=peer)
    await server.start("127.0.0.1", port)
    assert await asking == b"Hello"
    await server.aclose()


async def test_a_peer_that_always_hangs_up_may_have_a_wrong_clock(
    cluster: MadeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As gRPC does when it sees a certificate that is not valid by its clock."""
    monkeypatch.setattr("tpirt.transport.grpc._PATIENCE_S", 0.1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    peer = cluster.peer(tmp_path / "peer")
    assert peer.identity is not None
    context.load_cert_chain(peer.identity.path)

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(PeerUnreachableError, match=r"hung up before .* is its clock right\?"):
            await ask(f"127.0.0.1:{port}", cluster.master)


async def test_calls_and_frames_go_to_the_address_that_was_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that was loopback's for a moment makes nobody else a peer in the clear."""
    monkeypatch.setattr(Endpoint, "is_loopback", property(lambda self: self.host == "127.0.0.1"))
    answers = ["127.0.0.1"]

    def look_up(host: str, port: int, **options: int) -> list[Any]:
        digits = (answers.pop() if answers else "192.0.2.1") if host == "pi.example" else host
        return original(digits, port, **options)

    original = socket.getaddrinfo
    async with serving(Trust(PEER, tmp_path)) as address:
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        client = GrpcPeerClient(address.replace("127.0.0.1", "pi.example"), Trust(MASTER, tmp_path))
        assert await client.call("Hello", b"", TIMEOUT_S) == b"Hello"
        channel = await client.open_session()
        assert channel.carrier.kind == "tcp"
        inbox = Inbox(channel)
        await channel.send(Frame.of(Kind.MESSAGE, b"hello"))
        assert (await inbox.next()).message == b"hello"
        assert not answers
        await client.aclose()
        with pytest.raises(IdentityError, match="this device has no certificate"):
            await client.call("Hello", b"", TIMEOUT_S)


async def test_an_offer_that_cannot_be_told_is_withdrawn(tmp_path: Path) -> None:
    class Context:
        async def send_initial_metadata(self, _: object) -> None:
            raise RuntimeError("the call is over")

    class Call:
        def first(self) -> asyncio.Future[bytes]:
            return asyncio.get_running_loop().create_future()

    server = GrpcPeerServer(Service(), trust=Trust(PEER, tmp_path, insecure=True))
    await server.start("127.0.0.1", 0)
    assert server._listener is not None
    with pytest.raises(RuntimeError):
        await server._accept(Call(), Context())  # type: ignore[arg-type]
    await asyncio.sleep(0)  # for the offer's callback
    assert not server._listener._expected
    await server.aclose()


async def test_strangers_do_not_keep_a_master_out(cluster: MadeCluster, tmp_path: Path) -> None:
    """Silent ones, ones that stop within their hello, ones that speak HTTP/2, and ones with TLS."""
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    said = [b"", hello, hello + bytes(2000), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100)]
    outsider = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    outsider.check_hostname, outsider.verify_mode = False, ssl.CERT_NONE
    async with serving(cluster.peer(tmp_path / "peer")) as address:
        port = int(address.rpartition(":")[2])
        writers = []
        for number in range(100):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(said[number % len(said)])
            writers.append(writer)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=outsider)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        with contextlib.suppress(OSError):  # a reset, or an alert
            assert await asyncio.wait_for(reader.read(), TIMEOUT_S) == b""
        assert await ask(address, cluster.master) == b"Hello"
        for each in (*writers, writer):
            each.close()


# -- replacing certificates --------------------------------------------------------------------


class Renewing(Service):
    """A peer that also takes a new certificate."""

    def __init__(self, trust: Trust):
        self._renewal = Renewal(trust)

    async def answer(self, method: str, request: bytes) -> bytes:
        if method != "Renew":
            return await super().answer(method, request)
        return encode_call(self._renewal.answer(decode_call(RenewRequest, request, "caller")))


@asynccontextmanager
async def renewing(trust: Trust) -> AsyncIterator[str]:
    server = GrpcPeerServer(Renewing(trust), trust=trust)
    port = await server.start("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.aclose()


async def test_a_certificate_that_ends_soon_is_replaced_and_used_at_once(
    cluster: MadeCluster, tmp_path: Path
) -> None:
    peer = cluster.peer(tmp_path / "peer", valid=timedelta(days=29))
    before = peer.identity
    assert before is not None
    async with renewing(peer) as address:
        client = GrpcPeerClient(address, cluster.master)
        await client.call("Hello", b"", TIMEOUT_S)
        await keep_up(cluster.master, [client])
        await client.aclose()
        assert await client.call("Hello", b"", TIMEOUT_S) == b"Hello"
        assert client.certificate is not None
        assert not client.certificate.is_due
        assert client.certificate.subject == before.subject
        await client.aclose()
    stored = Trust(PEER, tmp_path / "peer").identity
    assert stored is not None
    assert stored.certificate.serial == client.certificate.serial
    assert stored.key != before.key
    (member,) = cluster.master.registry.members()
    assert (member.identity, member.address) == (before.subject.identity, address)
    assert member.expires == f"{client.certificate.expires:%Y-%m-%dT%H:%M:%SZ}"


async def test_a_device_that_is_not_in_the_register_is_not_said_to_need_a_certificate(
    cluster: MadeCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peer = cluster.peer(tmp_path / "peer")
    async with renewing(peer) as address:
        client = GrpcPeerClient(address, cluster.master)
        await client.call("Hello", b"", TIMEOUT_S)
        await keep_up(MadeCluster(tmp_path / "other").master, [client])
        await client.aclose()
    assert "its address was not noted" in caplog.text
    assert "was not replaced" not in caplog.text


async def test_only_the_certificate_that_was_asked_for_is_taken(
    cluster: MadeCluster, tmp_path: Path
) -> None:
    peer = cluster.peer(tmp_path / "peer")
    others = [
        cluster.identity(tmp_path / "other.pem", PEER),
        MadeCluster(tmp_path / "stranger").identity(tmp_path / "stranger.pem", PEER),
    ]
    async with renewing(peer) as address:
        client = GrpcPeerClient(address, cluster.master)
        for offered in (*(each.certificate.pem for each in others), b"nonsense"):
            for request in (RenewRequest(), RenewRequest(certificate=offered)):
                answer = client.call("Renew", encode_call(request), TIMEOUT_S)
                if not request.certificate:
                    await answer
                    continue
                with pytest.raises(PeerError, match="certificate"):
                    await answer
        before = peer.identity
        (member,) = cluster.master.registry.members()
        assert await renew(client, cluster.master, member)
        assert peer.identity is not before
        await client.aclose()


async def test_another_device_at_the_address_keeps_its_certificate(
    cluster: MadeCluster, tmp_path: Path
) -> None:
    """It is asked nothing: the address that the register has may be somebody else's by now."""
    peer = cluster.peer(tmp_path / "peer", "attic")
    cluster.peer(tmp_path / "other", "kitchen")
    kitchen, before = cluster.master.registry.find("kitchen"), peer.identity
    async with serving(peer) as address:  # which would answer with nonsense
        client = GrpcPeerClient(address, cluster.master)
        with pytest.raises(IdentityError, match=r"attic \(.*\) answers there, expected kitchen \("):
            await renew(client, cluster.master, kitchen)
        await client.aclose()
    assert peer.identity is before


# -- links between workers ---------------------------------------------------------------------


async def test_a_session_is_named_to_the_device_that_the_master_has_met(
    cluster: MadeCluster, tmp_path: Path
) -> None:
    """Any other of the cluster, a revoked one say, learns nothing at its address."""
    first, second = (cluster.peer(tmp_path / name, name) for name in ("first", "second"))
    assert first.identity is not None
    heard: asyncio.Queue[Frame] = asyncio.Queue()

    class Listening(Service):
        async def link(self, channel: Channel) -> None:
            ended = asyncio.Event()

            class Receiver:
                def on_frame(self, frame: Frame) -> None:
                    heard.put_nowait(frame)

                def on_lost(self, exc: TpirtError) -> None:
                    ended.set()

            channel.start(Receiver())
            await ended.wait()

    def connect(where: str) -> GrpcPeerClient:
        return GrpcPeerClient(where, second)

    server = GrpcPeerServer(Listening(), trust=first)
    address = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
    for expected in ("0" * 16, first.identity.subject.identity):
        links = WorkerLinks(LinkSet(2), connect, Switchboard(), 1.0, 1 << 16)
        opening = asyncio.create_task(links._open(4711, address, expected))
        if expected == "0" * 16:
            with pytest.raises(TransportError, match="not the device that the master has met"):
                await opening
            assert heard.empty()
        else:
            joining = decode((await asyncio.wait_for(heard.get(), TIMEOUT_S)).message, "worker")
            assert joining == JoinLink(4711, 2)
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
        await links.aclose()
    await server.aclose()


# -- sealed frames -----------------------------------------------------------------------------


@pytest.mark.both_loops
async def test_frames_of_all_sizes_pass_sealed(cluster: MadeCluster, tmp_path: Path) -> None:
    peer = cluster.peer(tmp_path / "peer")
    async with serving(peer) as address:
        client = GrpcPeerClient(address, cluster.master)
        channel = await client.open_session()
        assert channel.carrier.kind == "tcp"
        assert channel.carrier.seal in ("AES-GCM", "ChaCha20-Poly1305")
        inbox = Inbox(channel)
        for size in (0, 1, 16 << 10, (64 << 10) - 64, 64 << 10, (64 << 10) + 1, LARGE):
            frame = Frame.of(Kind.PARTIAL, b"message", bytes([size % 251]) * size, seq=size)
            await channel.send(frame)
            got = await inbox.next()
            assert (got.message, got.header.seq) == (b"message", size)
            assert bytes(got.payload) == frame.payload
        await client.aclose()


async def test_frames_of_a_call_say_that_tls_protects_them(
    cluster: MadeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TcpListener, "beside", lambda *_: None)
    async with serving(cluster.peer(tmp_path / "peer")) as address:
        client = GrpcPeerClient(address, cluster.master)
        channel = await client.open_session()
        inbox = Inbox(channel)
        await channel.send(Frame.of(Kind.MESSAGE, b"hello"))
        assert (await inbox.next()).message == b"hello"
        assert (channel.carrier.kind, channel.carrier.seal) == ("grpc", "TLS")
        await client.aclose()


async def test_frames_on_loopback_are_in_the_clear(
    cluster: MadeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between two that have certificates: no sum within a device pays for a seal."""
    monkeypatch.setattr(Endpoint, "is_loopback", True)
    async with serving(cluster.peer(tmp_path / "peer")) as address:
        client = GrpcPeerClient(address, cluster.master)
        channel = await client.open_session()
        inbox = Inbox(channel)
        await channel.send(Frame.of(Kind.MESSAGE, b"hello"))
        assert (await inbox.next()).message == b"hello"
        assert channel.carrier == Carrier("tcp")
        await client.aclose()


async def test_an_offer_in_the_clear_is_not_taken(
    cluster: MadeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TcpListener.offer
    monkeypatch.setattr(TcpListener, "offer", lambda self, cipher: original(self, ""))
    async with serving(cluster.peer(tmp_path / "peer")) as address:
        client = GrpcPeerClient(address, cluster.master)
        channel = await client.open_session()
        assert channel.carrier.kind == "grpc"
        assert "in the clear" in channel.carrier.reason
        await client.aclose()


async def test_a_ticket_alone_admits_nobody() -> None:
    sockets = [Endpoint(2, ("127.0.0.1", 0)).listen()]
    listener = TcpListener(sockets, 20_000)
    offer, connected = listener.offer("AES-GCM")
    offset, ticket, _, cipher = offer.split(":")
    forged = ":".join((offset, ticket, bytes(32).hex(), cipher))
    clear = f"{offset}:{ticket}"
    for attempt in (forged, clear):
        with pytest.raises(OSError, match="port"):
            await tickets.connect(tickets.Address("127.0.0.1", 20_000), attempt)
        assert not connected.done()
    honest = await tickets.connect(tickets.Address("127.0.0.1", 20_000), offer)
    (await asyncio.wait_for(connected, TIMEOUT_S)).socket.close()
    honest.socket.close()
    await listener.aclose()


class Tampering:
    """A relay on the way to a port; ``change`` gets what comes from the caller after its ticket."""

    def __init__(self, port: int, change: Relay):
        self._port = port
        self._change = change
        self.seen = bytearray()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there = await asyncio.open_connection("127.0.0.1", self._port)

        async def back() -> None:
            while data := await there_reader.read(1 << 16):
                self.seen += data
                writer.write(data)
            writer.close()

        returning = asyncio.create_task(back())
        for welcome in (16, 21):  # the ticket, and the sealed byte
            there.write(await reader.readexactly(welcome))
        while data := await reader.read(1 << 20):
            self.seen += data
            there.write(self._change(data))
        there.close()
        await returning


def _flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _repeated(data: bytes) -> bytes:
    return data + data


def _reordered(data: bytes) -> bytes:
    first = 4 + int.from_bytes(data[:4], "little")
    return data[first:] + data[:first]


def _left_out(data: bytes) -> bytes:
    return data[4 + int.from_bytes(data[:4], "little") :]


def _lied(data: bytes) -> bytes:
    return (2**32 - 1).to_bytes(4, "little") + data[4:]


@pytest.mark.parametrize("change", [_flipped, _repeated, _reordered, _left_out, _lied])
async def test_a_record_that_was_tampered_with_breaks_the_link(
    change: Relay, cluster: MadeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: asyncio.Future[TpirtError] = asyncio.get_running_loop().create_future()
    heard: list[bytes] = []

    class Victim(Service):
        async def session(self, channel: Channel) -> None:
            class Receiver:
                def on_frame(self, frame: Frame) -> None:
                    heard.append(frame.message)

                def on_lost(self, exc: TpirtError) -> None:
                    lost.set_result(exc)

            channel.start(Receiver())
            await lost

    server = GrpcPeerServer(Victim(), trust=cluster.peer(tmp_path / "peer"))
    port = await server.start("127.0.0.1", 0)
    assert server._listener is not None
    tampering = Tampering(server._listener.port, change)
    relay = await asyncio.start_server(tampering.serve, "127.0.0.1", 0)
    original = TcpListener.offer

    def through_the_relay(self: TcpListener, cipher: str) -> tuple[str, Awaitable[object]]:
        offer, connected = original(self, cipher)
        rest = offer.partition(":")[2]
        return f"{relay.sockets[0].getsockname()[1] - port}:{rest}", connected

    monkeypatch.setattr(TcpListener, "offer", through_the_relay)
    client = GrpcPeerClient(f"127.0.0.1:{port}", cluster.master)
    channel = await client.open_session()
    assert channel.carrier.kind == "tcp"
    frames = [Frame.of(Kind.MESSAGE, b"secret-%d" % number) for number in range(2)]
    channel._sendmsg(  # type: ignore[attr-defined]
        [b"".join(map(bytes, frames[0].parts())), b"".join(map(bytes, frames[1].parts()))]
    )
    channel._sendmsg([b"".join(map(bytes, frames[0].parts()))])  # type: ignore[attr-defined]
    error = await asyncio.wait_for(lost, TIMEOUT_S)
    assert isinstance(error, PeerLostError)
    assert "connection lost: a sealed record" in str(error)
    assert len(heard) <= 3
    assert b"secret" not in tampering.seen
    await client.aclose()
    relay.close()
    await server.aclose()
