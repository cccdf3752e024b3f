"""A peer is lost for good: a spare takes its place, or the others go on by another plan."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.fault.test_replan import CountingClient, unit_sizes
from tests.support.nightly import nightly
from tpirt.engine import Engine, EngineOptions
from tpirt.errors import ConfigError, PeerLostError, PeerUnreachableError
from tpirt.testing.cluster import memory_engine
from tpirt.testing.models import make_model
from tpirt.testing.processes import PeerProcess, run_cli, start_cli, wait_for
from tpirt.transport import grpc as transport
from tpirt.types import LOST, RECONNECTED, RESUMED, Progress, SamplingParams

Peers = Callable[[int], list[PeerProcess]]

PROMPT = [i % 250 for i in range(80)]
PARAMS = SamplingParams(max_tokens=24)
TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for several units of a layer."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 96}
    folder = tmp_path_factory.mktemp("model") / "wide"
    return make_model(folder, "llama", intermediate_size=1536, **sizes)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    """The answer without a loss."""

    async def answer() -> list[int]:
        async with memory_engine(model, 1) as engine:
            return (await engine.complete(PROMPT, PARAMS)).token_ids

    return asyncio.run(answer())


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """These peers do not come back."""
    monkeypatch.setattr(transport, "_PATIENCE_S", 0.3)


class Notes:
    """Remembers what a user is told, and calls back in the middle of the prompt."""

    def __init__(self, in_prompt: Callable[[], None] | None = None):
        self.lines: list[tuple[str, str]] = []
        self._in_prompt = in_prompt

    def __call__(self, progress: Progress) -> None:
        if progress.stage in (LOST, RECONNECTED, RESUMED):
            self.lines.append((progress.stage, progress.detail))
        if progress.stage == "prefill" and self._in_prompt is not None:
            then, self._in_prompt = self._in_prompt, None
            then()


@asynccontextmanager
async def connected(
    model: Path, store: Path, peers: Sequence[PeerProcess], **options: Any
) -> AsyncIterator[Engine]:
    spares = [peer.address for peer in options.pop("spares", ())]
    timeout_s = options.pop("timeout_s", 20.0)
    chosen = EngineOptions(
        threads=1, dtype="float32", store=store, chunk_tokens=16, draft="none", timeout_s=timeout_s
    )
    addresses = [peer.address for peer in peers]
    async with (
        asyncio.timeout(60),
        Engine.connect(model, chosen, peers=addresses, spares=spares, **options) as engine,
    ):
        yield engine


async def answer(
    engine: Engine, notes: Notes, at: dict[int, Callable[[], None]] | None = None
) -> list[int]:
    """Hold a request; ``at`` is what happens after so many tokens."""
    tokens = []
    async with aclosing(engine.generate(PROMPT, PARAMS, notes)) as answer:
        async for token in answer:
            tokens.append(token.id)
            if at and len(tokens) in at:
                at[len(tokens)]()
    return tokens


@pytest.mark.parametrize("phase", [nightly("idle"), nightly("prompt"), "answer"])
async def test_a_spare_takes_the_place_of_a_killed_peer(
    model: Path, peers: Peers, tmp_path: Path, expected: list[int], phase: str
) -> None:
    *two, spare = peers(3)
    told = asyncio.Event()

    def progress(progress: Progress) -> None:
        if progress.stage == RECONNECTED:
            told.set()

    def kill() -> None:
        two[1].signal(signal.SIGKILL)

    async with connected(
        model, tmp_path / "store", two, spares=[spare], progress=progress
    ) as engine:
        notes = Notes(kill if phase == "prompt" else None)
        if phase == "idle":
            await engine.complete(PROMPT, PARAMS)
            kill()
            await told.wait()  # before the next message
            assert engine.broken is None
        tokens = await answer(engine, notes, {5: kill} if phase == "answer" else None)
        assert tokens == expected
        (recovery,) = engine.recoveries
        assert recovery.peer_id == two[1].address
        assert recovery.change == f"{spare.address} in place of {two[1].address}"
        assert recovery.sent_bytes > 0
        if phase != "idle":
            assert [stage for stage, _ in notes.lines] == [LOST, RECONNECTED, RESUMED]
            assert two[1].address in notes.lines[0][1]
            assert spare.address in notes.lines[1][1]
            assert recovery.replaying_ms > 0
        assert engine.peers[2].peer_id == spare.address
        assert len(await engine.stats()) == 3


async def test_two_losses_in_a_row_and_the_others_go_on(
    model: Path, peers: Peers, tmp_path: Path, expected: list[int]
) -> None:
    three = peers(3)
    at = dict(
        zip((4, 9, 14), (partial(peer.signal, signal.SIGKILL) for peer in three), strict=True)
    )
    async with connected(model, tmp_path / "store", three) as engine:
        notes = Notes()
        tokens = await answer(engine, notes, at)
        assert tokens == expected
        worlds = [recovery.peers for recovery in engine.recoveries]
        assert worlds == [2, 1, 0]
        assert engine.world_size == 1
        assert "by another plan, without" in notes.lines[1][1]


async def test_losses_while_several_requests_run(
    model: Path, peers: Peers, tmp_path: Path, expected: list[int]
) -> None:
    two = peers(2)
    async with connected(model, tmp_path / "store", two) as engine:
        kill = {6: lambda: two[0].signal(signal.SIGKILL)}
        async with asyncio.TaskGroup() as tasks:
            killing = tasks.create_task(answer(engine, Notes(), kill))
            others = [tasks.create_task(answer(engine, Notes())) for _ in range(3)]
        assert killing.result() == expected
        assert all(other.result() == expected for other in others)
        assert len(engine.recoveries) == 1


async def test_a_frozen_peer_is_replaced_and_ends_its_session_when_it_goes_on(
    model: Path, peers: Peers, tmp_path: Path, expected: list[int]
) -> None:
    *one, spare = peers(2)
    (frozen,) = one
    async with connected(
        model, tmp_path / "store", one, spares=[spare], timeout_s=TIMEOUT_S
    ) as engine:
        at = {5: lambda: frozen.signal(signal.SIGSTOP)}
        assert await answer(engine, Notes(), at) == expected
        (recovery,) = engine.recoveries
        assert recovery.noticing_ms > TIMEOUT_S * 700
        frozen.signal(signal.SIGCONT)
        wait_for(lambda: frozen.log.rstrip().endswith("waiting for a master"), "free again")
        # It takes no place back, but one that is free.
        spare.signal(signal.SIGKILL)
        assert await answer(engine, Notes()) == expected
        assert engine.peers[1].peer_id == frozen.address


@pytest.mark.nightly  # tests/fault/test_replan.py counts the same bytes without a loss
async def test_bytes_sent_for_another_plan_are_those_of_the_units_lacked(
    model: Path, tmp_path: Path, expected: list[int]
) -> None:
    stores = [tmp_path / f"store{rank}" for rank in range(3)]
    clients = [CountingClient(store, rank) for rank, store in enumerate(stores) if rank]
    options = EngineOptions(dtype="float32", threads=1, store=stores[0], draft="none")
    async with Engine.connect(model, options, peers=clients) as engine:
        held = unit_sizes(model, 3, 1, "none")
        before = clients[0].sent
        await lose(engine, clients[1])
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected
        lacking = {k: n for k, n in unit_sizes(model, 2, 1, "none").items() if k not in held}
        (recovery,) = engine.recoveries
        assert recovery.sent_bytes == sum(lacking.values()) == clients[0].sent - before > 0


async def lose(engine: Engine, client: CountingClient) -> None:
    async def gone(*_: object) -> bytes:
        raise PeerUnreachableError(f"peer {client.peer_id}: nothing listens there")

    client.call = gone  # type: ignore[method-assign]
    await client.aclose()
    with pytest.raises(PeerLostError):
        await engine.stats()


async def test_a_spare_that_cannot_take_the_place_is_left_out(
    model: Path, peers: Peers, tmp_path: Path, expected: list[int]
) -> None:
    """Its disk is full."""
    *two, full = peers(3)
    with PeerProcess(tmp_path / "small", "--store-limit", "1K") as small:
        async with connected(model, tmp_path / "store", two, spares=[small, full]) as engine:
            at = {5: lambda: two[0].signal(signal.SIGKILL)}
            assert await answer(engine, Notes(), at) == expected
            assert engine.peers[1].peer_id == full.address


@pytest.mark.parametrize("whose", [nightly("master"), "peer"])
async def test_a_damaged_slice_is_replaced(
    model: Path, peers: Peers, tmp_path: Path, expected: list[int], whose: str
) -> None:
    """Its bytes have changed on disk, which shows when it is read for the next group."""
    store = tmp_path / "store"
    *two, spare = peers(3)
    async with connected(model, store, two, spares=[spare]) as engine:
        files = [*(store if whose == "master" else two[1].store).glob("*/*.mlp.safetensors")]
        for file in files:
            damage(file)
        at = {5: partial(two[0].signal, signal.SIGTERM)}
        assert await answer(engine, Notes(), at) == expected
        assert engine.world_size == 3
        assert files


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.unlink()  # it may be linked, and mapped
    file.write_bytes(content)


async def test_a_spare_is_used_at_the_start(model: Path, peers: Peers, tmp_path: Path) -> None:
    dead, spare = peers(2)
    assert dead.address
    dead.end()
    async with connected(model, tmp_path / "store", [dead], spares=[spare]) as engine:
        assert engine.peers[1].peer_id == spare.address
    with pytest.raises(PeerUnreachableError, match=dead.peer_port):
        async with connected(model, tmp_path / "store", [dead]):
            pytest.fail("connected")
    with pytest.raises(ConfigError, match="is one of the peers"):
        async with connected(model, tmp_path / "store", [spare], spares=[spare]):
            pytest.fail("connected")


async def test_an_orderly_leave_is_said(
    model: Path, peers: Peers, tmp_path: Path, expected: list[int]
) -> None:
    two = peers(2)
    async with connected(model, tmp_path / "store", two) as engine:
        notes = Notes()
        at = {5: lambda: two[1].signal(signal.SIGTERM)}
        assert await answer(engine, notes, at) == expected
        assert notes.lines[0] == (LOST, f"peer {two[1].address}: left: it was told to end")


def test_the_command_line_reports_a_loss(model: Path, peers: Peers, tmp_path: Path) -> None:
    *one, spare = peers(2)
    options = ("generate", "--model", str(model), "--store", str(tmp_path / "store"), "--json")
    options += ("--dtype", "float32", "--threads", "1", "--prompt", "a" * 100)
    options += ("--max-tokens", "150", "--temperature", "0")
    plain = json.loads(run_cli(*options).stdout)
    with start_cli(*options, "--peers", one[0].address, "--spares", spare.address) as master:
        wait_for(lambda: "serving" in one[0].log, "serving")
        one[0].signal(signal.SIGTERM)  # while it loads, or soon after
        out, errors = master.communicate(timeout=30)
    assert master.returncode == 0, errors
    answer = json.loads(out)
    assert answer["token_ids"] == plain["token_ids"]
    assert answer["ranks"][1]["peer_id"] == spare.address
    for recovery in answer["recoveries"]:
        assert recovery["change"] == f"{spare.address} in place of {one[0].address}"


@pytest.mark.nightly
def test_many_prompts_hear_of_a_loss_once(model: Path, peers: Peers, tmp_path: Path) -> None:
    (peer,) = peers(1)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join("a" * (90 + number) for number in range(6)), encoding="utf-8")
    options = ("generate", "--model", str(model), "--store", str(tmp_path / "store"))
    options += ("--dtype", "float32", "--threads", "1", "--prompts", str(prompts))
    options += ("--sequences", "2")
    options += ("--max-tokens", "200", "--temperature", "0")
    plain = [json.loads(line)["token_ids"] for line in run_cli(*options).stdout.splitlines()]
    with start_cli(*options, "--peers", peer.address) as master:
        assert master.stdout is not None
        first = master.stdout.readline()
        peer.signal(signal.SIGKILL)
        rest, errors = master.communicate(timeout=60)
    out = first + rest
    assert master.returncode == 0, errors
    assert [json.loads(line)["token_ids"] for line in out.splitlines()] == plain
    assert (errors.count("; reconnecting"), errors.count("no peer is left")) == (1, 1), errors
