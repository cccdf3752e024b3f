"""Workers that cannot reach each other: the star sums, the user is told, no bit is wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from tpirt.batch import Batch
from tpirt.cluster import worker_links as mesh
from tpirt.cluster.rank import RankRuntime
from tpirt.cluster.worker_links import Switchboard
from tpirt.collectives.context import StepContext
from tpirt.errors import (
    DamagedLinkError,
    PeerLostError,
    PeerUnreachableError,
    StoreError,
    TpirtError,
    TransportError,
)
from tpirt.protocol.link import Link
from tpirt.protocol.messages import Abort, Joined, JoinLink
from tpirt.testing.cluster import MemoryPeerClient, memory_engine
from tpirt.testing.ranks import Inbox
from tpirt.transport.base import Channel
from tpirt.transport.memory import memory_pair
from tpirt.types import LOST, Progress, SamplingParams

PROMPT = list(range(40, 60))
PARAMS = SamplingParams(max_tokens=5)


async def answer(model: Path, store: Path, **options: str) -> tuple[list[int], str, list[str]]:
    async with memory_engine(model, 3, store=store, **options) as engine:  # type: ignore[arg-type]
        completion = await engine.complete(PROMPT, PARAMS)
        return completion.token_ids, " ".join(engine.notices), engine.explain()


@pytest.mark.parametrize("collective", ["auto", "one-shot", "two-shot"])
async def test_unreachable_worker(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collective: str
) -> None:
    expected, notice, _ = await answer(model, tmp_path)
    assert notice == ""
    monkeypatch.setattr(mesh, "PATIENCE_S", 0.2)

    async def unreachable(self: MemoryPeerClient) -> Channel:
        raise PeerUnreachableError(f"peer {self.address}: connection refused")

    monkeypatch.setattr(MemoryPeerClient, "open_link", unreachable)
    tokens, notice, explained = await answer(model, tmp_path, collective=collective)
    assert tokens == expected
    assert "star" in notice
    # Not why: a master could have its workers try the ports of other machines.
    assert "rank 2 has no link to rank 1: no link within" in notice
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
    if halves:
        request.getfixturevalue("micro_batched")
    failing = {"left": 1}
    validate = RankRuntime.validate

    def once(self: RankRuntime, batch: Batch) -> None:
        start = batch.segments[0].position
        if self.comm.rank == 2 and (halves or start > 20) and failing["left"]:
            failing["left"] -= 1
            raise StoreError("disk on fire")
        validate(self, batch)

    monkeypatch.setattr(RankRuntime, "validate", once)
    for algorithm in ("one-shot", "two-shot"):
        failing["left"] = 1
        async with (
            asyncio.timeout(20),
            memory_engine(model, 4, store=tmp_path, collective=algorithm) as engine,
        ):
            with pytest.raises(StoreError, match="memory:2: disk on fire"):
                await engine.complete(PROMPT, PARAMS)
            again = await engine.complete(PROMPT, PARAMS)
            assert len(again.token_ids) == PARAMS.max_tokens


async def report(
    model: Path, store: Path, monkeypatch: pytest.MonkeyPatch, failure: TpirtError
) -> str:
    """What is said of a loss if another worker's link fails so for rank 1, once."""
    run = RankRuntime.run
    failures = [failure]

    async def failing(
        self: RankRuntime, hidden: torch.Tensor, step: StepContext
    ) -> torch.Tensor | None:
        if self.comm.rank == 1 and failures:
            raise failures.pop()
        return await run(self, hidden, step)

    monkeypatch.setattr(RankRuntime, "run", failing)
    said: list[str] = []

    def progress(progress: Progress) -> None:
        if progress.stage == LOST:
            said.append(progress.detail)

    async with asyncio.timeout(20), memory_engine(model, 3, store=store) as engine:
        await engine.complete(PROMPT, PARAMS, progress)
    return said[0]


async def test_a_damaged_link_of_two_workers_is_said_once_and_names_the_peer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = DamagedLinkError("peer memory:2: garbage; in the clear", rank=2)
    said = await report(model, tmp_path, monkeypatch, damaged)
    assert said == "peer memory:2: lost by memory:1: peer memory:2: garbage; in the clear"


async def test_a_sealed_link_of_two_workers_is_not_doubted_for_the_masters(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The master's link is in the clear; what came over theirs was sent by the other worker."""
    wrong = TransportError("peer memory:2: expected nothing, got a partial; refused")
    with pytest.raises(TransportError, match=r"memory:1: peer memory:2: .* refused$") as caught:
        await report(model, tmp_path, monkeypatch, wrong)
    assert not isinstance(caught.value, DamagedLinkError)


# -- the switchboard -------------------------------------------------------------------------


async def call(board: Switchboard, name: str = "caller") -> tuple[Link, asyncio.Task[None]]:
    mine, theirs = memory_pair("board", name)
    serving = asyncio.create_task(board.serve(theirs))
    link = Link(mine, 0, 5.0, Inbox())
    link.start()
    return link, serving


async def join(link: Link, session: int, rank: int) -> asyncio.Task[object]:
    """Ask to join; the answer comes once the link is claimed."""
    return asyncio.create_task(link.request(JoinLink(session, rank)))


async def test_links_find_their_session_whichever_comes_first() -> None:
    board = Switchboard()
    for session, claims_first in ((7, True), (8, False)):
        claim = asyncio.create_task(board.claim(session, 2))
        if claims_first:
            await asyncio.sleep(0)
        link, serving = await call(board)
        joining = await join(link, session, 2)
        caller = await claim
        caller.link.reply(await caller.joined(), Joined())
        assert isinstance((await joining).body, Joined)  # type: ignore[attr-defined]
        caller.left.set()
        await serving
        await link.aclose()


async def test_a_second_link_of_a_rank_and_other_words_are_refused() -> None:
    board = Switchboard()
    first, waiting = await call(board)
    joining = await join(first, 7, 2)
    second, refused = await call(board)
    while not board.waits_for(7, 2):  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0)
    with pytest.raises(PeerLostError):
        await second.request(JoinLink(7, 2))
    await refused
    caller = await board.claim(7, 2)  # the first one is still there
    caller.link.reply(await caller.joined(), Joined())
    await joining
    stranger, serving = await call(board)
    with pytest.raises(TpirtError):
        await stranger.request(Abort(1))
    caller.left.set()
    await asyncio.wait_for(asyncio.gather(waiting, serving), 10)
    for link in (first, second, stranger):
        await link.aclose()


async def test_a_link_that_nobody_claims_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "PATIENCE_S", 0.05)
    board = Switchboard()
    link, serving = await call(board)
    with pytest.raises(PeerLostError):
        await link.request(JoinLink(7, 2))
    await asyncio.wait_for(serving, 5)
    assert not board.waits_for(7, 2)
    await link.aclose()
