"""What the master makes of its peers' greetings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tpirt.cluster import connection, roster
from tpirt.cluster.roster import hello, other_versions, profiles, this_peer
from tpirt.cluster.worker import Worker
from tpirt.engine import Engine, EngineOptions
from tpirt.errors import DamagedLinkError, HandshakeError, PeerUnreachableError, TransportError
from tpirt.identity.certificates import Certificate
from tpirt.planning import PeerProfile
from tpirt.protocol.messages import PROTOCOL_VERSION, HelloReply, decode_call, encode_call
from tpirt.testing.cluster import MemoryPeerClient
from tpirt.testing.identities import MadeCluster
from tpirt.testing.models import make_model
from tpirt.transport.base import Channel
from tpirt.types import Progress
from tpirt.version import __version__
from tpirt.weights.store import SliceStore


class Client:
    """A client that passes on a worker's greeting, with changes."""

    def __init__(self, address: str, worker: Worker, **changes: Any):
        self.peer_id = self.address = address
        self.certificate: Certificate | None = None
        self._worker = worker
        self._changes = changes

    async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        reply = decode_call(HelloReply, await self._worker.answer(method, request), "worker")
        return encode_call(replace(reply, **self._changes))

    async def upload(self, method: str, chunks: AsyncIterator[bytes], timeout_s: float) -> bytes:
        raise AssertionError

    async def open_session(self) -> Channel:
        raise AssertionError

    async def open_link(self) -> Channel:
        raise AssertionError

    async def aclose(self) -> None:
        raise AssertionError


class Damaging(Client):
    """Its first answers are damaged."""

    def __init__(self, worker: Worker, damaged: int):
        super().__init__("w:1", worker)
        self.left = damaged

    async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        self.left -= 1
        return b"garbage" if self.left >= 0 else await super().call(method, request, timeout_s)


async def profile_peers(clients: list[Client]) -> list[PeerProfile]:
    workers = [(client, await hello(client, 7)) for client in clients]
    return profiles(workers, this_peer(1))


def worker(store: Path) -> Worker:
    return Worker("raspberrypi", SliceStore(store), None, 1, lambda _: None)


async def test_peers_have_the_names_that_the_user_gave_them(tmp_path: Path) -> None:
    """Cloned devices have one host name."""
    clients = [Client(address, worker(tmp_path)) for address in ("10.0.0.2:1", "10.0.0.3:1")]
    peers = await profile_peers(clients)
    assert [peer.peer_id for peer in peers] == ["master", "10.0.0.2:1", "10.0.0.3:1"]
    assert [peer.host_name for peer in peers[1:]] == ["raspberrypi"] * 2
    assert other_versions(peers) == []


async def test_a_peer_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    one = worker(tmp_path)
    clients = [Client("kitchen:1", one), Client("attic:1", worker(tmp_path)), Client("pi:1", one)]
    with pytest.raises(HandshakeError, match="peer pi:1: is the same process as kitchen:1"):
        await profile_peers(clients)


async def test_an_identity_on_two_devices_is_refused(tmp_path: Path) -> None:
    """On one device, several peers may share it."""
    shown = MadeCluster(tmp_path / "master").peer(tmp_path / "peer").identity
    assert shown is not None
    clients = [
        Client(name, worker(tmp_path), host_id=host)
        for name, host in (("a:1", "one"), ("a:2", "one"), ("b:1", "two"))
    ]
    for client in clients:
        client.certificate = shown.certificate
    assert len(await profile_peers(clients[:2])) == 3
    with pytest.raises(HandshakeError, match="peer b:1: has the key and certificate of a:1"):
        await profile_peers(clients)


async def test_peers_of_versions_that_know_no_process_number_are_taken(tmp_path: Path) -> None:
    clients = [Client(name, worker(tmp_path), process=0) for name in ("a:1", "b:1")]
    assert len(await profile_peers(clients)) == 3


async def test_another_version_is_named(tmp_path: Path) -> None:
    names = ("a:1", "b:1", "c:1")
    clients = [Client(name, worker(tmp_path), tpirt_version="9.9") for name in names[:2]]
    peers = await profile_peers([*clients, Client("c:1", worker(tmp_path))])
    (line,) = other_versions(peers)
    assert line.startswith(f"a:1, b:1: tpirt 9.9 there, {__version__} here")


async def test_a_peer_that_knows_no_kv_cache_in_8_bits_is_refused(tmp_path: Path) -> None:
    client = Client("a:1", worker(tmp_path), protocol_version=4, tpirt_version="9.9")
    with pytest.raises(HandshakeError, match=r"protocol 4.*update tpirt on the peer"):
        await profile_peers([client])


@pytest.mark.parametrize(("step", "older"), [(-1, "the peer"), (1, "this machine")])
async def test_another_protocol_is_refused_and_who_is_older_is_said(
    tmp_path: Path, step: int, older: str
) -> None:
    theirs = PROTOCOL_VERSION + step
    client = Client("a:1", worker(tmp_path), protocol_version=theirs, tpirt_version="9.9")
    with pytest.raises(HandshakeError) as caught:
        await profile_peers([client])
    assert str(caught.value) == (
        f"peer a:1: runs tpirt 9.9 (protocol {theirs}), this is tpirt {__version__} "
        f"(protocol {PROTOCOL_VERSION}); update tpirt on {older}"
    )


class Late(Client):
    """Answers once it is told to."""

    def __init__(self, address: str, worker: Worker):
        super().__init__(address, worker)
        self.asked, self.here = asyncio.Event(), asyncio.Event()

    async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        self.asked.set()
        try:
            async with asyncio.timeout(timeout_s):
                await self.here.wait()
        except TimeoutError:
            raise PeerUnreachableError(f"peer {self.peer_id}: silent") from None
        return await super().call(method, request, timeout_s)


async def test_spares_are_not_waited_for_and_replace_those_that_are_late(
    tmp_path: Path,
) -> None:
    needed = [Late(f"needed{i}:1", worker(tmp_path)) for i in range(2)]
    spare = Late("spare:1", worker(tmp_path))

    async def ask() -> list[bool]:
        answers = await roster.reach(needed, [spare], 2, 7, patience_s=20.0, soon_s=0.2)
        return [isinstance(answers[peer], HelloReply) for peer in (*needed, spare)]

    async with asyncio.timeout(10):
        for peer in needed:
            peer.here.set()
        assert await ask() == [True, True, False]
        needed[1].here.clear()
        spare.here.set()
        assert await ask() == [True, False, True]


async def test_a_needed_peer_has_its_time(tmp_path: Path) -> None:
    late, told = Late("late:1", worker(tmp_path)), list[Progress]()
    asking = asyncio.ensure_future(
        roster.reach([late], [], 1, 7, patience_s=20.0, soon_s=0.0, progress=told.append)
    )
    await late.asked.wait()
    assert not asking.done()
    waiting = ("waiting for peers", "late:1")
    assert [(report.stage, report.detail, report.total) for report in told] == [(*waiting, 0)]
    late.here.set()
    assert isinstance((await asking)[late], HelloReply)
    assert [(report.stage, report.detail, report.total) for report in told[1:]] == [(*waiting, 1)]
    late.here.clear()
    answers = await roster.reach([late], [], 1, 7, patience_s=0.1, soon_s=0.0)
    assert "silent" in str(answers[late])


async def test_a_place_that_nobody_will_take_is_given_away_at_once(tmp_path: Path) -> None:
    """Another spare that is silent is not waited for."""
    gone = Client("gone:1", worker(tmp_path), protocol_version=0)
    here, silent = Client("here:1", worker(tmp_path)), Late("silent:1", worker(tmp_path))
    async with asyncio.timeout(10):
        answers = await roster.reach([gone], [here, silent], 1, 7, patience_s=30.0, soon_s=30.0)
    assert isinstance(answers[here], HelloReply)


async def test_a_peer_that_is_slow_at_the_start_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spare would be sent gigabytes."""

    class Asked(MemoryPeerClient):
        async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
            asyncio.get_running_loop().call_later(0.05, answered.set)
            return await super().call(method, request, timeout_s)

    class Slow(MemoryPeerClient):
        async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
            await answered.wait()
            return await super().call(method, request, timeout_s)

    answered = asyncio.Event()
    monkeypatch.setattr(connection, "_SOON_S", 0.0)
    slow, spare = Slow(worker(tmp_path), 1), Asked(worker(tmp_path), 2)
    options = EngineOptions(dtype="float32", threads=1, store=tmp_path, draft="none")
    model = make_model(tmp_path / "model")
    async with Engine.connect(model, options, peers=[slow], spares=[spare]) as engine:
        assert engine.peers[1].peer_id == slow.peer_id


async def test_an_answer_that_was_damaged_in_the_clear_is_asked_for_again(tmp_path: Path) -> None:
    one = worker(tmp_path)
    await hello(Damaging(one, 1), 7)
    with pytest.raises(DamagedLinkError, match=r"w:1: malformed message: .* in the clear"):
        await hello(Damaging(one, 2), 7)
    shown = MadeCluster(tmp_path / "master").peer(tmp_path / "peer").identity
    assert shown is not None
    sealed = Damaging(one, 1)
    sealed.certificate = shown.certificate
    with pytest.raises(TransportError, match="w:1: malformed message") as caught:
        await hello(sealed, 7)
    assert not isinstance(caught.value, DamagedLinkError)
