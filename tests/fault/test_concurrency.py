"""Many callers at once over real worker processes, with frames beyond every socket's buffer."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from itertools import product
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest

from tests.support.nightly import nightly_but
from tests.support.plans import allow_one_plan
from tpirt.batch import Algorithm
from tpirt.engine import Engine, EngineOptions
from tpirt.errors import PeerLostError, RequestError
from tpirt.testing.models import make_model
from tpirt.testing.processes import PeerProcess
from tpirt.transport import grpc as transport
from tpirt.types import SamplingParams

HIDDEN, CHUNK = 2048, 1024  # a frame of a full chunk is 8 MiB
LONG = [(7 * i) % 250 for i in range(CHUNK)]
PROMPTS = {
    "long": LONG,
    "middle": LONG[:300],  # 2.4 MiB
    "other": LONG[100:400],
    "short": [5, 6, 7],
}
PARAMS = SamplingParams(max_tokens=3)
TIMEOUT_S = 3.0
NIGHTLY = int(os.environ.get("TPIRT_SCHEDULES", "1000"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two thin layers whose hidden states are wide."""
    return make_model(
        tmp_path_factory.mktemp("wide") / "model",
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=2 * CHUNK,
    )


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[PeerProcess]]:
    root = tmp_path_factory.mktemp("peers")
    with ExitStack() as stack:
        started = [stack.enter_context(PeerProcess(root / f"peer{i}")) for i in range(2)]
        yield started
        for peer in started:
            assert peer.alive
            assert "Traceback" not in peer.log


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@asynccontextmanager
async def connected(
    wide: Path, peers: list[PeerProcess], store: Path, collective: str = "auto"
) -> AsyncIterator[Engine]:
    """An engine over the peers; nothing of it is left afterwards."""
    tasks = asyncio.all_tasks()
    options = EngineOptions(
        dtype="float32",
        threads=1,
        store=store,
        chunk_tokens=CHUNK,
        timeout_s=TIMEOUT_S,
        collective=collective,
    )
    async with Engine.connect(wide, options, peers=[peer.address for peer in peers]) as engine:
        yield engine
    left = asyncio.all_tasks() - tasks
    if left:  # gRPC's own end a moment later
        await asyncio.wait(left, timeout=5)
    assert not {task for task in left if not task.done()}


@pytest.fixture(scope="module")
def alone(wide: Path, peers: list[PeerProcess], store: Path) -> dict[str, list[int]]:
    """What each prompt is answered on a fresh engine."""

    async def answers() -> dict[str, list[int]]:
        async with connected(wide, peers, store) as engine:
            found = {}
            for name, prompt in PROMPTS.items():
                found[name] = (await engine.complete(prompt, PARAMS)).token_ids
            return found

    return asyncio.run(answers())


async def caller(engine: Engine, choice: random.Random, alone: dict[str, list[int]]) -> None:
    """Do one thing that a user of the engine may do, and check what comes of it."""
    name = choice.choice(["short", "short", "middle", "other"])
    await asyncio.sleep(choice.choice([0, 0, 0.005, 0.02]))
    match choice.choice(["complete", "generate", "leave", "stats", "explain", "reset", "cancel"]):
        case "complete":
            assert (await engine.complete(PROMPTS[name], PARAMS)).token_ids == alone[name]
        case "generate":
            async with aclosing(engine.generate(PROMPTS[name], PARAMS)) as tokens:
                assert [token.id async for token in tokens] == alone[name]
        case "leave":
            async with aclosing(engine.generate(PROMPTS[name], PARAMS)) as tokens:
                assert (await anext(tokens)).id == alone[name][0]
        case "stats":
            assert len(await engine.stats()) == engine.world_size
        case "explain":
            assert any("one token" in line for line in engine.explain())
        case "reset":
            engine.reset()
        case "cancel":
            task = asyncio.ensure_future(engine.complete(PROMPTS[name], PARAMS))
            await asyncio.sleep(choice.random() * 0.05)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def schedule(engine: Engine, seed: int, alone: dict[str, list[int]]) -> None:
    choice = random.Random(seed)
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        for _ in range(choice.randrange(3, 8)):
            tasks.create_task(caller(engine, random.Random(choice.random()), alone))
    assert engine.broken is None


async def run_schedules(
    wide: Path,
    peers: list[PeerProcess],
    store: Path,
    alone: dict[str, list[int]],
    seeds: range,
) -> None:
    """Run random schedules, with each algorithm in turn; no descriptor or thread is left."""
    me = psutil.Process()
    before: tuple[int, int] | None = None
    algorithms = [algorithm.value for algorithm in Algorithm]
    for number, algorithm in enumerate([*algorithms, algorithms[0]]):
        async with connected(wide, peers, store, algorithm) as engine:
            for seed in seeds[number :: len(algorithms) + 1]:
                await schedule(engine, seed, alone)
            await engine.complete(PROMPTS["short"], PARAMS)
        await asyncio.sleep(0.1)
        now = me.num_fds(), me.num_threads()
        if before is not None:
            assert now[0] <= before[0] + 8
            assert now[1] <= before[1] + 4
        before = before or now


async def test_callers_at_once_get_what_each_gets_alone(
    wide: Path, peers: list[PeerProcess], store: Path, alone: dict[str, list[int]]
) -> None:
    await run_schedules(wide, peers, store, alone, range(20))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
async def test_callers_at_once_for_a_night(
    wide: Path, peers: list[PeerProcess], store: Path, alone: dict[str, list[int]]
) -> None:
    await run_schedules(wide, peers, store, alone, range(1000, 1000 + NIGHTLY))


@pytest.mark.parametrize(
    ("algorithm", "carrier"),
    nightly_but(
        {(Algorithm.ONE_SHOT, "tcp")},
        product(Algorithm, ("tcp", "grpc")),
        lambda case: f"{case[0].value}-{case[1]}",
    ),
)
async def test_after_a_cancelled_long_prompt_the_user_may_think(
    wide: Path,
    peers: list[PeerProcess],
    store: Path,
    alone: dict[str, list[int]],
    algorithm: Algorithm,
    carrier: str,
) -> None:
    """Frames of 8 MiB are on their way in all directions; nobody reads for the user."""

    async def refused(*_: object, sealed: bool) -> None:
        raise OSError("refused by a test")

    with ExitStack() as stack:
        if carrier == "grpc":  # of the master's links; workers have their own processes
            stack.enter_context(patch.object(transport, "connect", refused))
        async with connected(wide, peers, store, algorithm.value) as engine:
            cancelled = 0
            for wait_s in (0.01, 0.05, 0.15, 0.4):  # the last ones may come too late here
                task = asyncio.ensure_future(engine.complete(LONG, PARAMS))
                await asyncio.sleep(wait_s)
                task.cancel()
                await asyncio.wait({task})
                cancelled += task.cancelled()
            assert cancelled >= 1
            await asyncio.sleep(TIMEOUT_S + 1)
            assert engine.broken is None
            assert (await engine.complete(PROMPTS["other"], PARAMS)).token_ids == alone["other"]


async def test_a_consumer_that_stops_reading_stops_only_itself(
    wide: Path, peers: list[PeerProcess], store: Path, alone: dict[str, list[int]]
) -> None:
    async with connected(wide, peers, store) as engine:
        stopped = engine.generate(PROMPTS["middle"], SamplingParams(max_tokens=500))
        first = [(await anext(stopped)).id]
        others = (engine.complete(PROMPTS[name], PARAMS) for name in ("short", "other"))
        short, other = await asyncio.gather(*others)
        assert (short.token_ids, other.token_ids) == (alone["short"], alone["other"])
        first += [(await anext(stopped)).id for _ in range(2)]
        assert first == alone["middle"]
        assert engine._group.next_step < 100  # it paused
        await stopped.aclose()


@pytest.mark.parametrize("when", ["prefill", "between tokens", "waiting"])
async def test_an_engine_closed_amid_a_prompt_ends_every_request(
    wide: Path, peers: list[PeerProcess], store: Path, when: str
) -> None:
    async with connected(wide, peers, store) as engine:
        requests = []
        if when == "between tokens":
            stopped = engine.generate(PROMPTS["short"], SamplingParams(max_tokens=500))
            await anext(stopped)
        else:
            requests.append(asyncio.create_task(engine.complete(LONG, PARAMS)))
        if when == "waiting":
            requests.append(asyncio.create_task(engine.complete(PROMPTS["short"], PARAMS)))
            engine.reset()
        await asyncio.sleep(0.1)
    for request in requests:
        with pytest.raises(RequestError, match="closed"):
            await asyncio.wait_for(request, 10)
    if when == "between tokens":
        with pytest.raises(RequestError, match="closed"):
            async for _ in stopped:  # those that were computed
                pass


async def test_a_peer_that_was_left_a_moment_ago_is_free(
    wide: Path, peers: list[PeerProcess], store: Path, alone: dict[str, list[int]]
) -> None:
    for number in range(4):
        async with connected(wide, peers, store) as engine:
            if number == 1:  # left amid a prompt
                task = asyncio.create_task(engine.complete(LONG, PARAMS))
                await asyncio.sleep(0.1)
            if number == 3:
                answer = (await engine.complete(PROMPTS["short"], PARAMS)).token_ids
                assert answer == alone["short"]
        if number == 1:
            with pytest.raises(RequestError):
                await task


async def lose(engine: Engine, victim: PeerProcess) -> None:
    async for _ in engine.generate(LONG[:500], SamplingParams(max_tokens=400)):
        if victim.alive:
            victim.end()


async def test_a_broken_engine_releases_healthy_workers_and_names_the_lost_one(
    wide: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of three dies in one-shot, where the others' links show it too, maybe sooner."""
    allow_one_plan(monkeypatch)
    with ExitStack() as stack:
        others = [stack.enter_context(PeerProcess(tmp_path / f"other{i}")) for i in range(2)]
        stack.enter_context(patch.object(transport, "_PATIENCE_S", 0.2))  # with the victim
        for turn in range(3):
            with PeerProcess(tmp_path / "victim") as victim:
                ranks = [*others]
                ranks.insert(turn, victim)
                async with connected(wide, ranks, store, "one-shot") as engine:
                    with pytest.raises(PeerLostError, match=victim.peer_port) as caught:
                        await lose(engine, victim)
                    assert caught.value.rank == turn + 1
                    assert caught.value.peer_id.endswith(victim.peer_port)
                    began = time.monotonic()
                    # While the broken engine is still there: the healthy ones serve another.
                    async with connected(wide, others, store) as second:
                        await second.complete(PROMPTS["short"], PARAMS)
                    assert time.monotonic() - began < 30
