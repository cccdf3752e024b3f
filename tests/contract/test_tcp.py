"""Connections that belong to gRPC calls: who gets one, what goes wrong, and what is said then."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager

import pytest
import uvloop

from tpirt.errors import PeerLostError, StoreError, TpirtError, TransportError
from tpirt.transport import tickets
from tpirt.transport.address import Address, Endpoint, resolve
from tpirt.transport.base import Carrier, Channel
from tpirt.transport.frame import Frame, Kind
from tpirt.transport.grpc import GrpcPeerClient, GrpcPeerServer
from tpirt.transport.memory import MemoryChannel, memory_pair
from tpirt.transport.tcp import TcpChannel
from tpirt.transport.tickets import PORT_OFFSET, Connection, TcpListener

TIMEOUT_S = 15.0
FALLBACK_S = 3.0  # the patience of 2 s, on a busy machine
PEER = Address("127.0.0.1", 20_000)
LARGE = 32 << 20
LOOPS = {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}
Serve = Callable[[Channel], Awaitable[None]]
Ends = tuple[TcpChannel, socket.socket, MemoryChannel]


class Inbox:
    """A receiver whose frames are awaited one by one."""

    def __init__(self, channel: Channel) -> None:
        self.lost: list[TpirtError] = []
        self._queue: asyncio.Queue[Frame | TpirtError] = asyncio.Queue()
        channel.frame_limit = 2 * LARGE
        channel.start(self)

    def on_frame(self, frame: Frame) -> None:
        self._queue.put_nowait(frame)

    def on_lost(self, exc: TpirtError) -> None:
        self.lost.append(exc)
        self._queue.put_nowait(exc)

    async def next(self) -> Frame:
        got = await asyncio.wait_for(self._queue.get(), TIMEOUT_S)
        if isinstance(got, TpirtError):
            raise got
        return got


class Service:
    """What a worker's end of a session does is a function."""

    def __init__(self, serve: Serve):
        self.session = self.link = serve

    async def answer(self, method: str, request: bytes) -> bytes:
        return request

    async def receive(self, method: str, chunks: AsyncIterator[bytes]) -> bytes:
        return b""


@asynccontextmanager
async def server_of(serve: Serve, host: str = "127.0.0.1") -> AsyncIterator[tuple[str, int]]:
    server = GrpcPeerServer(Service(serve))
    port = await server.start(host, 0)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield (f"[{host}]" if ":" in host else host), port
    finally:
        await server.aclose()


@asynccontextmanager
async def session_with(serve: Serve, host: str = "127.0.0.1") -> AsyncIterator[Channel]:
    async with server_of(serve, host) as (name, port):
        client = GrpcPeerClient(f"{name}:{port}")
        try:
            async with asyncio.timeout(FALLBACK_S):
                channel = await client.open_session()
            yield channel
        finally:
            await client.aclose()


async def listener_on_loopback() -> TcpListener:
    listener = TcpListener.beside(await resolve(PEER, listening=True), PEER.port)
    assert listener is not None
    return listener


def numbered(number: int, payload: bytes = b"") -> Frame:
    return Frame.of(Kind.MESSAGE, b"", payload, seq=number)


async def echo(channel: Channel) -> None:
    inbox = Inbox(channel)
    while True:
        await channel.send(await inbox.next())


async def check_echo(channel: Channel) -> None:
    inbox = Inbox(channel)
    for number in range(3):
        await channel.send(numbered(number, b"payload"))
        assert (await inbox.next()).header.seq == number


@asynccontextmanager
async def connected_ends() -> AsyncIterator[Ends]:
    """A channel, the bare other end of its connection, and the other end of its call."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        mine, _ = server.accept()
    for end in (mine, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
        end.setblocking(False)
    call, other = memory_pair("worker", "master")
    channel = TcpChannel(Connection(mine, None), call)
    yield channel, theirs, other
    await channel.aclose()
    theirs.close()


def with_ends(test: Callable[[Ends], Awaitable[None]]) -> Callable[[str], None]:
    """Run a test in either event loop: what sockets do is theirs."""

    async def scenario() -> None:
        async with connected_ends() as ends:
            await test(ends)

    @pytest.mark.parametrize("loop", LOOPS)
    def run(loop: str) -> None:
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(asyncio.wait_for(scenario(), TIMEOUT_S))

    run.__doc__ = test.__doc__
    return run


# -- who gets one ------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_sessions_and_links_have_one_and_it_lies_where_firewalls_can_be_told(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listening: list[int] = []
    original = TcpListener.offer

    def noting(self: TcpListener, cipher: str) -> tuple[str, asyncio.Future[Connection]]:
        listening.append(self.port)
        return original(self, cipher)

    monkeypatch.setattr(TcpListener, "offer", noting)
    async with server_of(echo, host) as (name, port):
        client = GrpcPeerClient(f"{name}:{port}")
        for channel in (await client.open_session(), await client.open_link()):
            assert channel.carrier == Carrier("tcp")
            await check_echo(channel)
        assert abs(listening[0] - port) == PORT_OFFSET or port + PORT_OFFSET > 65535
        await client.aclose()


def offer_port(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Have servers send their callers somewhere else."""
    original = TcpListener.offer

    def misleading(self: TcpListener, cipher: str) -> tuple[str, asyncio.Future[Connection]]:
        offer, expected = original(self, cipher)
        offset, _, ticket = offer.partition(":")
        return f"{port - self.port + int(offset)}:{ticket}", expected

    monkeypatch.setattr(TcpListener, "offer", misleading)


async def test_frames_take_the_call_where_the_port_is_shut(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        shut = taken.getsockname()[1]
    offer_port(monkeypatch, shut)
    async with session_with(echo) as channel:
        assert channel.carrier == Carrier("grpc", f"port {shut}: connection refused")
        await check_echo(channel)


async def test_a_port_that_accepts_and_says_nothing_is_given_up_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        offer_port(monkeypatch, silent.getsockname()[1])
        async with session_with(echo) as channel:
            assert "no answer within 2 s" in channel.carrier.reason
            await check_echo(channel)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "another service answers there"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "another service answers there"),
        (b"", "port "),  # closed or reset
    ],
)
async def test_another_service_at_the_port_is_given_up(
    said: bytes, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        if said:
            await reader.read()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as foreign:
        offer_port(monkeypatch, foreign.sockets[0].getsockname()[1])
        async with session_with(echo) as channel:
            assert channel.carrier.kind == "grpc"
            assert why in channel.carrier.reason
            await check_echo(channel)


@pytest.mark.parametrize("offer", ["", "x:00", "1000:no ticket", "1000", "99999:00"])
async def test_an_offer_that_is_none_is_left_alone(
    offer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TcpListener.offer
    monkeypatch.setattr(TcpListener, "offer", lambda self, cipher: (offer, original(self)[1]))
    async with session_with(echo) as channel:
        assert channel.carrier.kind == "grpc"
        await check_echo(channel)


async def test_every_address_of_a_host_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one swallows everything, the second refuses; the third is the peer."""
    listener = await listener_on_loopback()
    offer, expected = listener.offer()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with socket.create_server(("127.0.0.1", 0)) as shut:
            refused = shut.getsockname()
        found = [silent.getsockname(), refused, ("127.0.0.1", listener.port)]

        async def addresses(_: Address) -> list[Endpoint]:
            return [Endpoint(socket.AF_INET, where) for where in found]

        monkeypatch.setattr(tickets, "resolve", addresses)
        connection, _ = await tickets.connect(PEER, offer)
        assert connection.getpeername()[1] == listener.port
        (await expected).socket.close()
        connection.close()
    await listener.aclose()


async def answer_to(port: int, said: bytes) -> bytes:
    """What a listener says to a caller; empty if it hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    try:
        return await asyncio.wait_for(reader.read(99), TIMEOUT_S)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_strangers_are_turned_away_and_a_ticket_lets_in_one() -> None:
    listener = await listener_on_loopback()
    offer, expected = listener.offer()
    ticket = bytes.fromhex(offer.partition(":")[2])
    assert await answer_to(listener.port, bytes(16)) == b""
    assert await answer_to(listener.port, b"GET / HTTP/1.1\r\n\r\n") == b""
    assert await answer_to(listener.port, b"") == b""  # after some patience
    assert not expected.done()
    connection, _ = await tickets.connect(PEER, offer)
    (await asyncio.wait_for(expected, TIMEOUT_S)).socket.close()
    connection.close()
    assert await answer_to(listener.port, ticket) == b""
    await listener.aclose()


async def test_a_caller_that_gives_up_during_the_welcome_has_not_connected() -> None:
    listener = await listener_on_loopback()
    offer, expected = listener.offer()
    ticket = bytes.fromhex(offer.partition(":")[2])
    assert await answer_to(listener.port, ticket) == b"\x06"
    await answer_to(listener.port, bytes(16))  # by now the first one's end has been seen
    assert not expected.done()
    listener.withdraw(expected)
    await listener.aclose()


async def test_silent_connections_take_a_bounded_number_of_descriptors() -> None:
    async def descriptors_of_server() -> int:
        if not strangers:
            await answer_to(listener.port, b"x" * 16)
        count = 0
        while count != (count := len(os.listdir("/proc/self/fd"))):  # noqa: ASYNC110 - the system's
            await asyncio.sleep(0.2)
        return count - len(strangers)

    listener = await listener_on_loopback()
    strangers: list[socket.socket] = []
    before = await descriptors_of_server()
    with ExitStack() as stack:
        for _ in range(120):  # the backlog holds what is not accepted
            stranger = socket.create_connection(("127.0.0.1", listener.port))
            strangers.append(stack.enter_context(stranger))
        during = await descriptors_of_server()
        assert 32 < during - before <= 66
    offer, expected = listener.offer()  # they have gone; the next caller gets in
    connection, _ = await tickets.connect(PEER, offer)
    (await expected).socket.close()
    connection.close()
    await listener.aclose()


async def test_an_offer_can_be_withdrawn_before_and_after_it_was_taken() -> None:
    loop = asyncio.get_running_loop()
    listener = await listener_on_loopback()
    offer, expected = listener.offer()
    listener.withdraw(expected)
    with pytest.raises(OSError, match="port"):
        await tickets.connect(PEER, offer)
    offer, expected = listener.offer()
    taken, _ = await tickets.connect(PEER, offer)
    await asyncio.wait_for(asyncio.shield(expected), TIMEOUT_S)
    listener.withdraw(expected)
    assert await asyncio.wait_for(loop.sock_recv(taken, 1), TIMEOUT_S) == b""
    taken.close()
    await listener.aclose()


# -- what goes wrong ---------------------------------------------------------------------------


@with_ends
async def test_a_frame_may_come_in_pieces(ends: Ends) -> None:
    channel, there, _ = ends
    inbox = Inbox(channel)
    frames = [numbered(1), numbered(2, bytes(300_000)), numbered(3, b"x" * 65_470), numbered(4)]
    data = b"".join(part for frame in frames for part in frame.parts())
    loop = asyncio.get_running_loop()
    sizes = [1, 2, 3, 5, 9, 40_000, 1, 65_536]
    position = turn = 0
    while position < len(data):
        piece = data[position : position + sizes[turn % len(sizes)]]
        await loop.sock_sendall(there, piece)
        await asyncio.sleep(0)
        position, turn = position + len(piece), turn + 1
    for frame in frames:
        got = await inbox.next()
        assert got.head == frame.head
        assert got.payload == frame.payload
    assert channel.bytes_received == len(data)


@with_ends
async def test_what_came_of_a_large_frame_is_counted_though_it_is_little(ends: Ends) -> None:
    channel, there, _ = ends
    inbox = Inbox(channel)
    data = b"".join(numbered(1, bytes(1 << 20)).parts())
    there.send(data[:1000])
    while channel.bytes_received < 1000:  # noqa: ASYNC110
        await asyncio.sleep(0)
    there.send(data[1000:1010])  # less than what is worth waking up for
    await asyncio.sleep(0.05)
    channel.poll()
    assert channel.bytes_received == 1010
    await asyncio.get_running_loop().sock_sendall(there, data[1010:])
    assert len((await inbox.next()).payload) == 1 << 20


@with_ends
async def test_a_stream_cut_in_the_middle_of_a_frame_is_a_lost_peer(ends: Ends) -> None:
    channel, there, call = ends
    inbox = Inbox(channel)
    there.send(numbered(1).head + numbered(2, bytes(100)).head + b"only this")
    there.close()
    await call.aclose()
    assert (await inbox.next()).header.seq == 1
    with pytest.raises(PeerLostError, match="worker"):
        await inbox.next()


@with_ends
async def test_a_reset_is_told_once_to_receiver_and_senders(ends: Ends) -> None:
    channel, there, _ = ends
    inbox = Inbox(channel)
    sending = [asyncio.create_task(channel.send(numbered(n, bytes(LARGE)))) for n in range(2)]
    await asyncio.sleep(0)
    there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    there.close()
    with pytest.raises(PeerLostError, match="worker: connection lost"):
        await inbox.next()
    for task in sending:
        with pytest.raises(PeerLostError, match="worker: connection lost"):
            await task
    with pytest.raises(PeerLostError):
        await channel.send(numbered(3))
    assert not channel.send_nowait(numbered(4))
    assert len(inbox.lost) == 1


@with_ends
async def test_both_send_at_once_through_small_buffers(ends: Ends) -> None:
    channel, there, _ = ends
    call, _other = memory_pair("master", "worker")
    other = TcpChannel(Connection(there, None), call)
    inboxes = Inbox(channel), Inbox(other)
    data = os.urandom(8 << 20)
    await asyncio.gather(channel.send(numbered(1, data)), other.send(numbered(1, data)))
    for inbox in inboxes:
        assert (await inbox.next()).payload == data
    await other.aclose()


@with_ends
async def test_the_end_of_the_call_ends_a_connection_that_hangs(ends: Ends) -> None:
    """How a machine that went away without a word looks: gRPC's pings notice at last."""
    channel, _, call = ends
    inbox = Inbox(channel)
    await asyncio.sleep(0)
    await call.aclose()
    with pytest.raises(PeerLostError, match="worker: left"):
        await inbox.next()


@with_ends
async def test_what_was_sent_before_the_call_ended_is_still_read(ends: Ends) -> None:
    channel, there, call = ends
    inbox = Inbox(channel)
    await call.aclose()
    await asyncio.sleep(0.05)
    there.send(numbered(1).head)
    assert (await inbox.next()).header.seq == 1
    with pytest.raises(PeerLostError, match="worker: left"):
        await inbox.next()


@with_ends
async def test_a_large_send_to_a_peer_that_takes_nothing_ends_with_the_call(ends: Ends) -> None:
    channel, _, call = ends
    sending = asyncio.create_task(channel.send(numbered(1, bytes(LARGE))))
    await asyncio.sleep(0.02)
    assert not sending.done()
    await call.aclose()
    with pytest.raises(PeerLostError):
        await asyncio.wait_for(sending, TIMEOUT_S)


@with_ends
async def test_no_descriptor_is_watched_after_it_was_closed(ends: Ends) -> None:
    """A new socket that gets the same number is nobody else's."""
    channel, there, _ = ends
    number = channel._socket.fileno()
    reused: list[socket.socket] = []
    inbox = Inbox(channel)
    sending = asyncio.create_task(channel.send(numbered(1, bytes(LARGE))))
    await asyncio.sleep(0)
    closing = asyncio.create_task(channel.aclose())
    await asyncio.wait({sending, closing})
    loop = asyncio.get_running_loop()
    for a, b in [socket.socketpair() for _ in range(3)]:
        for end, other in ((a, b), (b, a)):
            end.setblocking(False)
            receiving = asyncio.create_task(loop.sock_recv(end, 9))
            await asyncio.sleep(0.01)
            other.send(b"x")
            assert await receiving == b"x"
        reused += [a, b]
    assert number in [end.fileno() for end in reused]
    for end in reused:
        end.close()
    assert isinstance(sending.exception(), PeerLostError)
    assert not inbox.lost
    there.close()


@pytest.mark.parametrize("kind", ["tcp", "grpc"])
async def test_last_words_are_heard_over_what_was_not_read(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection closed with unread data is reset, and would take them along.

    gRPC drops them now and then on a busy machine ("Internal error from Core").
    """
    if kind == "grpc":
        monkeypatch.setattr(TcpListener, "beside", lambda *_: None)

    async def refuse(channel: Channel) -> None:
        await channel.send(numbered(99))

    async def refuse_and_close(channel: Channel) -> None:
        await channel.send(numbered(99))
        await channel.aclose()

    unheard = 0
    for serve in [refuse, refuse_and_close] * 10:
        async with session_with(serve) as channel:
            assert channel.carrier.kind == kind
            inbox = Inbox(channel)
            with contextlib.suppress(PeerLostError):  # it may be gone already
                await channel.send(numbered(1, bytes(200_000)))
            try:
                assert (await inbox.next()).header.seq == 99
            except PeerLostError:
                unheard += 1
                continue
            with pytest.raises(PeerLostError):
                await inbox.next()
    assert unheard <= (5 if kind == "grpc" else 0)


async def test_what_a_cancelled_send_left_is_sent_when_the_session_ends() -> None:
    payload = os.urandom(2 << 20)

    async def cancel(channel: Channel) -> None:
        inbox = Inbox(channel)
        await inbox.next()
        sending = [asyncio.create_task(channel.send(numbered(n, payload))) for n in range(3)]
        await asyncio.sleep(0)
        for task in sending:
            task.cancel()

    async with session_with(cancel) as channel:
        inbox = Inbox(channel)
        await channel.send(numbered(1))
        for number in range(3):
            frame = await inbox.next()
            assert (frame.header.seq, frame.payload) == (number, payload)


async def test_why_a_session_ended_is_told() -> None:
    async def fail(channel: Channel) -> None:
        await Inbox(channel).next()
        raise StoreError("disk on fire")

    async with session_with(fail) as channel:
        assert channel.carrier.kind == "tcp"
        inbox = Inbox(channel)
        await channel.send(numbered(1))
        with pytest.raises(PeerLostError, match="disk on fire"):
            await inbox.next()


async def test_garbage_ends_the_session_with_a_reason_for_both() -> None:
    reasons: list[TpirtError] = []

    async def read(channel: Channel) -> None:
        try:
            await Inbox(channel).next()
        except TransportError as exc:
            reasons.append(exc)
            raise

    async with session_with(read) as channel:
        inbox = Inbox(channel)
        garbage = numbered(1)
        garbage.head = bytes(64)
        await channel.send(garbage)
        with pytest.raises(PeerLostError, match="expected a frame"):
            await inbox.next()
    assert "master" in str(reasons[0])
