"""What goes wrong with one request, or while its logits are computed, ends nobody else's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.steps import have_memory_for
from tpirt.cluster.connection import Connection
from tpirt.engine import Engine
from tpirt.engine.scheduler import Scheduler
from tpirt.errors import MemoryLimitError, PeerLostError, StoreError
from tpirt.model.decoder import Decoder
from tpirt.testing.cluster import memory_engine
from tpirt.types import RECONNECTED, RESUMED, Completion, Progress, SamplingParams

PROMPTS = [[first, 6, 7, 8] for first in range(5, 11)]
LONG = [(7 * i) % 200 + 3 for i in range(40)]
PARAMS = SamplingParams(max_tokens=12)
MANY = SamplingParams(max_tokens=100)
ONE = SamplingParams(max_tokens=1)


def before_call(
    patch: pytest.MonkeyPatch, number: int, method: str, act: Callable[[], Awaitable[None]]
) -> None:
    """Have ``act`` called before a method of ``Decoder`` is called for the ``number``-th time."""
    original, calls = getattr(Decoder, method), 0

    async def counted(self: Decoder, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            await act()
        return await original(self, *args)

    patch.setattr(Decoder, method, counted)


def damage_the_head(store: Path) -> None:
    for file in store.rglob("head*"):
        content = bytearray(file.read_bytes())
        content[-100] ^= 4
        file.write_bytes(content)


async def test_a_disk_error_in_the_head_ends_those_whose_logits_were_wanted(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        raise StoreError("block head: Input/output error")

    before_call(monkeypatch, 5, "logits", fail)
    async with memory_engine(model, sequences=2) as engine:
        asked = (engine.complete(prompt, PARAMS) for prompt in PROMPTS)
        done = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(each) for each in done] == [StoreError] * 2 + [Completion] * 4


async def test_a_damaged_block_of_the_head_is_replaced(model: Path, tmp_path: Path) -> None:
    """As one of a layer is: the group is formed again, and the slice made again."""
    store = tmp_path / "store"
    async with memory_engine(model, window=2, store=store) as engine:
        expected = (await engine.complete(PROMPTS[0], PARAMS)).token_ids
    damage_the_head(store)
    async with memory_engine(model, window=2, store=store) as engine:
        for recoveries in (1, 0):
            done = await engine.complete(PROMPTS[0], PARAMS)
            assert (done.token_ids, len(done.recoveries)) == (expected, recoveries)


async def test_memory_refused_for_logits_is_taken_from_kept_conversations(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse() -> None:
        raise MemoryLimitError("refused")

    async with memory_engine(model, spill_bytes=0) as engine:
        alone = [(await engine.complete(prompt, PARAMS)).token_ids for prompt in PROMPTS]
        before_call(monkeypatch, 5, "logits", refuse)
        done = await asyncio.gather(*(engine.complete(prompt, PARAMS) for prompt in PROMPTS))
        assert [each.token_ids for each in done] == alone
        assert "1 dropped" in engine.explain_cache()


async def test_where_memory_is_refused_for_logits_fewer_are_computed_at_once(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept that could be freed. Whose logits alone are too many ends, by itself."""
    logits, most = Decoder.logits, 1

    async def refusing(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        if len(hidden) > most:
            raise MemoryLimitError("refused")
        return await logits(self, hidden)

    async with memory_engine(model, draft="none") as engine:
        alone = [(await engine.complete(prompt, PARAMS)).token_ids for prompt in PROMPTS]
        engine.reset()
        monkeypatch.setattr(Decoder, "logits", refusing)
        done = await asyncio.gather(*(engine.complete(prompt, PARAMS) for prompt in PROMPTS))
        assert [each.token_ids for each in done] == alone
        most = 0
        with pytest.raises(MemoryLimitError, match="refused"):
            await engine.complete(PROMPTS[0], PARAMS)


@pytest.mark.parametrize("ask", [Engine.logits, Engine.loss])
async def test_a_text_is_scored_although_a_block_of_the_head_is_damaged(
    model: Path, tmp_path: Path, ask: Any
) -> None:
    store = tmp_path / "store"
    async with memory_engine(model, window=2, store=store) as engine:
        expected = await ask(engine, LONG)
    damage_the_head(store)
    async with memory_engine(model, window=2, store=store) as engine:
        found = await ask(engine, LONG)
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
        assert len(engine.recoveries) == 1


async def test_who_comes_after_a_loss_is_not_told_of_it(model: Path) -> None:
    """The request that it befell has left before it got anything."""
    reports: list[Progress] = []
    async with memory_engine(model, 2) as engine:

        def progress(report: Progress) -> None:
            if report.stage == RECONNECTED:
                leaving.cancel()

        leaving = asyncio.create_task(engine.complete(PROMPTS[0], MANY, progress))
        await asyncio.sleep(0)  # it is added
        engine._group._break(PeerLostError("gone", rank=1, peer_id="memory:1"))
        await asyncio.wait({leaving})
        assert leaving.cancelled()
        await engine.complete(PROMPTS[1], PARAMS, reports.append)
        assert {report.stage for report in reports} == {"prefill"}
        assert [recovery.replaying_ms for recovery in engine.recoveries] == [0.0]


async def test_who_has_left_a_step_takes_no_place_in_the_queue(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, may_go_on = asyncio.Event(), asyncio.Event()

    async def hold_up() -> None:
        running.set()
        await may_go_on.wait()

    before_call(monkeypatch, 3, "forward", hold_up)
    async with memory_engine(model, sequences=2, waiting=1) as engine:
        asked = [asyncio.create_task(engine.complete(prompt, PARAMS)) for prompt in PROMPTS[:3]]
        await running.wait()
        asked[0].cancel()
        await asyncio.wait({asked[0]})
        fourth = asyncio.create_task(engine.complete(PROMPTS[3], PARAMS))
        await asyncio.sleep(0)  # it is added
        may_go_on.set()
        assert [len((await each).token_ids) for each in (*asked[1:], fourth)] == [12] * 3


async def test_a_token_is_decoded_whatever_else_its_step_computed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of others, and the answer itself once more: it had given way."""
    have_memory_for(monkeypatch, 96)
    async with memory_engine(model, draft="none", chunk_tokens=16) as engine:
        asked = (engine.complete([first, *LONG], MANY) for first in range(3, 5))
        for done in await asyncio.gather(*asked):
            assert len(done.decoded) in (98, 99)  # one may have been computed again
            assert sum(t.total_ms for t in done.decoded) / 99 <= done.tpot_ms * 1.1


async def test_what_scored_texts_take_is_not_learnt_for_answers(model: Path) -> None:
    """Their logits are computed elsewhere."""
    async with memory_engine(model) as engine:
        await engine.loss(LONG)
        assert engine._driver._output_costs.seconds(1) is None
        await engine.complete(PROMPTS[0], PARAMS)
        assert engine._driver._output_costs.seconds(1) is not None


async def test_who_leaves_while_logits_are_computed_is_not_counted_as_answered(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def leave() -> None:
        leaving.cancel()
        await asyncio.wait({leaving})

    before_call(monkeypatch, 5, "logits", leave)
    async with memory_engine(model, ttft_target_s=60.0, tpot_target_s=60.0) as engine:
        staying = asyncio.create_task(engine.complete(PROMPTS[0], PARAMS))
        leaving = asyncio.create_task(engine.complete(PROMPTS[1], PARAMS))
        await asyncio.wait({staying, leaving})
        assert leaving.cancelled()
        assert engine.goodput.answers == 1


async def test_who_leaves_is_told_no_more(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the step that was under way."""
    told: list[Progress] = []

    async def leave() -> None:
        leaving.cancel()
        await asyncio.wait({leaving})
        told.clear()

    before_call(monkeypatch, 3, "forward", leave)
    async with memory_engine(model, chunk_tokens=8) as engine:
        staying = asyncio.create_task(engine.complete(PROMPTS[0], PARAMS))
        leaving = asyncio.create_task(engine.complete(LONG, PARAMS, told.append))
        await asyncio.wait({staying, leaving})
        assert leaving.cancelled()
        assert told == []


async def test_a_reconnect_goes_on_for_who_came_meanwhile(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = Connection._form_with_patience
    begun = 0
    forming, may_go_on = asyncio.Event(), asyncio.Event()

    async def held_up(self: Connection, *args: Any) -> Any:
        nonlocal begun
        begun += 1
        forming.set()
        await may_go_on.wait()
        return await form(self, *args)

    async with memory_engine(model, 2) as engine:
        alone = (await engine.complete(PROMPTS[1], PARAMS)).token_ids
        monkeypatch.setattr(Connection, "_form_with_patience", held_up)
        leaving = asyncio.create_task(engine.complete(PROMPTS[0], MANY))
        await asyncio.sleep(0)  # it is added
        engine._group._break(PeerLostError("gone", rank=1, peer_id="memory:1"))
        await forming.wait()
        second = asyncio.create_task(engine.complete(PROMPTS[1], PARAMS))
        await asyncio.sleep(0)  # it is added
        leaving.cancel()
        await asyncio.wait({leaving})
        may_go_on.set()
        assert (await second).token_ids == alone
        assert begun == 1


async def test_who_comes_after_a_loss_is_no_part_of_it(model: Path) -> None:
    """It is answered first, which does not make good what another request lost."""
    stages: dict[str, list[str]] = {"lost": [], "later": []}
    came: list[asyncio.Task[Completion]] = []
    reconnected = asyncio.Event()

    async with memory_engine(model, 2, chunk_tokens=4) as engine:

        def noted(progress: Progress) -> None:
            told = stages["lost"]
            told.append(progress.stage)
            if len(told) == 3:
                engine._group._break(PeerLostError("gone", rank=1, peer_id="memory:1"))
            if progress.stage == RECONNECTED:
                later = engine.complete(
                    [5, 6], ONE, lambda p: stages["later"].append(p.stage), priority=1
                )
                came.append(asyncio.create_task(later))
                reconnected.set()

        first = asyncio.create_task(engine.complete(LONG, PARAMS, noted))
        await reconnected.wait()
        await came[0]
        (recovery,) = engine.recoveries
        assert recovery.replaying_ms == 0
        assert RESUMED not in stages["lost"]
        await first
        assert stages["lost"].count(RESUMED) == 1
        assert stages["later"] == ["prefill"]
        assert recovery.replaying_ms > 0


def refuse_above(patch: pytest.MonkeyPatch, positions: int) -> list[bool]:
    """The system refuses memory for more positions; returns of each step whether it was."""
    forward, refused = Decoder.forward, []

    async def refusing(self: Decoder, hidden: torch.Tensor, step: Any) -> Any:
        ends = {number: slot.length for number, slot in self.kv._slots.items()}
        ends |= {segment.slot: segment.end for segment in step.batch.segments}
        refused.append(sum(ends.values()) > positions)
        if refused[-1]:
            raise MemoryLimitError("refused")
        return await forward(self, hidden, step)

    patch.setattr(Decoder, "forward", refusing)
    return refused


def have_room_for(patch: pytest.MonkeyPatch, positions: int) -> list[bool]:
    """Only so many positions fit."""
    have_memory_for(patch, positions // 2)
    return []


@pytest.mark.parametrize("bound", [refuse_above, have_room_for])
@pytest.mark.parametrize("others", [[9, *LONG], [*LONG, 9]], ids=["other ids", "shared ids"])
async def test_who_waits_for_a_reader_makes_room(
    model: Path, monkeypatch: pytest.MonkeyPatch, bound: Any, others: list[int]
) -> None:
    """A reader that has stopped holds nobody up, and gets the same answer later."""
    async with memory_engine(model) as engine:
        alone = [(await engine.complete(ids, MANY)).token_ids for ids in (LONG, others)]
    async with memory_engine(model, spill_bytes=0) as engine:
        refused: Sequence[bool] = bound(monkeypatch, 150)
        stopped = engine.generate(LONG, MANY)
        tokens = [(await anext(stopped)).id]
        async with asyncio.timeout(30):
            assert (await engine.complete(others, MANY)).token_ids == alone[1]
            tokens += [token.id async for token in stopped]
    assert tokens == alone[0]
    assert sum(refused) < 10


@pytest.mark.parametrize("loss", [False, True])
async def test_those_that_gave_way_run_again_when_there_is_memory(
    model: Path, monkeypatch: pytest.MonkeyPatch, loss: bool
) -> None:
    """All of them after a loss; else one by one, as others end."""
    plan, running, given_up = Scheduler.plan, [0], asyncio.Event()

    def noted(self: Scheduler, sequences: Sequence[Any], *args: Any) -> Any:
        if len(sequences) < running[-1]:
            given_up.set()
        running.append(len(sequences))
        return plan(self, sequences, *args)

    monkeypatch.setattr(Scheduler, "plan", noted)
    async with memory_engine(model, 2, spill_bytes=0) as engine:
        alone = [(await engine.complete(ids, MANY)).token_ids for ids in PROMPTS[:3]]
        engine.reset()
        given_up.clear()
        with monkeypatch.context() as short:
            have_memory_for(short, 64)
            answers = [asyncio.create_task(engine.complete(ids, MANY)) for ids in PROMPTS[:3]]
            await given_up.wait()
        if loss:
            engine._group._break(PeerLostError("gone", rank=1, peer_id="memory:1"))
        running[:] = [0]
        assert [(await answer).token_ids for answer in answers] == alone
        assert max(running) == (3 if loss else 2)


async def test_what_several_share_is_said_to_be_computed_again_once(model: Path) -> None:
    async with memory_engine(model, 2, draft="none") as engine:
        answers = [engine.generate([*LONG, last], MANY) for last in range(3, 6)]
        for answer in answers:
            await anext(answer)
        engine._group._break(PeerLostError("gone", rank=1, peer_id="memory:1"))
        for answer in answers:
            async for _ in answer:
                pass
    (replayed,) = {recovery.replayed_tokens for recovery in engine.recoveries}
    assert len(LONG) < replayed < len(LONG) + 3 * 20
