"""A link brings what was damaged, or slipped in: it counts as lost, and the answer goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.nightly import nightly
from tpirt.cluster.worker import Worker
from tpirt.engine import Engine, EngineOptions
from tpirt.protocol.link import Link
from tpirt.testing.cluster import memory_engine
from tpirt.testing.identities import MadeCluster
from tpirt.testing.models import make_model
from tpirt.transport.address import Endpoint
from tpirt.transport.frame import Frame, Kind
from tpirt.transport.grpc import GrpcPeerClient, GrpcPeerServer
from tpirt.transport.sealing import Seal
from tpirt.transport.tickets import TcpListener
from tpirt.types import SamplingParams
from tpirt.weights.store import SliceStore

PROMPT = [i % 250 for i in range(40)]
PARAMS = SamplingParams(max_tokens=8)
WORKERS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    async def answer() -> list[int]:
        async with memory_engine(model) as engine:
            return (await engine.complete(PROMPT, PARAMS)).token_ids

    return asyncio.run(answer())


@asynccontextmanager
async def connected(
    model: Path, folder: Path, cluster: MadeCluster | None = None
) -> AsyncIterator[tuple[Engine, list[str]]]:
    """An engine with workers, and what these log."""
    servers, clients = [], []
    log: list[str] = []
    for number in range(WORKERS):
        home = folder / f"peer{number}"
        trust = None if cluster is None else cluster.peer(home, home.name)
        connect = partial(GrpcPeerClient, trust=trust)
        worker = Worker(home.name, SliceStore(home / "store"), None, 1, log.append, connect, trust)
        server = GrpcPeerServer(worker, trust=trust)
        port = await server.start("127.0.0.1", 0)
        servers.append(server)
        clients.append(GrpcPeerClient(f"127.0.0.1:{port}", cluster and cluster.master))
    options = EngineOptions(dtype="float32", threads=1, store=folder / "store", draft="none")
    try:
        async with asyncio.timeout(60), Engine.connect(model, options, peers=clients) as engine:
            yield engine, log
    finally:
        for server in servers:
            await server.aclose()


# Records go both ways, between workers too: of four in a row each link and direction has one.
@pytest.mark.parametrize("record", [60, *(nightly(number) for number in range(61, 69))])
async def test_a_bit_flips_and_tcp_does_not_notice(
    record: int, model: Path, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Endpoint, "is_loopback", False)
    opened, armed, flipped = 0, False, False
    open_into = Seal.open_into

    def flipping(self: Seal, sealed: memoryview, plain: memoryview) -> None:
        nonlocal opened, flipped
        opened += armed
        if opened == record and not flipped:
            flipped = True
            sealed[-1] ^= 4
        open_into(self, sealed, plain)

    monkeypatch.setattr(Seal, "open_into", flipping)
    async with connected(model, tmp_path, MadeCluster(tmp_path / "master")) as (engine, _):
        armed = True
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected
        assert flipped
        assert len(engine.recoveries) == 1


FRAMES = {
    "garbage": Frame(b"\xff" * 64),
    "unknown": Frame.of(99),
    "no message": Frame.of(Kind.MESSAGE, b"no message"),
    "another step": Frame.of(Kind.PARTIAL, step=9999),
}
SENDERS = ("Group", "WorkerSession", "_Peer", "_Caller")  # the handlers of a link's two ends


def cases() -> Iterator[Any]:
    """CI has garbage in each direction over TCP, and another frame over gRPC."""
    for carrier in ("tcp", "grpc"):
        for sender in SENDERS:
            for what in FRAMES:
                over_tcp = carrier == "tcp" and what == "garbage" and sender != "_Caller"
                quick = over_tcp or (carrier, sender, what) == ("grpc", "Group", "unknown")
                yield (carrier, sender, what) if quick else nightly(carrier, sender, what)


@pytest.mark.parametrize(("carrier", "sender", "what"), list(cases()))
async def test_what_comes_in_the_clear_may_be_somebody_elses(
    carrier: str,
    sender: str,
    what: str,
    model: Path,
    expected: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if carrier == "grpc":
        monkeypatch.setattr(TcpListener, "beside", lambda *_: None)
    links: dict[str, Link] = {}
    start = Link.start

    def kept(self: Link) -> None:
        links[type(self._handler).__name__] = self
        start(self)

    monkeypatch.setattr(Link, "start", kept)
    async with connected(model, tmp_path) as (engine, log):
        link = links[sender]
        assert link.channel.carrier.kind == carrier
        await link.channel.send(FRAMES[what])
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected
        assert len(engine.recoveries) == 1
    said = [line for line in (*log, *caplog.messages) if "in the clear" in line]
    if sender != "WorkerSession":  # a worker has read it; a master tells its user
        assert len(said) == 1
        assert ("peer master 127.0.0.1:" if sender == "Group" else "peer 127.0.0.1:") in said[0]
