"""Connections beside gRPC's calls: who gets one, what goes wrong with it, and what is said then."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from tpirt.errors import PeerLostError, StoreError, TransportError
from tpirt.transport import tcp
from tpirt.transport.base import Channel
from tpirt.transport.codec import Frame
from tpirt.transport.grpc import GrpcPeerClient, GrpcPeerServer
from tpirt.transport.memory import MemoryChannel, memory_pair
from tpirt.transport.pb import tpirt_pb2 as pb
from tpirt.transport.tcp import PORT_OFFSET, TcpChannel, TcpListener

TIMEOUT_S = 10.0
Serve = Callable[[Channel], Awaitable[None]]


class Service:
    """What a worker's end of a session does is a function."""

    def __init__(self, serve: Serve):
        self.session = self.link = serve


@asynccontextmanager
async def server_of(serve: Serve, host: str = "127.0.0.1") -> AsyncIterator[tuple[str, int]]:
    server = GrpcPeerServer(Service(serve))  # type: ignore[arg-type]
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
            yield await client.open_session()
        finally:
            await client.aclose()


def numbered(number: int, payload: bytes = b"") -> Frame:
    return Frame(pb.FrameHeader(abort=pb.Abort(step=number)), payload)


async def echo(channel: Channel) -> None:
    while True:
        await channel.send(await channel.recv())


@pytest.fixture
async def ends() -> AsyncIterator[tuple[TcpChannel, socket.socket, MemoryChannel]]:
    """A channel, the bare other end of its connection, and the other end of its call."""
    mine, theirs = socket.socketpair()
    for end in (mine, theirs):
        end.setblocking(False)
    call, other = memory_pair("worker", "master")
    channel = TcpChannel(mine, call)
    yield channel, theirs, other
    await channel.aclose()
    theirs.close()


# -- who gets one ------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_sessions_and_links_have_one_and_it_lies_where_firewalls_can_be_told(
    host: str,
) -> None:
    async with server_of(echo, host) as (name, port):
        client = GrpcPeerClient(f"{name}:{port}")
        for channel in (await client.open_session(), await client.open_link()):
            assert channel.via == "tcp"
            await channel.send(numbered(7, b"payload"))
            assert (await channel.recv(TIMEOUT_S)).header.abort.step == 7
            assert isinstance(channel, TcpChannel)
            there = channel._socket.getpeername()[1]
            assert abs(there - port) == PORT_OFFSET or port + PORT_OFFSET > 65535
        await client.aclose()


async def test_frames_take_the_call_where_the_port_is_shut(monkeypatch: pytest.MonkeyPatch) -> None:
    original = TcpListener.offer
    with socket.create_server(("127.0.0.1", 0)) as taken:
        shut = taken.getsockname()[1]

    def misleading(self: TcpListener) -> tuple[str, asyncio.Future[socket.socket]]:
        offer, expected = original(self)
        port = self._listener.getsockname()[1] - self._offset
        return f"{shut - port}:{offer.partition(':')[2]}", expected

    monkeypatch.setattr(TcpListener, "offer", misleading)
    async with session_with(echo) as channel:
        assert channel.via == f"grpc (port {shut}: connection refused)"
        for number in range(3):
            await channel.send(numbered(number))
            assert (await channel.recv(TIMEOUT_S)).header.abort.step == number


async def test_a_port_that_swallows_everything_is_given_up_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tcp, "_PATIENCE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(
            TcpListener,
            "offer",
            lambda self: (
                f"{silent.getsockname()[1] - self._listener.getsockname()[1] + self._offset}:00",
                asyncio.get_running_loop().create_future(),
            ),
        )
        async with session_with(echo) as channel:
            assert "no answer within 0.1 s" in channel.via
            await channel.send(numbered(1))
            assert (await channel.recv(TIMEOUT_S)).header.abort.step == 1


@pytest.mark.parametrize("offer", ["", "x:00", "1000:no ticket", "1000"])
async def test_an_offer_that_is_none_is_left_alone(
    offer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TcpListener.offer
    monkeypatch.setattr(TcpListener, "offer", lambda self: (offer, original(self)[1]))
    async with session_with(echo) as channel:
        assert channel.via.startswith("grpc")
        await channel.send(numbered(1))
        assert (await channel.recv(TIMEOUT_S)).header.abort.step == 1


async def test_strangers_are_turned_away_and_a_ticket_lets_in_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tcp, "_PATIENCE_S", 0.2)
    loop = asyncio.get_running_loop()
    listener = TcpListener.beside("127.0.0.1", 20_000)
    assert listener is not None
    offer, expected = listener.offer()
    offset, _, ticket = offer.partition(":")

    async def answer_to(said: bytes) -> bytes:
        with socket.socket() as stranger:
            stranger.setblocking(False)
            await loop.sock_connect(stranger, ("127.0.0.1", 20_000 + int(offset)))
            await loop.sock_sendall(stranger, said)
            try:
                return await asyncio.wait_for(loop.sock_recv(stranger, 99), TIMEOUT_S)
            except ConnectionResetError:
                return b""

    assert await answer_to(bytes(16)) == b""
    assert await answer_to(b"GET / HTTP/1.1\r\n\r\n") == b""
    assert await answer_to(b"") == b""  # after some patience
    assert not expected.done()
    assert await answer_to(bytes.fromhex(ticket)) == tcp._WELCOME
    assert await answer_to(bytes.fromhex(ticket)) == b""
    expected.result().close()
    await listener.aclose()


async def test_an_offer_can_be_withdrawn_before_and_after_it_was_taken() -> None:
    loop = asyncio.get_running_loop()
    listener = TcpListener.beside("127.0.0.1", 20_000)
    assert listener is not None
    for late in (False, True):
        offer, expected = listener.offer()
        if late:
            listener.withdraw(expected)
            with pytest.raises(OSError, match="port"):
                await tcp.connect("127.0.0.1:20000", offer)
        else:
            taken = await tcp.connect("127.0.0.1:20000", offer)
            await asyncio.wait_for(asyncio.shield(expected), TIMEOUT_S)
            listener.withdraw(expected)
            assert await asyncio.wait_for(loop.sock_recv(taken, 1), TIMEOUT_S) == b""
            taken.close()
    await listener.aclose()


# -- what goes wrong ---------------------------------------------------------------------------


Ends = tuple[TcpChannel, socket.socket, MemoryChannel]


async def test_a_frame_may_come_in_pieces(ends: Ends) -> None:
    channel, there, _ = ends
    frames = [numbered(1), numbered(2, bytes(300_000)), numbered(3, b"x" * 65_530), numbered(4)]
    data = b"".join(struct.pack("<I", len(f.data)) + f.data for f in frames)
    loop = asyncio.get_running_loop()

    async def send_in_pieces() -> None:
        sizes = [1, 2, 3, 5, 9, 40_000, 1, 65_536]
        position = turn = 0
        while position < len(data):
            piece = data[position : position + sizes[turn % len(sizes)]]
            await loop.sock_sendall(there, piece)
            await asyncio.sleep(0)
            position, turn = position + len(piece), turn + 1

    sending = asyncio.create_task(send_in_pieces())
    for frame in frames:
        got = await channel.recv(TIMEOUT_S)
        assert got.header == frame.header
        assert bytes(got.payload) == bytes(frame.payload)
    await sending


async def test_a_stream_cut_in_the_middle_of_a_frame_is_a_lost_peer(ends: Ends) -> None:
    channel, there, call = ends
    there.send(struct.pack("<I", 100) + b"only this")
    there.close()
    await call.aclose()
    with pytest.raises(PeerLostError, match="worker"):
        await channel.recv(TIMEOUT_S)


async def test_a_length_beyond_reason_is_refused(ends: Ends) -> None:
    channel, there, _ = ends
    there.send(b"\xff\xff\xff\xff")
    with pytest.raises(TransportError, match="peer worker: a frame of 4294967295 bytes"):
        await channel.recv(TIMEOUT_S)


async def test_the_end_of_the_call_ends_a_connection_that_hangs(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a machine that went away without a word looks like: gRPC's pings notice."""
    monkeypatch.setattr(tcp, "_LAST_WORDS_S", 0.05)
    channel, _, call = ends
    waiting = asyncio.create_task(channel.recv())
    await asyncio.sleep(0)
    await call.aclose()
    with pytest.raises(PeerLostError, match="worker: left"):
        await asyncio.wait_for(waiting, TIMEOUT_S)


async def test_a_large_send_to_who_takes_nothing_ends_with_the_call(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "_LAST_WORDS_S", 0.05)
    channel, _, call = ends
    sending = asyncio.create_task(channel.send(numbered(1, bytes(32 << 20))))
    await asyncio.sleep(0.02)
    assert not sending.done()
    await call.aclose()
    with pytest.raises(PeerLostError):
        await asyncio.wait_for(sending, TIMEOUT_S)


async def test_a_cancelled_send_closes_the_channel(ends: Ends) -> None:
    """What was sent of the frame cannot be taken back, and nothing may follow it."""
    channel, _, _ = ends
    sending = asyncio.create_task(channel.send(numbered(1, bytes(32 << 20))))
    await asyncio.sleep(0.02)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    with pytest.raises(PeerLostError, match="closed"):
        await channel.send(numbered(2))


async def test_last_words_are_heard_over_what_was_not_read() -> None:
    """A connection closed with unread data is reset, and would take them along."""

    async def refuse(channel: Channel) -> None:
        await channel.send(numbered(99))

    for _ in range(20):
        async with session_with(refuse) as channel:
            assert channel.via == "tcp"
            await channel.send(numbered(1, bytes(200_000)))
            assert (await channel.recv(TIMEOUT_S)).header.abort.step == 99
            with pytest.raises(PeerLostError):
                await channel.recv(TIMEOUT_S)


async def test_why_a_session_ended_is_told() -> None:
    async def fail(channel: Channel) -> None:
        await channel.recv()
        raise StoreError("disk on fire")

    async with session_with(fail) as channel:
        assert channel.via == "tcp"
        await channel.send(numbered(1))
        with pytest.raises(PeerLostError, match="disk on fire"):
            await channel.recv(TIMEOUT_S)
