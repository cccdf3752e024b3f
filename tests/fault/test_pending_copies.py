"""A sequence that waits for its first step still finds the keys and values that it is to copy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.steps import have_memory_for
from tpirt.engine import Engine
from tpirt.engine.scheduler import Scheduler
from tpirt.errors import LogitsError
from tpirt.model.decoder import Decoder
from tpirt.testing.cluster import memory_engine
from tpirt.types import Progress, SamplingParams, Token

FIRST = [(7 * i) % 200 + 3 for i in range(80)]
SECOND = [*FIRST[:60], *range(100, 120)]  # is to copy 60 positions of the first
LONG = [(11 * i) % 190 + 5 for i in range(300)]
THIRD = [*FIRST[:55], 9]  # shares most of the first, so that it could take its slot over
PARAMS = SamplingParams(max_tokens=4)
MANY = SamplingParams(max_tokens=40)


@dataclass
class Scene:
    """The first request is under way; the second one is to copy from it, after a long prompt."""

    engine: Engine
    first: AsyncGenerator[Token, None]
    second: asyncio.Task[list[int]]
    long: asyncio.Task[list[int]]


async def ask(engine: Engine, ids: list[int], params: SamplingParams = PARAMS) -> list[int]:
    return (await engine.complete(ids, params)).token_ids


@pytest.fixture
async def scene(model: Path) -> AsyncIterator[Scene]:
    async with memory_engine(model, 2, chunk_tokens=6, objective="throughput") as engine:
        first = engine.generate(FIRST, MANY)
        await anext(first)
        begun = asyncio.Event()

        async def ask_long() -> list[int]:
            def progress(_: Progress) -> None:
                begun.set()

            return (await engine.complete(LONG, PARAMS, progress)).token_ids

        long = asyncio.create_task(ask_long())
        second = asyncio.create_task(ask(engine, SECOND))
        await begun.wait()
        yield Scene(engine, first, second, long)
        await first.aclose()


async def alone(model: Path, ids: list[int], params: SamplingParams = PARAMS) -> list[int]:
    async with memory_engine(model) as engine:
        return await ask(engine, ids, params)


async def test_nobody_takes_the_source_over(model: Path, scene: Scene) -> None:
    """The third request goes first, since its first token is due at once, and outgrows the copy."""
    await scene.first.aclose()
    third = await ask(scene.engine, THIRD, MANY)
    assert await scene.second == await alone(model, SECOND)
    assert third == await alone(model, THIRD, MANY)
    assert await scene.long == await alone(model, LONG)


async def test_a_reset_frees_the_source_after_the_copy(model: Path, scene: Scene) -> None:
    await scene.first.aclose()
    scene.engine.reset()
    assert await scene.second == await alone(model, SECOND)
    assert await scene.long == await alone(model, LONG)
    scene.engine.reset()
    assert await ask(scene.engine, FIRST) == await alone(model, FIRST)


async def test_a_copy_that_was_not_made_is_not_kept(model: Path, scene: Scene) -> None:
    scene.second.cancel()
    await scene.first.aclose()
    assert await ask(scene.engine, THIRD) == await alone(model, THIRD)
    assert await ask(scene.engine, SECOND) == await alone(model, SECOND)


async def test_nothing_is_copied_of_a_damaged_sequence(
    model: Path, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = Decoder.logits

    async def damaged(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.kv._slots[0].layers:
            for rows in layer.tensors:
                rows.fill_(float("nan"))
        return (await logits(self, hidden)).fill_(float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "logits", damaged)
        with pytest.raises(LogitsError):
            async for _ in scene.first:
                pass
    assert await scene.second == await alone(model, SECOND)
    assert await scene.long == await alone(model, LONG)


async def test_a_source_that_is_given_up_is_computed_by_who_was_to_copy_it(
    model: Path, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reader stopped, and memory has become short."""
    plan, all_run = Scheduler.plan, asyncio.Event()

    def noted(self: Scheduler, running: Sequence[Any], *args: Any) -> Any:
        if len(running) == 3 and running[0].paused:
            all_run.set()
        return plan(self, running, *args)

    monkeypatch.setattr(Scheduler, "plan", noted)
    await all_run.wait()
    have_memory_for(monkeypatch, 240)
    assert await scene.second == await alone(model, SECOND)
    assert await scene.long == await alone(model, LONG)
    tokens = [token.id async for token in scene.first]
    assert tokens == (await alone(model, FIRST, MANY))[1:]
