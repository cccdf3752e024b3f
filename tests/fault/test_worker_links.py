"""Workers that cannot reach each other: the star sums, the user is told, no bit is wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tpirt.transport.codec import Frame
from tpirt.transport.pb import tpirt_pb2 as pb

from tpirt.batch import Batch
from tpirt.cluster import worker_links as mesh
from tpirt.cluster.worker_links import Switchboard
from tpirt.errors import PeerUnreachableError, TransportError
from tpirt.testing.cluster import MemoryPeerClient, memory_engine
from tpirt.transport.base import Channel
from tpirt.transport.memory import memory_pair
from tpirt.types import SamplingParams

PROMPT = list(range(40, 60))
PARAMS = SamplingParams(max_tokens=5)


async def answer(model: Path, store: Path, **options: str) -> tuple[list[int], str, list[str]]:
    async with memory_engine(model, 3, store=store, **options) as engine:  # type: ignore[arg-type]
        completion = await engine.complete(PROMPT, PARAMS)
        return completion.token_ids, engine.notice, engine.explain()


@pytest.mark.parametrize("collective", ["auto", "one-shot", "two-shot"])
async def test_unreachable_worker(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collective: str
) -> None:
    expected, notice, _ = await answer(model, tmp_path)
    assert notice == ""

    async def unreachable(self: MemoryPeerClient) -> Channel:
        raise PeerUnreachableError(f"peer {self.address}: connection refused")

    monkeypatch.setattr(MemoryPeerClient, "open_link", unreachable)
    tokens, notice, explained = await answer(model, tmp_path, collective=collective)
    assert tokens == expected
    assert "star" in notice
    assert "rank 2 has no link to rank 1: peer memory:1: connection refused" in notice
    assert any("one token" in line and ": star" in line for line in explained)


async def test_silent_worker(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that opens and says nothing, as behind some firewalls."""
    monkeypatch.setattr(mesh, "PATIENCE_S", 0.2)

    async def silent(self: MemoryPeerClient) -> Channel:
        mine, theirs = memory_pair(self.peer_id, "worker")
        self._channels += [mine, theirs]
        return mine

    monkeypatch.setattr(MemoryPeerClient, "open_link", silent)
    tokens, notice, _ = await answer(model, tmp_path)
    assert len(tokens) == PARAMS.max_tokens
    assert "star" in notice


async def test_star_asked_for_opens_no_links(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(_: MemoryPeerClient) -> Channel:
        raise AssertionError

    monkeypatch.setattr(MemoryPeerClient, "open_link", refused)
    _, notice, explained = await answer(model, tmp_path, collective="star")
    assert notice == ""
    assert any("used: star" in line for line in explained)


@pytest.mark.parametrize("halves", [False, True])
async def test_a_failure_in_one_worker_frees_the_others_in_direct_exchange(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    halves: bool,
) -> None:
    """The engine lives on: everybody heard that the step is over.

    It fails at a decoded token, or at a prompt that goes in halves, which are under way by then.
    """
    from tpirt.cluster.rank import RankRuntime
    from tpirt.errors import StoreError

    if halves:
        request.getfixturevalue("in_halves")
    failing = {"left": 1}
    check = RankRuntime.check_step

    def once(self: RankRuntime, batch: Batch) -> None:
        start = batch.segments[0].position
        if self.comm.rank == 2 and (halves or start > 20) and failing["left"]:
            failing["left"] -= 1
            raise StoreError("disk on fire")
        check(self, batch)

    monkeypatch.setattr(RankRuntime, "check_step", once)
    for algorithm in ("one-shot", "two-shot"):
        failing["left"] = 1
        async with (
            asyncio.timeout(20),
            memory_engine(model, 4, store=tmp_path, collective=algorithm) as engine,
        ):
            with pytest.raises(StoreError, match="rank2: disk on fire"):
                await engine.complete(PROMPT, PARAMS)
            again = await engine.complete(PROMPT, PARAMS)
            assert len(again.token_ids) == PARAMS.max_tokens


# -- the switchboard -------------------------------------------------------------------------


async def call(board: Switchboard, session: int, rank: int) -> tuple[Channel, asyncio.Task[None]]:
    mine, theirs = memory_pair("board", f"rank{rank}")
    serving = asyncio.create_task(board.serve(theirs))
    await mine.send(Frame(pb.FrameHeader(link=pb.Link(session=session, rank=rank))))
    return mine, serving


async def test_links_find_their_session_whoever_comes_first() -> None:
    board = Switchboard()
    claim = asyncio.create_task(board.claim(7, 2))
    await asyncio.sleep(0)
    _, serving = await call(board, 7, 2)
    caller = await claim
    caller.done.set()
    await serving
    _, serving = await call(board, 8, 3)
    await asyncio.sleep(0)
    caller = await board.claim(8, 3)
    caller.done.set()
    await serving


async def test_a_second_link_of_a_rank_and_other_words_are_refused() -> None:
    board = Switchboard()
    _, first = await call(board, 7, 2)
    await asyncio.sleep(0)
    _, second = await call(board, 7, 2)
    with pytest.raises(TransportError, match="second link of rank 2"):
        await second
    first.cancel()
    mine, theirs = memory_pair("board", "stranger")
    await mine.send(Frame(pb.FrameHeader(abort=pb.Abort(step=1))))
    with pytest.raises(TransportError, match="expected link, got abort"):
        await board.serve(theirs)


async def test_a_link_that_nobody_claims_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "PATIENCE_S", 0.05)
    board = Switchboard()
    _, serving = await call(board, 7, 2)
    await asyncio.wait_for(serving, 5)
    with pytest.raises(TimeoutError):
        await board.claim(7, 2)
    assert not board._callers
