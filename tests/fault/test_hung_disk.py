"""A disk that fails or hangs amid a step: it is named, no call hangs, the group lives on."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.nightly import nightly_but
from tpirt.batch import Algorithm
from tpirt.cluster.rank import RankRuntime
from tpirt.engine import Engine, embedding
from tpirt.errors import CheckpointError, StoreError
from tpirt.testing.cluster import memory_engine
from tpirt.testing.slices import counting_slice
from tpirt.types import ProgressCallback, SamplingParams
from tpirt.weights import streamer as module
from tpirt.weights.checkpoint import Checkpoint
from tpirt.weights.streamer import WeightStreamer

PROMPT = [(11 * i) % 250 for i in range(400)]
PARAMS = SamplingParams(max_tokens=4)


class Disk:
    """What reads go through: they fail, or wait, in one folder or in all."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.failing = False
        self.moves = threading.Event()
        self.moves.set()
        self.waiting = threading.Event()
        self._read = module.read_file

    def __call__(self, path: Path, target: memoryview, nbytes: int) -> None:
        if self.folder in (None, path.parent):
            if self.failing:
                raise StoreError(f"{path}: disk on fire")
            if not self.moves.is_set():
                self.waiting.set()
                self.moves.wait(30)
        self._read(path, target, nbytes)

    async def hung(self) -> None:
        """Wait until somebody waits for the disk."""
        assert await asyncio.to_thread(self.waiting.wait, 20)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(module, "read_file", disk)
    yield disk
    disk.moves.set()


def folder_of(store: Path, heads: list[int]) -> Path:
    """The slice with these query heads."""
    for manifest in store.glob("*/manifest.json"):
        if json.loads(manifest.read_text())["shard"]["q_heads"] == heads:
            return manifest.parent
    raise AssertionError


async def repeat(engine: Engine) -> None:
    while True:
        engine.reset()
        await engine.complete(PROMPT, PARAMS)


@pytest.mark.parametrize(
    ("algorithm", "halves"),
    nightly_but(
        {(Algorithm.STAR, False), (Algorithm.TWO_SHOT, True)},
        product(Algorithm, (False, True)),
        lambda case: f"{case[0].value}-{'halves' if case[1] else 'whole'}",
    ),
)
async def test_a_workers_disk_fails_amid_a_step_of_large_frames(
    model: Path,
    tmp_path: Path,
    disk: Disk,
    request: pytest.FixtureRequest,
    algorithm: Algorithm,
    halves: bool,
) -> None:
    """Frames of 50 KiB and more, over pipes that hold 8: the others are amid sending them."""
    if halves:
        request.getfixturevalue("micro_batched")
    async with (
        asyncio.timeout(60),
        memory_engine(
            model,
            4,
            store=tmp_path,
            window=2,
            chunk_tokens=512,
            capacity=8192,
            collective=algorithm.value,
        ) as engine,
    ):
        expected = (await engine.complete(PROMPT, PARAMS)).token_ids
        disk.folder = folder_of(tmp_path, [4, 6])  # rank 2's
        for _ in range(2):
            disk.failing = True
            with pytest.raises(StoreError, match=r"peer memory:2.*disk on fire"):
                await repeat(engine)  # some blocks have been read ahead
            disk.failing = False
            assert engine.broken is None
            engine.reset()
            assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected


@pytest.mark.parametrize("heads", [[0, 4], [4, 8]], ids=["master", "worker"])
async def test_a_request_is_cancelled_while_a_disk_hangs(
    model: Path, tmp_path: Path, disk: Disk, heads: list[int]
) -> None:
    async with memory_engine(model, 2, store=tmp_path, window=2) as engine:
        expected = (await engine.complete(PROMPT, PARAMS)).token_ids
        disk.folder = folder_of(tmp_path, heads)
        disk.moves.clear()
        for _ in range(2):
            engine.reset()
            request = asyncio.create_task(engine.complete(PROMPT, PARAMS))
            await disk.hung()
            await asyncio.sleep(0.2)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(request, 5)
            assert len(await asyncio.wait_for(engine.stats(), 5)) == 2
        disk.moves.set()
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected


async def test_the_models_disk_hangs_while_embeddings_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop, and so the heartbeats, go on; the request can be cancelled, or fails."""
    moves, waiting = threading.Event(), threading.Event()
    gather_rows = Checkpoint.gather_rows

    def hanging(self: Checkpoint, name: str, rows: Sequence[int]) -> torch.Tensor:
        waiting.set()
        assert moves.wait(30)
        return gather_rows(self, name, rows)

    monkeypatch.setattr(Checkpoint, "gather_cached_rows", lambda *_: None)
    monkeypatch.setattr(Checkpoint, "gather_rows", hanging)
    try:
        async with asyncio.timeout(20), memory_engine(model, 2, store=tmp_path) as engine:
            request = asyncio.create_task(engine.complete(PROMPT, PARAMS))
            assert await asyncio.to_thread(waiting.wait, 10)
            assert len(await engine.stats()) == 2
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            monkeypatch.setattr(embedding, "READ_TIMEOUT_S", 0.05)
            with pytest.raises(CheckpointError, match=r"embed_tokens.* no read has ended for 0.05"):
                await engine.complete(PROMPT, PARAMS)
            moves.set()
            monkeypatch.setattr(embedding, "READ_TIMEOUT_S", 20.0)
            await engine.complete(PROMPT, PARAMS)
    finally:
        moves.set()


async def test_no_read_for_too_long_is_an_error_that_names_the_file(
    tmp_path: Path, disk: Disk
) -> None:
    stored, blocks = counting_slice(tmp_path / "slice", [500] * 4)
    disk.moves.clear()
    streamer = WeightStreamer(stored, blocks, max_blocks=2, read_timeout_s=0.2)
    try:
        async with asyncio.timeout(20):
            for index in (0, 0, 1):
                with pytest.raises(StoreError, match="no read has ended") as caught:
                    await streamer.acquire(index)
                assert str(stored.block_path(index)) in str(caught.value)
            disk.moves.set()
            for index in (0, 1, 2, 3, 0):
                assert (await streamer.acquire(index))["t"].eq(index).all()
                streamer.release(index)
    finally:
        await streamer.aclose()


async def test_who_waits_for_a_block_is_told_when_the_streamer_closes(
    tmp_path: Path, disk: Disk
) -> None:
    stored, blocks = counting_slice(tmp_path / "slice", [500] * 4)
    disk.moves.clear()
    streamer = WeightStreamer(stored, blocks, max_blocks=2)
    waiting = asyncio.create_task(streamer.acquire(0))
    await disk.hung()
    closing = asyncio.create_task(streamer.aclose())
    with pytest.raises(StoreError, match="session has ended"):
        await asyncio.wait_for(waiting, 5)
    disk.moves.set()
    await closing


async def test_memory_is_freed_on_every_rank_while_disks_hang(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To divide memory again, a rank waits for its reads; freeing a sequence does not fail."""
    runtimes: list[RankRuntime] = []
    hung = False
    load, divide = RankRuntime.load, RankRuntime._divide

    async def kept(self: RankRuntime, progress: ProgressCallback) -> None:
        runtimes.append(self)
        await load(self, progress)

    async def failing(self: RankRuntime, *arguments: Any) -> None:
        if hung:
            raise StoreError("no read has ended")
        await divide(self, *arguments)

    monkeypatch.setattr(RankRuntime, "load", kept)
    monkeypatch.setattr(RankRuntime, "_divide", failing)
    async with asyncio.timeout(20), memory_engine(model, 3, store=tmp_path) as engine:
        expected = (await engine.complete(PROMPT, PARAMS)).token_ids
        hung = True
        engine.reset()
        while any(runtime.decoder.kv.nbytes for runtime in runtimes):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        hung = False
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected
        assert not engine.recoveries
