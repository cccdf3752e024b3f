"""A bit flips on the wire, and TCP does not notice: a sealed record does not verify."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest

from tests.support.nightly import nightly
from tpirt.cluster.worker import Worker
from tpirt.engine import Engine, EngineOptions
from tpirt.testing.cluster import memory_engine
from tpirt.testing.identities import MadeCluster
from tpirt.testing.models import make_model
from tpirt.transport.address import Endpoint
from tpirt.transport.grpc import GrpcPeerClient, GrpcPeerServer
from tpirt.transport.sealing import Seal
from tpirt.types import SamplingParams
from tpirt.weights.store import SliceStore

PROMPT = [i % 250 for i in range(40)]
PARAMS = SamplingParams(max_tokens=8)
WORKERS = 2


# Records go both ways, between workers too: of four in a row each link and direction has one.
@pytest.mark.parametrize("record", [60, *(nightly(number) for number in range(61, 69))])
async def test_the_answer_goes_on(
    record: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "tiny")
    async with memory_engine(model) as engine:
        expected = (await engine.complete(PROMPT, PARAMS)).token_ids
    monkeypatch.setattr(Endpoint, "is_loopback", False)
    cluster = MadeCluster(tmp_path / "master")
    servers, clients = [], []
    opened, flipped = 0, False
    open_into = Seal.open_into

    def flipping(self: Seal, sealed: memoryview, plain: memoryview) -> None:
        nonlocal opened, flipped
        opened += armed
        if opened == record and not flipped:
            flipped = True
            sealed[-1] ^= 4
        open_into(self, sealed, plain)

    armed = False
    monkeypatch.setattr(Seal, "open_into", flipping)
    for number in range(WORKERS):
        trust = cluster.peer(tmp_path / f"peer{number}", f"peer{number}")
        store = SliceStore(tmp_path / f"peer{number}" / "store")
        connect = partial(GrpcPeerClient, trust=trust)
        worker = Worker(f"peer{number}", store, None, 1, lambda _: None, connect, trust)
        server = GrpcPeerServer(worker, trust=trust)
        port = await server.start("127.0.0.1", 0)
        servers.append(server)
        clients.append(GrpcPeerClient(f"127.0.0.1:{port}", cluster.master))
    options = EngineOptions(dtype="float32", threads=1, store=tmp_path / "store", draft="none")
    try:
        async with asyncio.timeout(60), Engine.connect(model, options, peers=clients) as engine:
            armed = True
            assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected
            assert flipped
            assert len(engine.recoveries) == 1
    finally:
        for server in servers:
            await server.aclose()
