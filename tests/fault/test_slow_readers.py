"""Readers that stop, go on and leave, while others' answers are computed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import pytest
import torch

from tpirt.batch import Segment
from tpirt.cluster.group import Group
from tpirt.engine import Engine
from tpirt.engine.drafts.controller import DraftController
from tpirt.engine.scheduler import Piece
from tpirt.errors import MemoryLimitError
from tpirt.planning import Deployment
from tpirt.testing.cluster import memory_engine
from tpirt.types import SamplingParams, Token

PROMPTS = [[(first + 7 * i) % 200 + 3 for i in range(10)] for first in range(4)]
PARAMS = SamplingParams(max_tokens=5)
MANY = SamplingParams(max_tokens=30)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences are in each step."""
    step, counts = Group.step, []

    async def counted(
        self: Group, hidden: torch.Tensor, segments: Sequence[Segment], prefill: bool
    ) -> torch.Tensor:
        counts.append(len(segments))
        return await step(self, hidden, segments, prefill)

    monkeypatch.setattr(Group, "step", counted)
    return counts


async def ids_of(answer: AsyncGenerator[Token, None]) -> list[int]:
    return [token.id async for token in answer]


async def begun(engine: Engine, prompt: list[int]) -> tuple[int, AsyncGenerator[Token, None]]:
    """Ask, and read one token."""
    answer = engine.generate(prompt, MANY)
    return (await anext(answer)).id, answer


async def test_readers_that_go_on_are_in_turn_with_those_that_came_since(
    model: Path, steps: list[int]
) -> None:
    async with memory_engine(model) as engine:
        alone = [(await engine.complete(prompt, MANY)).token_ids for prompt in PROMPTS]
    async with memory_engine(model, sequences=2) as engine:
        answers = [await begun(engine, prompt) for prompt in PROMPTS]  # the first ones pause
        rest = await asyncio.gather(*(ids_of(answer) for _, answer in answers))
    assert [[first, *more] for (first, _), more in zip(answers, rest, strict=True)] == alone
    assert max(steps) == 2


async def test_one_that_was_given_up_waits_for_those_that_are_read(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that wait for their readers take no part in a step, so their number says nothing."""
    step = Group.step

    async def refused(
        self: Group, hidden: torch.Tensor, segments: Sequence[Segment], prefill: bool
    ) -> torch.Tensor:
        if len(segments) > 2:
            raise MemoryLimitError("refused by a test")
        return await step(self, hidden, segments, prefill)

    monkeypatch.setattr(Group, "step", refused)
    async with memory_engine(model, sequences=3) as engine:
        paused = [await begun(engine, prompt) for prompt in PROMPTS[:2]]
        # The first of three can begin when one has paused, the last one when both have.
        last = [await begun(engine, prompt) for prompt in PROMPTS[2:]]
        async with asyncio.timeout(20):
            await asyncio.gather(*(ids_of(answer) for _, answer in last))
        for _, answer in paused:
            await answer.aclose()


async def leave(request: asyncio.Task[object]) -> None:
    request.cancel()
    await asyncio.wait({request})


async def test_no_step_is_run_for_one_that_left_while_guesses_were_made(
    model: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    extend = DraftController.extend
    async with memory_engine(model, draft="suffix") as engine:

        async def slow(self: DraftController, pieces: Sequence[Piece], *limits: int) -> list[Piece]:
            extended = await extend(self, pieces, *limits)
            await leave(asked)
            return extended

        monkeypatch.setattr(DraftController, "extend", slow)
        asked = asyncio.create_task(engine.complete(PROMPTS[0], PARAMS))
        await asyncio.wait({asked})
        monkeypatch.setattr(DraftController, "extend", extend)
        await engine.complete(PROMPTS[1], SamplingParams(max_tokens=1))
    assert len(steps) == 1


async def test_no_step_is_run_for_one_that_left_while_room_was_made(
    model: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spill, before = Group.spill, 0

    async def slow(self: Group, slot: int, *args: int) -> None:
        nonlocal before
        await spill(self, slot, *args)
        before = len(steps)
        await leave(asked)

    monkeypatch.setattr(Group, "spill", slow)
    monkeypatch.setattr(Deployment, "has_room", lambda *_, displacing: displacing)
    async with memory_engine(model) as engine:
        asked = asyncio.create_task(engine.complete(PROMPTS[0], MANY))
        await engine.complete(PROMPTS[1] * 4, PARAMS)  # it is spilled while the other goes on
        await asyncio.wait({asked})
        await engine.complete(PROMPTS[1], SamplingParams(max_tokens=1))
    assert len(steps) == before + 1
