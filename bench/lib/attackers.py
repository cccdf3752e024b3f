"""The attackers of :mod:`bench.hostile`: one for each entry point of a peer, and of a master.

Each sends a number of messages, valid ones with seeded changes, and notes in a :class:`Tally` how
they were taken. What must not be is in :attr:`Tally.wrong`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from bench.lib.mutation import (
    HUGE_BYTES,
    bodies,
    huge_orders,
    mutated,
    mutated_frame,
    mutated_message,
    noise,
)
from tpirt.errors import TransportError
from tpirt.identity.certificates import Certificate, Identity
from tpirt.identity.join import OVER, WELCOME, WRONG_CODE, DeviceExchange
from tpirt.protocol.messages import (
    PROTOCOL_VERSION,
    ClockRequest,
    HelloRequest,
    JoinLink,
    encode,
    encode_call,
)
from tpirt.protocol.pb import tpirt_pb2 as pb
from tpirt.transport.address import Address
from tpirt.transport.frame import Frame, FrameReader, Kind
from tpirt.transport.grpc_channel import OPTIONS
from tpirt.transport.sealing import RECORD_BYTES as _RECORD_BYTES
from tpirt.transport.tickets import connect
from tpirt.transport.tls import client_credentials

SERVICE = "/tpirt.v1.Peer/"
CALLS = ("Hello", "Inventory", "Renew", "PutUnits", "Session", "Link")
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_ANSWER_S = 0.25  # for a stranger to hear something
_AGAIN_S = 0.02
_CALL_S = 20.0  # for an answer; one that takes longer is a hang
_REPLY_S = 0.5  # for a reply; there is none while the rest of an announced frame is awaited
_SETUP = 1  # number of the first request
_HUNG = "no answer"
_EARLY = "refused early"  # while the message was on its way
_WAITS = "waits for more"  # a frame that is larger than what came of it
_CIPHER = (("tpirt-cipher", "AES-GCM"),)
_REFUSALS = {
    *("FAILED_PRECONDITION", "DATA_LOSS", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"),
    _EARLY,
}
_ENDS = {*_REFUSALS, "OK", _WAITS}  # of a stream; OK if its caller leaves first
_TLS_RECORDS = (0x15, 0x16)  # alert, handshake: all that a stranger may hear
_PROOFS = 3  # each attacker: three wrong codes end an invitation, and the next takes a second
_MARKER = 1 << 20  # numbers of requests that are not among the recorded ones


@dataclass
class Tally:
    """How the messages of one entry point were taken."""

    messages: int = 0
    taken: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)

    def add(self, how: str, *, wrong: bool = False) -> None:
        """Count one message."""
        self.messages += 1
        (self.wrong if wrong else self.taken)[how] += 1


@dataclass
class Corpus:
    """What an honest master has sent: requests by method, an upload, the frames of a session."""

    calls: dict[str, list[bytes]] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)


@dataclass
class Target:
    """Whom to attack, with what.

    Attributes:
        address: of the peer.
        second_port: of the connections beside its calls.
        certificate: what it shows.
        corpus: valid messages.
        invitation: opens one on the master, or returns the one that is open: its address.
    """

    address: Address
    second_port: int
    certificate: Certificate
    corpus: Corpus
    invitation: Callable[[], Awaitable[Address]]

    def channel(self, identity: Identity) -> grpc.aio.Channel:
        """A connection of its own, with a certificate."""
        pinned = ("grpc.ssl_target_name_override", self.certificate.subject.own_host)
        credentials = client_credentials(identity)
        return grpc.aio.secure_channel(self.address.uri, credentials, options=(*OPTIONS, pinned))


Attack = Callable[[Target, random.Random, int, Tally], Awaitable[None]]


# -- before authentication -----------------------------------------------------------------------


async def raw_bytes(target: Target, chance: random.Random, count: int, tally: Tally) -> None:
    """Noise, and changed beginnings of TLS and of HTTP/2, on gRPC's port."""
    corpus = [_client_hello(), _http2(), b"GET / HTTP/1.1\r\n\r\n", b""]
    for _ in range(count):
        said = _changed(chance, corpus)
        answer = await _heard(target.address.host, target.address.port, said)
        tally.add(_name(answer), wrong=bool(answer) and answer[0] not in _TLS_RECORDS)


async def without_certificate(
    target: Target, chance: random.Random, count: int, tally: Tally
) -> None:
    """A TLS handshake without a certificate, then HTTP/2."""
    context = _any_server()
    await _within_tls(target, context, chance, count, tally, admitted=False)


async def second_port(target: Target, chance: random.Random, count: int, tally: Tally) -> None:
    """Noise and changed tickets on the port of the connections beside calls."""
    for _ in range(count):
        ticket = chance.randbytes(16)
        said = _changed(chance, [ticket, ticket + bytes(21), ticket[:15], _client_hello()])
        answer = await _heard(target.address.host, target.second_port, said)
        tally.add(_name(answer), wrong=bool(answer))


async def join_listener(target: Target, chance: random.Random, count: int, tally: Tally) -> None:
    """Changed messages of devices that join, on the master's invitation."""
    proofs = min(_PROOFS, count // 10)
    for _ in range(count):
        exchange = DeviceExchange(b"%08d" % chance.randrange(10**8))
        hello, proof = exchange.hello(), b""
        if chance.random() < 0.7:
            hello = mutated(chance, hello)
        elif proofs > 0:
            proofs, proof = proofs - 1, _framed(chance, noise(chance, 300))
        where = await target.invitation()
        answer = await _heard(where.host, where.port, _framed(chance, hello) + proof)
        verdicts = answer[35:]  # after 33 bytes and their length
        how = {WRONG_CODE: "wrong code", OVER: "over"}.get(verdicts[2:3], "an element")
        tally.add(how if answer else "closed", wrong=verdicts[2:3] == WELCOME)


# -- with a certificate --------------------------------------------------------------------------


def http2_with(identity: Identity) -> Attack:
    """HTTP/2 frames, changed, from a device of the cluster."""

    async def attack(target: Target, chance: random.Random, count: int, tally: Tally) -> None:
        context = _any_server()
        context.load_cert_chain(identity.path)
        await _within_tls(target, context, chance, count, tally, admitted=True)

    return attack


def calls_with(identity: Identity, *methods: str, allowed: bool) -> Attack:
    """Calls with changed messages; nothing may be answered where they are not ``allowed``."""

    async def attack(target: Target, chance: random.Random, count: int, tally: Tally) -> None:
        async with target.channel(identity) as channel:
            for number in range(count):
                method = methods[number % len(methods)]
                sent = list(_messages(target.corpus, method, chance))
                how, details = await _called(channel, method, sent)
                tally.add(how, wrong=how not in _REFUSALS and not (allowed and how == "OK"))
                if how not in _REFUSALS and how != "OK":
                    tally.wrong[f"{method}: {details}"[:300]] += 1

    return attack


def links_with(identity: Identity) -> Attack:
    """Frames on links between workers, for sessions that there are not."""

    async def attack(target: Target, chance: random.Random, count: int, tally: Tally) -> None:
        joining = JoinLink(chance.getrandbits(64), 2)
        frame = _bytes_of(Frame.of(Kind.REQUEST, encode(joining), seq=1))
        message = pb.Message.FromString(encode(joining))
        async with target.channel(identity) as channel:
            for _ in range(count):
                sent = mutated_frame(chance, frame, chance.choice((message, *bodies())))
                call = _Stream(channel, "Link")
                await call.write(sent[: 1 << 20])
                await call.done()
                how = await call.end()
                joined = any(b"Joined" in repr(each).encode() for each in call.heard)
                tally.add(how, wrong=how not in _ENDS or joined)

    return attack


def setups_with(identity: Identity) -> Attack:
    """Sessions that begin with a changed Setup or another message."""

    async def attack(target: Target, chance: random.Random, count: int, tally: Tally) -> None:
        setup = target.corpus.frames[0]
        message = _message_of(setup)
        async with target.channel(identity) as channel:
            for _ in range(count):
                call = _Stream(channel, "Session")
                await call.write(mutated_frame(chance, setup, message))
                answered = await call.asked(_MARKER)
                await call.done()
                how = await call.end()
                tally.add(
                    "told the time" if answered else how,
                    wrong=how not in _ENDS,
                )

    return attack


def frames_with(identity: Identity) -> Attack:
    """Changed frames in a session, after a valid Setup and some of what an honest master sends."""

    async def attack(target: Target, chance: random.Random, count: int, tally: Tally) -> None:
        frames = target.corpus.frames
        kinds = [(frame, _message_of(frame)) for frame in frames]
        kinds += [(_bytes_of(Frame.of(Kind.REQUEST, b"", seq=7)), body) for body in bodies()]
        async with target.channel(identity) as channel:
            left = count
            while left > 0:
                call = _Stream(channel, "Session")
                await call.write(frames[0])
                sent, alive = 0, await call.answered(_SETUP)
                for frame in frames[1 : chance.choice((1, chance.randint(1, len(frames))))]:
                    await call.write(frame)
                    alive = alive and await call.asked(_MARKER)
                while alive and left > 0:
                    frame, message = chance.choice(kinds)
                    await call.write(mutated_frame(chance, frame, message))
                    sent, left = sent + 1, left - 1
                    alive = await call.asked(_MARKER + sent)
                    if alive:
                        tally.add("taken")
                await call.done()
                how = await call.end()
                if sent:
                    tally.add(how, wrong=how not in _ENDS)
                else:
                    left -= 1
                    tally.add(f"{how} before", wrong=how not in _ENDS)

    return attack


def records_with(identity: Identity) -> Attack:
    """On the connection beside a call: records with changed bytes, twice, or with changed frames.

    Valid ones may come first, so that there is a session.
    """

    async def attack(target: Target, chance: random.Random, count: int, tally: Tally) -> None:
        loop = asyncio.get_running_loop()
        async with target.channel(identity) as channel:
            for _ in range(count):
                call = _Stream(channel, "Session")
                offer = str(dict(await call.call.initial_metadata()).get("tpirt-tcp", ""))
                if chance.random() < 0.3:
                    offer = _forged(chance, offer)
                try:
                    connection = await connect(target.address, offer, sealed=True)
                except (OSError, ValueError):
                    tally.add("not admitted")
                    call.call.cancel()
                    continue
                assert connection.seal is not None
                said = _records(connection.seal, target.corpus.frames, chance)
                with connection.socket:
                    with contextlib.suppress(OSError, TimeoutError):
                        async with asyncio.timeout(_REPLY_S):
                            await loop.sock_sendall(connection.socket, said)
                    with contextlib.suppress(OSError):
                        connection.socket.shutdown(socket.SHUT_WR)
                    how = await call.end()
                tally.add(how, wrong=how not in _ENDS)

    return attack


# -- what they share -----------------------------------------------------------------------------


class _Stream:
    """A call of frames, from the side that makes it."""

    def __init__(self, channel: grpc.aio.Channel, method: str):
        self.call = channel.stream_stream(SERVICE + method)(
            timeout=_CALL_S, metadata=_CIPHER, wait_for_ready=True
        )
        self.heard: list[Frame] = []
        self._reader = FrameReader("peer", limit=1 << 24)
        self._writing = True
        self._given_up = False

    async def write(self, data: bytes) -> None:
        """Send bytes; nothing if the call has ended."""
        if self._writing and data:
            try:
                await self.call.write(data)
            except (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.BaseError):
                self._writing = False

    async def done(self) -> None:
        """Send nothing more."""
        if self._writing:
            with contextlib.suppress(Exception):
                await self.call.done_writing()

    async def asked(self, number: int) -> bool:
        """Ask for the time; False if the call ends, or the time is not told."""
        await self.write(_bytes_of(Frame.of(Kind.REQUEST, encode(ClockRequest()), seq=number)))
        return await self.answered(number)

    async def answered(self, number: int) -> bool:
        """Wait for the reply to a request; False if there is none."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REPLY_S):
                return await self._answered(number)
        self._given_up = True
        return False

    async def _answered(self, number: int) -> bool:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError, grpc.aio.BaseError):
            while (data := await self.call.read()) is not grpc.aio.EOF:
                frames = list(self._reader.feed(data))
                self.heard = [*self.heard[-8:], *frames]
                if any((f.header.kind, f.header.seq) == (Kind.REPLY, number) for f in frames):
                    return True
        return False

    async def end(self) -> str:
        """Read to the call's end; returns how it ended."""
        if self._given_up:
            self.call.cancel()
            return _WAITS
        try:
            while await self.call.read() is not grpc.aio.EOF:
                pass
        except (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.BaseError):
            pass
        return _status(await self.call.code(), await self.call.details())


def _status(code: grpc.StatusCode, details: str | None) -> str:
    if code is grpc.StatusCode.INTERNAL and "from Core" in str(details):  # on this side
        return _EARLY
    return _HUNG if code is grpc.StatusCode.DEADLINE_EXCEEDED else str(code.name)


async def _called(
    channel: grpc.aio.Channel, method: str, messages: Sequence[bytes]
) -> tuple[str, str]:
    """Make a call; returns its status and details."""

    async def sent() -> AsyncIterator[bytes]:
        for message in messages:
            yield message

    path = SERVICE + method
    options: dict[str, Any] = {"timeout": _CALL_S, "wait_for_ready": True}
    try:
        if method == "PutUnits":
            await channel.stream_unary(path)(sent(), **options)
        elif method in ("Session", "Link"):
            async for _ in channel.stream_stream(path)(sent(), metadata=_CIPHER, **options):
                pass
        else:
            await channel.unary_unary(path)(messages[0], **options)
    except grpc.aio.AioRpcError as exc:
        return _status(exc.code(), exc.details()), str(exc.details())
    return "OK", ""


def _messages(corpus: Corpus, method: str, chance: random.Random) -> list[bytes]:
    """What a call sends: valid messages with changes; now and then as large as one may be."""
    if method == "PutUnits":
        chunks = [pb.UnitChunk.FromString(each) for each in corpus.chunks[:20]]
        if chance.random() < 0.02:
            return [pb.UnitChunk(order=chance.choice(huge_orders())).SerializeToString()]
        valid = chance.randint(0, len(chunks) - 1)
        return [*corpus.chunks[:valid], mutated_message(chance, chunks[valid])]
    if method in ("Session", "Link"):
        return [mutated_frame(chance, chance.choice(corpus.frames)) or b"\x00"]
    if method not in CALLS:
        return [noise(chance)]
    if chance.random() < 0.02:
        if method == "Inventory":
            order = chance.choice(huge_orders())
            return [pb.InventoryRequest(order=order).SerializeToString()]
        return [noise(chance) + bytes(HUGE_BYTES - 1024)]
    kind = {
        "Hello": pb.HelloRequest,
        "Inventory": pb.InventoryRequest,
        "Renew": pb.RenewRequest,
    }[method]
    valid = corpus.calls.get(method) or [b""]
    return [mutated_message(chance, kind.FromString(chance.choice(valid)))]


async def _within_tls(
    target: Target,
    context: ssl.SSLContext,
    chance: random.Random,
    count: int,
    tally: Tally,
    *,
    admitted: bool,
) -> None:
    """Say changed HTTP/2 in a TLS connection; one that is not ``admitted`` may hear nothing."""
    for _ in range(count):
        try:
            reader, writer = await _shaken(target.address, context)
        except (OSError, TimeoutError):
            tally.add("no handshake")
            continue
        answer = b""
        try:
            writer.write(mutated(chance, _http2()))
            answer = await asyncio.wait_for(reader.read(1 << 16), _CALL_S if not admitted else 1.0)
            if admitted:
                await asyncio.wait_for(reader.read(1 << 16), _ANSWER_S)
        except (OSError, TimeoutError):
            pass
        writer.close()
        how = "closed" if not answer else "HTTP/2"
        tally.add(how, wrong=bool(answer) and not admitted)


async def _shaken(
    address: Address, context: ssl.SSLContext
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect with TLS; again while nobody listens, as for a moment after a nameless call."""
    async with asyncio.timeout(_CALL_S):
        while True:
            try:
                return await asyncio.open_connection(*address, ssl=context, server_hostname="x")
            except ConnectionError:
                await asyncio.sleep(_AGAIN_S)


async def _heard(host: str, port: int, said: bytes) -> bytes:
    """Connect, speak, hang up one way; returns what comes."""
    answer = b""
    writer = None
    try:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(said)
        writer.write_eof()
        async with asyncio.timeout(_ANSWER_S):
            while data := await reader.read(1 << 16):
                answer += data
    except (OSError, TimeoutError):
        pass
    if writer is not None:
        writer.transport.abort()
    return answer


def _changed(chance: random.Random, corpus: Sequence[bytes]) -> bytes:
    data = chance.choice(corpus)
    return chance.choice((data, mutated(chance, data), mutated(chance, data), noise(chance)))


def _name(answer: bytes) -> str:
    if not answer:
        return "closed"
    return {0x15: "TLS alert", 0x16: "TLS handshake"}.get(answer[0], "an answer")


def _framed(chance: random.Random, message: bytes) -> bytes:
    size = len(message) if chance.random() < 0.9 else chance.getrandbits(16)
    return size.to_bytes(2, "little") + message


def _any_server() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


def _client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    talking = _any_server().wrap_bio(incoming, outgoing, server_hostname="x")
    with contextlib.suppress(ssl.SSLWantReadError):
        talking.do_handshake()
    return outgoing.read()


def _http2() -> bytes:
    """The preface, SETTINGS, the headers of a call of Hello, and its message."""

    def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
        return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body

    def header(name: bytes, value: bytes) -> bytes:
        return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value

    headers = [
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":path", SERVICE.encode() + b"Hello"),
        (b":authority", b"x"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    ]
    hello = encode_call(HelloRequest(PROTOCOL_VERSION, "x"))
    return (
        _PREFACE
        + frame(4, 0, 0, b"")
        + frame(1, 4, 1, b"".join(header(*each) for each in headers))
        + frame(0, 1, 1, b"\x00" + struct.pack(">I", len(hello)) + hello)
    )


def _forged(chance: random.Random, offer: str) -> str:
    """An offer with another secret or ticket."""
    parts = offer.split(":")
    at = chance.choice((1, 2))
    if len(parts) == 4:
        parts[at] = chance.randbytes(len(parts[at]) // 2).hex()
    return ":".join(parts)


def _records(seal: Any, frames: Sequence[bytes], chance: random.Random) -> bytes:
    """Some valid records, and one that is not."""
    first = frames[: chance.choice((0, 0, 1, chance.randint(1, len(frames))))]
    said = b"".join(_sealed(seal, frame) for frame in first)
    frame = chance.choice(frames)
    match chance.randrange(3):
        case 0:
            return said + mutated(chance, _sealed(seal, frame[:_RECORD_BYTES]))
        case 1:
            return said + 2 * _sealed(seal, frame[:_RECORD_BYTES])
        case _:
            kind = chance.choice((_message_of(frame), *bodies()))
            return said + _sealed(seal, mutated_frame(chance, frame, kind))


def _sealed(seal: Any, plain: bytes) -> bytes:
    cut = range(0, len(plain), _RECORD_BYTES)
    return b"".join(bytes(seal.seal(plain[at : at + _RECORD_BYTES])) for at in cut)


def _bytes_of(frame: Frame) -> bytes:
    return b"".join(map(bytes, frame.parts()))


def _message_of(frame: bytes) -> Any:
    """The protobuf message of a frame; None of one that has none."""
    with contextlib.suppress(TransportError):
        for each in FrameReader("corpus", limit=1 << 24).feed(frame):
            return pb.Message.FromString(each.message) if each.message else None
    return None
