"""A peer is lost and can be reached again: the conversation goes on as if nothing had happened."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.plans import allow_one_plan
from tpirt.cluster.worker import Worker
from tpirt.engine import Engine, EngineOptions, connect, driver
from tpirt.engine.sequence import Answer
from tpirt.errors import PeerLostError, PeerUnreachableError, RequestError, TpirtError
from tpirt.identity.trust import Trust
from tpirt.testing.cluster import MemoryPeerClient, memory_engine
from tpirt.testing.drafters import KnownAnswers
from tpirt.testing.faults import Fault, FaultyChannel
from tpirt.testing.processes import PeerProcess, killed_at_exit, start_cli, wait_for
from tpirt.transport.base import Channel, PeerClient
from tpirt.transport.memory import MemoryChannel
from tpirt.types import (
    LOST,
    RECONNECTED,
    Progress,
    ProgressCallback,
    RankStats,
    SamplingParams,
    ignore_progress,
)
from tpirt.weights.store import SliceStore

Peers = Callable[[int], list[PeerProcess]]

PROMPT = [i % 250 for i in range(40)]
PARAMS = SamplingParams(max_tokens=10, temperature=0.8, seed=7)
SOON_S = 8.0  # far less than the timeout
TIMEOUT_S = 30.0


class Forgetful(FaultyChannel):
    """A connection that a firewall can forget: nothing passes from then on, its end included."""

    def __init__(self, inner: Channel):
        super().__init__(inner, Fault.SILENCE, kind="none")
        self.closed = False

    def forget(self) -> None:
        self.fired.set()

    async def aclose(self) -> None:
        self.closed = True
        if not self.fired.is_set():
            await super().aclose()


class Peer(MemoryPeerClient):
    """A peer that can be lost, unreachable, killed and restarted.

    Attributes:
        opened: the connections of its sessions.
        reachable: set while it answers.
        asked: set when it was called.
        waits: whether calls wait until it is reachable, instead of failing.
    """

    def __init__(self, rank: int, store: Path, others: list[Peer]):
        super().__init__(self._worker(rank, store), rank, master_side=self._keep)
        self.opened: list[tuple[Forgetful, MemoryChannel]] = []
        self.reachable = asyncio.Event()
        self.reachable.set()
        self.asked = asyncio.Event()
        self.waits = False
        self._others = others
        self._forgotten: list[asyncio.Task[None]] = []

    def _worker(self, rank: int, store: Path) -> Worker:
        return Worker(f"rank{rank}", SliceStore(store), None, 1, lambda _: None, self._connect)

    def _connect(self, address: str) -> MemoryPeerClient:
        (other,) = (peer for peer in self._others if peer.address == address)
        return MemoryPeerClient(other._service, other._rank)

    def _keep(self, _: int, channel: Channel) -> Channel:
        assert isinstance(channel, MemoryChannel)
        self.opened.append((Forgetful(channel), channel))
        return self.opened[-1][0]

    def lose(self) -> None:
        """End the connection; both sides notice."""
        _, channel = self.opened[-1]
        channel._in.close()
        channel._out.close()

    def restart(self, store: Path) -> None:
        """Kill it, and start another process in its place."""
        self.lose()
        self._service = self._worker(self._rank, store)

    async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        self.asked.set()
        if self.waits:
            await self.reachable.wait()
        if not self.reachable.is_set():
            raise PeerUnreachableError(f"peer {self.peer_id}: nothing listens there")
        return await super().call(method, request, timeout_s)

    async def aclose(self) -> None:
        sessions, self._sessions = self._sessions + self._forgotten, []
        if self.opened and self.opened[-1][0].fired.is_set():  # the peer goes on with its session
            self._forgotten = sessions
        else:
            self._sessions, self._forgotten = sessions, []
        await super().aclose()


class Reports:
    """Counts and remembers progress, and calls back once."""

    def __init__(self) -> None:
        self.reconnected: list[str] = []
        self.on_prefill: Callable[[], None] | None = None
        self.on_reconnected: Callable[[], None] | None = None

    def __call__(self, progress: Progress) -> None:
        if progress.stage == RECONNECTED:
            self.reconnected.append(f"{progress.total} {progress.unit}, {progress.detail}")
            if self.on_reconnected is not None:
                self.on_reconnected()
        if progress.stage == "prefill" and self.on_prefill is not None:
            then, self.on_prefill = self.on_prefill, None
            then()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def expected(model: Path, store: Path) -> list[list[int]]:
    """Two turns of a conversation without interruption."""

    async def answers() -> list[list[int]]:
        async with memory_engine(model, 3, store=store, chunk_tokens=16) as engine:
            first = (await engine.complete(PROMPT, PARAMS)).token_ids
            second = (await engine.complete([*PROMPT, *first, 3, 4], PARAMS)).token_ids
            return [first, second]

    return asyncio.run(answers())


@asynccontextmanager
async def connected(
    model: Path,
    store: Path,
    timeout_s: float = TIMEOUT_S,
    progress: ProgressCallback = ignore_progress,
    **more: Any,
) -> AsyncIterator[tuple[Engine, list[Peer]]]:
    peers: list[Peer] = []
    peers += [Peer(rank, store, peers) for rank in (1, 2)]
    options = EngineOptions(
        threads=1, dtype="float32", store=store, chunk_tokens=16, timeout_s=timeout_s, **more
    )
    async with (
        asyncio.timeout(25),
        Engine.connect(model, options, peers=peers, progress=progress) as engine,
    ):
        yield engine, peers


async def check(engine: Engine, expected: list[list[int]], reports: Reports | None = None) -> None:
    """Hold the second turn of the conversation."""
    reports = reports or Reports()
    answer = await engine.complete([*PROMPT, *expected[0], 3, 4], PARAMS, reports)
    assert answer.token_ids == expected[1]
    assert engine.broken is None


@pytest.mark.parametrize("phase", ["idle", "prompt", "answer"])
async def test_a_lost_peer_is_connected_again(
    model: Path, store: Path, expected: list[list[int]], phase: str
) -> None:
    async with connected(model, store) as (engine, peers):
        reports = Reports()
        tokens = []
        if phase == "prompt":
            reports.on_prefill = peers[1].lose
        async with aclosing(engine.generate(PROMPT, PARAMS, reports)) as answer:
            async for token in answer:
                tokens.append(token.id)
                if len(tokens) == 4 and phase == "answer":
                    peers[0].lose()
        assert tokens == expected[0]
        if phase == "idle":
            peers[0].lose()
        await check(engine, expected, reports)
        computed = {"idle": 49, "prompt": 16, "answer": 43}[phase]
        assert reports.reconnected == [f"2 peers, computing {computed} tokens again"]
        assert len(await engine.stats()) == 3
        assert [len(peer.opened) for peer in peers] == [2, 2]
        assert any("one token" in line for line in engine.explain())


async def test_without_requests_it_is_tried_again_until_it_succeeds(
    model: Path, store: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_RETRY_S", 0.05)
    told: list[str] = []
    done = asyncio.Event()

    def progress(progress: Progress) -> None:
        if progress.stage in (LOST, RECONNECTED):
            told.append(progress.stage)
        if progress.stage == RECONNECTED:
            done.set()

    async with connected(model, store, progress=progress) as (engine, peers):
        await engine.complete(PROMPT, PARAMS)
        peers[1].reachable.clear()
        for _ in range(3):
            peers[1].asked.clear()
            if not told:
                peers[1].lose()
            await peers[1].asked.wait()
        assert engine.world_size == 3  # no other plan meanwhile
        peers[1].reachable.set()
        await done.wait()
        assert engine.broken is None
        assert told == [LOST, RECONNECTED]
        reports = Reports()
        await check(engine, expected, reports)
        assert reports.reconnected == []  # it was ready


class Flaps:
    """Remembers when a group was formed again, and breaks it so many times."""

    def __init__(self, losses: int):
        self.left = losses
        self.formed_s: list[float] = []
        self.done = asyncio.Event()
        self.lose: Callable[[], None] = lambda: None

    def __call__(self, progress: Progress) -> None:
        if progress.stage == RECONNECTED:
            self.formed_s.append(time.monotonic())
            self.left -= 1
            if self.left < 0:
                self.done.set()
            else:
                self.lose()


async def test_a_peer_that_breaks_again_and_again_is_tried_ever_later(
    model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_RETRY_S", 0.1)
    flaps = Flaps(4)
    async with connected(model, store, progress=flaps) as (_, peers):
        flaps.lose = peers[0].lose
        peers[0].lose()
        await flaps.done.wait()
    pauses = [later - sooner for sooner, later in pairwise(flaps.formed_s)]
    assert all(pause >= 0.1 * 2**number for number, pause in enumerate(pauses))


@pytest.mark.parametrize("use", ["it answers", "it lives for a while"])
async def test_a_group_that_is_of_use_is_formed_again_at_once(
    model: Path, store: Path, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    flaps = Flaps(0)
    async with connected(model, store, progress=flaps) as (engine, peers):
        monkeypatch.setattr(driver, "_RETRY_S", 0.0)
        if use == "it lives for a while":
            monkeypatch.setattr(driver, "_LATEST_RETRY_S", 0.0)
        for _ in range(3):
            engine._driver._mending._wait_s = 1000.0
            peers[0].lose()
            await flaps.done.wait()
            flaps.done.clear()
            if use == "it answers":
                await engine.complete(PROMPT, PARAMS)


async def test_an_answer_is_forgotten_by_the_drafter_however_it_ends(
    model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Drafter(KnownAnswers):
        forgotten = 0

        def forget(self, answer: Answer) -> None:
            self.forgotten += 1

    drafter = Drafter({}, 1.0)
    async with connected(model, store, draft=drafter) as (engine, peers):
        await engine.complete(PROMPT, PARAMS)
        assert drafter.forgotten == 1
        async with aclosing(engine.generate(PROMPT, PARAMS)) as answer:
            await anext(answer)
        assert drafter.forgotten == 2
        allow_one_plan(monkeypatch)
        peers[1].reachable.clear()
        async with aclosing(engine.generate(PROMPT, PARAMS)) as answer:
            await anext(answer)
            peers[1].lose()
            with pytest.raises(PeerLostError):
                _ = [token async for token in answer]
        assert drafter.forgotten == 3
        peers[1].reachable.set()


async def test_several_losses_in_one_answer(
    model: Path, store: Path, expected: list[list[int]]
) -> None:
    async with connected(model, store) as (engine, peers):
        tokens = []
        async with aclosing(engine.generate(PROMPT, PARAMS)) as answer:
            async for token in answer:
                tokens.append(token.id)
                if len(tokens) in (2, 4):
                    peers[0].lose()
        assert tokens == expected[0]
        assert len(peers[0].opened) == 3


async def test_an_answer_is_not_lost_with_its_statistics(
    model: Path, store: Path, expected: list[list[int]]
) -> None:
    async with connected(model, store) as (engine, peers):
        stats = engine._group.stats

        async def lost_meanwhile(since_step: int = 0) -> list[RankStats]:
            peers[0].lose()
            return await stats(since_step)

        engine._group.stats = lost_meanwhile  # type: ignore[method-assign]
        answer = await engine.complete(PROMPT, PARAMS)
        assert answer.token_ids == expected[0]
        assert (answer.world_size, answer.ranks, answer.decoded) == (3, [], [])
        await check(engine, expected)


@pytest.mark.parametrize("phase", ["begun", "all hidden states computed"])
@pytest.mark.parametrize("plan", ["the same", "another"])
async def test_losses_while_all_logits_are_computed(
    model: Path, store: Path, expected: list[list[int]], phase: str, plan: str
) -> None:
    async with connected(model, store) as (engine, peers):
        before = await engine.logits(PROMPT)
        parts, begin = [], 0 if phase == "begun" else len(PROMPT) - 16
        async with aclosing(engine._logits(PROMPT, 4)) as found:
            async for start, part in found:
                assert start == sum(map(len, parts))
                parts.append(part)
                if start == begin:
                    if plan == "another":
                        peers[1].reachable.clear()
                    peers[1].lose()
                    await until_closed(engine)
        assert len(engine.recoveries) == 1
        assert engine.world_size == (3 if plan == "the same" else 2)
        torch.testing.assert_close(torch.cat(parts), before, rtol=1e-4, atol=1e-4)
        peers[1].reachable.set()
        await check(engine, expected)


async def until_closed(engine: Engine) -> None:
    """Wait until the group that lost a peer computes no logits any more."""
    while not engine._group._closed:  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0.001)


async def test_certificates_are_kept_up_in_every_group(
    model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of spares too; and what fails meanwhile leaves no group behind."""
    groups: list[list[str]] = []

    async def keep_up(_: Trust, clients: Sequence[PeerClient]) -> None:
        groups.append([client.peer_id for client in clients])
        if len(groups) == 1:
            raise KeyError("a bug")

    monkeypatch.setattr(connect, "keep_up", keep_up)
    peer, spare = (Peer(rank, store, []) for rank in (1, 2))
    peer.reachable.clear()
    options = EngineOptions(threads=1, dtype="float32", store=store)
    async with asyncio.timeout(25):
        with pytest.raises(KeyError):
            async with Engine.connect(model, options, peers=[peer], spares=[spare]):
                pass
        assert spare.opened[0][0].closed
        async with Engine.connect(model, options, peers=[peer], spares=[spare]) as engine:
            spare.lose()
            await engine.complete(PROMPT, PARAMS)
    assert groups == 3 * [[spare.peer_id]]


@pytest.mark.parametrize("kept", [True, False], ids=["with its slice", "without its slice"])
async def test_a_restarted_peer(
    model: Path, store: Path, tmp_path: Path, expected: list[list[int]], kept: bool
) -> None:
    async with connected(model, store) as (engine, peers):
        await engine.complete(PROMPT, PARAMS)
        peers[1].restart(store if kept else tmp_path / "new")
        await check(engine, expected)
    assert kept or len(SliceStore(tmp_path / "new").slices()) == 1


async def test_a_session_that_the_peer_still_holds_is_no_other_master(
    model: Path, store: Path, expected: list[list[int]]
) -> None:
    """A firewall forgot the connection, and only this side has noticed."""
    async with connected(model, store) as (engine, peers):
        await engine.complete(PROMPT, PARAMS)
        for peer in peers:
            peer.opened[-1][0].forget()
        engine._group._links[1].give_up(PeerLostError("said nothing", rank=1, peer_id="memory:1"))
        async with asyncio.timeout(SOON_S):
            await check(engine, expected)
        assert [str(exc) for peer in peers for exc in peer.session_errors] == []


async def test_a_peer_that_serves_another_master_meanwhile_is_waited_for(
    model: Path, store: Path, expected: list[list[int]]
) -> None:
    async with connected(model, store, timeout_s=5) as (engine, peers):
        peers[0].lose()
        peers[0].reachable.clear()  # not before the other master
        options = EngineOptions(threads=1, dtype="float32", store=store)
        others = [MemoryPeerClient(peers[0]._service)]
        async with Engine.connect(model, options, peers=others) as other:
            peers[0].reachable.set()
            waiting = asyncio.create_task(check(engine, expected))
            await other.complete(PROMPT, PARAMS)
            assert not waiting.done()
        await waiting


async def test_a_peer_that_does_not_come_back_fails_each_request_until_it_does(
    model: Path, store: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_one_plan(monkeypatch)
    async with connected(model, store) as (engine, peers):
        first = (await engine.complete(PROMPT, PARAMS)).token_ids
        assert first == expected[0]
        peers[1].lose()
        peers[1].reachable.clear()
        for _ in range(2):
            with pytest.raises(
                PeerLostError,
                match=r"memory:2: left; reconnecting failed: .*memory:2: .*without it: too little",
            ):
                await check(engine, expected)
            assert isinstance(engine.broken, PeerLostError)
            assert (engine.broken.rank, engine.broken.exit_code) == (2, 3)
            with pytest.raises(PeerLostError):
                await engine.stats()
        peers[1].reachable.set()
        reports = Reports()
        await check(engine, expected, reports)
        assert reports.reconnected == ["2 peers, "]  # what was kept is lost


async def test_losses_that_do_not_end_are_an_error(
    model: Path, store: Path, expected: list[list[int]]
) -> None:
    async with connected(model, store) as (engine, peers):
        await engine.complete(PROMPT, PARAMS)
        peers[0].lose()
        reports = Reports()
        reports.on_reconnected = peers[1].lose
        with pytest.raises(PeerLostError, match=r"memory:2: left$"):
            await check(engine, expected, reports)
        assert len(reports.reconnected) == 4
        await check(engine, expected)


@pytest.mark.parametrize("how", ["cancelled", "closed"])
async def test_the_end_of_a_reconnect(
    model: Path, store: Path, expected: list[list[int]], how: str
) -> None:
    before = asyncio.all_tasks()
    async with connected(model, store) as (engine, peers):
        await engine.complete(PROMPT, PARAMS)
        peers[1].lose()
        peers[1].waits = True
        peers[1].reachable.clear()
        peers[1].asked.clear()
        request = asyncio.create_task(check(engine, expected))
        await peers[1].asked.wait()
        if how == "cancelled":
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            peers[1].reachable.set()
            await check(engine, expected)
    if how == "closed":
        for _ in range(2):
            with pytest.raises(RequestError, match="the engine is closed"):
                await request
            request = asyncio.ensure_future(check(engine, expected))
        request.cancel()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() - before - {request} == set()


async def test_requests_that_wait_meanwhile_follow(
    model: Path, store: Path, expected: list[list[int]]
) -> None:
    async with connected(model, store) as (engine, peers):
        await engine.complete(PROMPT, PARAMS)
        peers[0].lose()
        reports = Reports()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(check(engine, expected, reports))
        assert len(reports.reconnected) == 3  # each is told once


async def test_other_errors_are_not_tried_again(
    model: Path, store: Path, expected: list[list[int]]
) -> None:
    async with connected(model, store) as (engine, peers):
        step = engine._group.step
        calls = 0

        async def fail(*_: object) -> None:
            nonlocal calls
            calls += 1
            raise TpirtError("out of memory")

        engine._group.step = fail  # type: ignore[method-assign,assignment]
        with pytest.raises(TpirtError, match="out of memory"):
            await check(engine, expected)
        engine._group.step = step  # type: ignore[method-assign]
        assert calls == 1
        await check(engine, expected)
        assert [len(peer.opened) for peer in peers] == [1, 1]


# -- processes -------------------------------------------------------------------------------


async def test_a_peer_killed_and_started_again_between_messages(
    model: Path, tmp_path: Path, store: Path, expected: list[list[int]]
) -> None:
    options = EngineOptions(threads=1, dtype="float32", store=store, chunk_tokens=16)
    with PeerProcess(tmp_path / "peer") as killed:
        async with Engine.connect(model, options, peers=[killed.address]) as engine:
            await engine.complete(PROMPT, PARAMS)
            killed.end()
            with PeerProcess(killed.store, "--listen", killed.address) as again:
                assert again.address == killed.address
                reports = Reports()
                await check(engine, expected, reports)
                assert len(reports.reconnected) == 1
                assert "received slice" not in again.log


def test_a_master_that_was_stopped_longer_than_the_timeout(
    model: Path, peers: Peers, tmp_path: Path
) -> None:
    (peer,) = peers(1)
    arguments = ["chat", "--model", str(model), "--max-tokens", "5", "--temperature", "0"]
    arguments += ["--threads", "1", "--store", str(tmp_path / "store"), "--timeout", "1"]
    arguments += ["--peers", peer.address, "--each-line"]

    def chat(stop: bool) -> tuple[str, str]:
        with killed_at_exit(start_cli(*arguments, stdin=-1)) as master:
            assert master.stdin is not None
            assert master.stdout is not None
            master.stdin.write("hi\n")
            master.stdin.flush()
            answer = os.read(master.stdout.fileno(), 1).decode()  # keeps no more back
            if stop:
                waits = peer.log.count("waiting for a master")
                master.send_signal(signal.SIGSTOP)
                wait_for(lambda: peer.log.count("waiting for a master") > waits, "master given up")
                master.send_signal(signal.SIGCONT)
            out, errors = master.communicate("hi again\n", timeout=30)
            assert master.returncode == 0, errors
            return answer + out, errors

    answers, _ = chat(stop=False)
    wait_for(lambda: peer.log.rstrip().endswith("waiting for a master"), "free again")
    again, errors = chat(stop=True)
    assert again == answers
    assert errors.count("reconnected to 1 peer; computing ") == 1
