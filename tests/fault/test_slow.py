"""Slow links, slow machines and slow ends: nothing healthy is called dead, nothing is left held."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from tpirt.cluster import rank, worker_links
from tpirt.cluster.worker import Worker
from tpirt.engine import Engine, EngineOptions
from tpirt.testing.cluster import MemoryPeerClient, memory_engine
from tpirt.transport.base import Channel
from tpirt.transport.memory import memory_pair
from tpirt.types import SamplingParams
from tpirt.weights.store import SliceStore

PROMPT = [i % 250 for i in range(40)]
ONE = SamplingParams(max_tokens=1, temperature=0)


class CancelledSession(MemoryPeerClient):
    """Cancels the worker's call when the master leaves, ``turns`` turns of the loop later.

    So does gRPC's server, at whatever point the worker's own end has reached by then.
    """

    def __init__(self, worker: Worker, turns: int):
        super().__init__(worker)
        self._worker = worker
        self._turns = turns
        self._ends: list[tuple[Channel, asyncio.Task[None]]] = []

    async def open_session(self) -> Channel:
        mine, theirs = memory_pair("worker", "master")
        self._ends.append((mine, asyncio.create_task(self._worker.session(theirs))))
        return mine

    async def aclose(self) -> None:
        for channel, serving in self._ends:
            await channel.aclose()
            for _ in range(self._turns):
                await asyncio.sleep(0)
            serving.cancel()
            await asyncio.wait({serving})


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8])
async def test_a_session_cancelled_while_it_ends_leaves_the_worker_free(
    model: Path, tmp_path: Path, turns: int
) -> None:
    store = SliceStore(tmp_path)
    worker = Worker("rank1", store, None, 1, lambda _: None)
    options = EngineOptions(dtype="float32", threads=1, store=tmp_path)
    for _ in range(2):
        client = CancelledSession(worker, turns)
        async with Engine.connect(model, options, peers=[client]) as engine:
            await engine.complete(PROMPT, ONE)


async def test_a_worker_that_is_slow_to_prepare_has_links(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first start on a small device measures kernels for a while; other workers do not."""
    patience_s = 0.5
    monkeypatch.setattr(worker_links, "PATIENCE_S", patience_s)
    calls, choose = itertools.count(), rank.choose_kernels

    def slow_for_one(*arguments: Any) -> Any:
        if next(calls) == 1:
            time.sleep(3 * patience_s)
        return choose(*arguments)

    monkeypatch.setattr(rank, "choose_kernels", slow_for_one)
    async with memory_engine(model, 3, store=tmp_path, collective="one-shot") as engine:
        assert next(calls) == 3
        assert engine.notices == []
        await engine.complete(PROMPT, ONE)
