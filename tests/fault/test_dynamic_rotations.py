"""Dynamically scaled rotations beyond the trained length: what is computed again is as it was."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.steps import take_free_rows
from tpirt.cluster.group import Group
from tpirt.errors import MemoryLimitError, PeerLostError
from tpirt.testing.cluster import memory_engine
from tpirt.testing.drafters import KnownAnswers
from tpirt.testing.models import make_model
from tpirt.types import SamplingParams

TRAINED = 32
PROMPTS = [[(11 * i) % 200 + 3 for i in range(length)] for length in (TRAINED + 8, TRAINED - 12)]
PARAMS = SamplingParams(max_tokens=60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scaling = {"type": "dynamic", "factor": 4.0}
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return make_model(folder, rope_scaling=scaling, max_position_embeddings=TRAINED)


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[tuple[int, ...], list[int]]:
    """The answer of each prompt by itself."""

    async def answers() -> dict[tuple[int, ...], list[int]]:
        async with memory_engine(model, draft="none") as engine:
            return {tuple(ids): (await engine.complete(ids, PARAMS)).token_ids for ids in PROMPTS}

    return asyncio.run(answers())


@pytest.mark.parametrize("ids", PROMPTS, ids=["longer prompt", "shorter prompt"])
async def test_after_a_loss_an_answer_goes_on_as_it_would_have(
    model: Path, alone: dict[tuple[int, ...], list[int]], ids: list[int]
) -> None:
    async with memory_engine(model, 2) as engine:
        answer = engine.generate(ids, PARAMS)
        tokens = [(await anext(answer)).id for _ in range(40)]
        engine._group._break(PeerLostError("gone", rank=1, peer_id="memory:1"))
        tokens += [token.id async for token in answer]
        assert len(engine.recoveries) == 1
    assert tokens == alone[tuple(ids)]


@pytest.mark.parametrize("spill_bytes", [0, 1 << 20])
async def test_who_is_given_up_goes_on_as_it_would_have(
    model: Path,
    alone: dict[tuple[int, ...], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    spill_bytes: int,
) -> None:
    step, steps = Group.step, 0

    async def refused_once(self: Group, *args: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 45:
            raise MemoryLimitError("refused")
        return await step(self, *args)

    monkeypatch.setattr(Group, "step", refused_once)
    async with memory_engine(model, draft="none", spill_bytes=spill_bytes) as engine:
        both = await asyncio.gather(*(engine.complete(ids, PARAMS) for ids in PROMPTS))
        assert (f"{int(spill_bytes > 0)} restored") in engine.explain_cache()
    assert [done.token_ids for done in both] == list(alone.values())


async def test_guesses_change_nothing(
    model: Path, alone: dict[tuple[int, ...], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    take_free_rows(monkeypatch, 16)
    async with memory_engine(model, draft=KnownAnswers(alone, 0.7)) as engine:
        for ids, answer in alone.items():
            done = await engine.complete(ids, PARAMS)
            assert done.token_ids == answer
            assert done.right_guesses > len(answer) / 2
