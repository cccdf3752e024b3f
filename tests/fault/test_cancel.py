"""A cancelled request stops work on every rank, and the next one is as on a fresh engine."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.support.nightly import nightly_but
from tpirt.batch import Algorithm
from tpirt.cluster.worker import Worker
from tpirt.engine import Engine, EngineOptions
from tpirt.testing.cluster import MemoryPeerClient, memory_engine
from tpirt.testing.faults import Fault, FaultyChannel
from tpirt.testing.processes import PeerProcess
from tpirt.transport.base import Channel
from tpirt.transport.frame import Frame, Kind
from tpirt.types import Progress, SamplingParams
from tpirt.weights.store import SliceStore

PROMPT = [i % 250 for i in range(200)]
OTHER = [7, 8, 9, 10]
PARAMS = SamplingParams(max_tokens=8)
ENDLESS = SamplingParams(max_tokens=300)


class Counting(FaultyChannel):
    """Passes a worker's frames on and counts them: its compute shows as partials sent."""

    def __init__(self, inner: Channel):
        super().__init__(inner, Fault.DELAY, kind="none")
        self.partials = 0

    async def send(self, frame: Frame) -> None:
        self.partials += frame.header.kind == Kind.PARTIAL
        await super().send(frame)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def expected(model: Path, store: Path) -> list[list[int]]:
    """What a fresh engine answers to each prompt."""

    async def answers() -> list[list[int]]:
        found = []
        for prompt in (PROMPT, OTHER):
            async with memory_engine(model, 3, store=store, chunk_tokens=16) as engine:
                found.append((await engine.complete(prompt, PARAMS)).token_ids)
        return found

    return asyncio.run(answers())


async def check_answers(engine: Engine, expected: list[list[int]]) -> None:
    for prompt, answer in zip((OTHER, PROMPT), reversed(expected), strict=True):
        assert (await engine.complete(prompt, PARAMS)).token_ids == answer
    assert engine.broken is None


async def settled(workers: list[Counting]) -> int:
    """Let everything run that wants to; returns the number of partials sent by then."""
    before = -1
    while (now := sum(worker.partials for worker in workers)) != before:
        before = now
        await asyncio.sleep(0.05)
    return now


@asynccontextmanager
async def counted(model: Path, store: Path) -> AsyncIterator[tuple[Engine, list[Counting]]]:
    workers: list[Counting] = []

    def count(_: int, channel: Channel) -> Channel:
        workers.append(Counting(channel))
        return workers[-1]

    async with memory_engine(
        model, 3, store=store, chunk_tokens=16, timeout_s=5, worker_side=count
    ) as engine:
        yield engine, workers


@pytest.mark.parametrize(
    ("phase", "how"), [("prefill", "task"), ("decode", "task"), ("decode", "generator")]
)
async def test_cancelled_request_stops_all_ranks(
    model: Path, store: Path, expected: list[list[int]], phase: str, how: str
) -> None:
    reached = asyncio.Event()

    def on_progress(progress: Progress) -> None:
        if phase == "prefill" and progress.done >= 48:
            reached.set()

    async with counted(model, store) as (engine, workers):
        request = engine.generate(PROMPT, ENDLESS, on_progress)

        async def consume() -> None:
            async for _ in request:
                if phase == "decode":
                    reached.set()

        async def leave_early() -> None:
            await anext(request)
            await anext(request)
            await request.aclose()

        if how == "task":
            task = asyncio.ensure_future(consume())
            await reached.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await leave_early()
        done = sum(worker.partials for worker in workers)
        # The block at hand of each worker may still end; the whole request has 13 steps and more.
        assert await settled(workers) <= done + 2 * len(workers)
        per_step = 2 * model_layers(engine) * len(workers)
        steps_in_all = len(PROMPT) // 16 + ENDLESS.max_tokens
        assert done < per_step * steps_in_all / 2
        await check_answers(engine, expected)


def model_layers(engine: Engine) -> int:
    return engine.config.num_hidden_layers


async def storm(engine: Engine, seed: int, count: int) -> None:
    """Cancel many requests after a random number of turns of the loop, some of them twice."""
    choice = random.Random(seed)
    for _ in range(count):
        prompt = choice.choice((PROMPT, OTHER, PROMPT[: choice.randrange(1, 200)]))
        task = asyncio.ensure_future(engine.complete(prompt, ENDLESS))
        for _ in range(choice.choice((0, 1, 2, 3, 5, 8, 20, 50, 120))):
            await asyncio.sleep(0)
        if choice.random() < 0.3:
            await asyncio.sleep(choice.random() * 0.02)
        task.cancel()
        if choice.random() < 0.5:
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)


@pytest.mark.parametrize("seed", range(3))
async def test_cancel_storm_never_desynchronises(
    model: Path, store: Path, expected: list[list[int]], seed: int
) -> None:
    async with counted(model, store) as (engine, _):
        await storm(engine, seed, 40)
        await check_answers(engine, expected)


@pytest.mark.parametrize("algorithm", Algorithm, ids=lambda algorithm: algorithm.value)
async def test_cancel_storm_of_frames_larger_than_the_way_holds(
    model: Path, store: Path, expected: list[list[int]], algorithm: Algorithm
) -> None:
    """A chunk of 200 tokens is 51 KiB: large frames, over pipes that hold 4 KiB."""
    async with memory_engine(
        model,
        4,
        store=store,
        chunk_tokens=256,
        timeout_s=5,
        capacity=4096,
        collective=algorithm.value,
    ) as engine:
        await storm(engine, 11, 30)
        await check_answers(engine, expected)


@pytest.mark.usefixtures("micro_batched")
@pytest.mark.parametrize(
    "algorithm",
    nightly_but({Algorithm.ONE_SHOT}, Algorithm, lambda algorithm: algorithm.value),
)
async def test_cancel_storm_of_prompts_in_micro_batches(
    model: Path, store: Path, expected: list[list[int]], algorithm: Algorithm
) -> None:
    async with memory_engine(
        model, 4, store=store, chunk_tokens=16, timeout_s=5, collective=algorithm.value
    ) as engine:
        await storm(engine, 7, 40)
        await check_answers(engine, expected)


@pytest.mark.nightly
async def test_cancel_storm_over_grpc(
    model: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    """Cancelling one of gRPC's reads or writes would end the session: none may be."""
    with PeerProcess(tmp_path / "peer0") as first, PeerProcess(tmp_path / "peer1") as second:
        async with Engine.connect(
            model,
            EngineOptions(dtype="float32", threads=1, chunk_tokens=16, store=tmp_path / "store"),
            peers=[first.address, second.address],
        ) as engine:
            for seed in range(3):
                await storm(engine, seed, 15)
                await check_answers(engine, expected)
        assert "Traceback" not in first.log + second.log


async def test_cancelled_while_a_worker_is_slow_then_answered_right(
    model: Path, store: Path, expected: list[list[int]]
) -> None:
    """What the slow worker still sends of the old step is not taken for the new one's."""
    late: list[FaultyChannel] = []

    def slow(rank: int, channel: Channel) -> Channel:
        if rank == 2:
            late.append(FaultyChannel(channel, Fault.DELAY, after=7, kind="partial", delay_s=0.3))
            return late[0]
        return channel

    async with memory_engine(
        model, 3, store=store, chunk_tokens=16, timeout_s=5, worker_side=slow
    ) as engine:
        task = asyncio.ensure_future(engine.complete(PROMPT, ENDLESS))
        await late[0].fired.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await check_answers(engine, expected)


class AbruptClient(MemoryPeerClient):
    """Cancels its sessions on leaving, as gRPC does with the handlers of calls that end."""

    turns = 0

    async def aclose(self) -> None:
        for channel in self._channels:
            await channel.aclose()
        for _ in range(self.turns):
            await asyncio.sleep(0)
        for session in self._sessions:
            session.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)
        self._sessions.clear()


async def test_a_worker_whose_handler_is_cancelled_at_any_moment_serves_again(
    model: Path, store: Path, expected: list[list[int]]
) -> None:
    worker = Worker("rank1", SliceStore(store), None, 1, lambda _: None)
    options = EngineOptions(dtype="float32", threads=1, store=store, chunk_tokens=16)
    for turns in (0, 1, 2, 3, 4, 6, 10, 20, 40):
        client = AbruptClient(worker)
        client.turns = turns
        async with asyncio.timeout(20), Engine.connect(model, options, peers=[client]) as engine:
            assert (await engine.complete(OTHER, PARAMS)).token_ids == expected[1]
    assert "tpirt-window" not in {thread.name for thread in threading.enumerate()}


async def test_many_resets_at_once_are_one(
    model: Path, store: Path, expected: list[list[int]]
) -> None:
    async with memory_engine(model, 2, store=store, chunk_tokens=16) as engine:
        await engine.complete(PROMPT, PARAMS)
        for _ in range(300):  # more messages than a worker's queue takes
            engine.reset()
            await asyncio.sleep(0)
        assert (await engine.complete(OTHER, PARAMS)).token_ids == expected[1]
        assert engine.broken is None


async def test_two_requests_at_once_wait_for_each_other(
    model: Path, store: Path, expected: list[list[int]]
) -> None:
    async with counted(model, store) as (engine, _):
        first, second = await asyncio.gather(
            engine.complete(PROMPT, PARAMS), engine.complete(OTHER, PARAMS)
        )
        assert [first.token_ids, second.token_ids] == expected
