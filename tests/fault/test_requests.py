"""Requests that no rank can serve are refused on the master; the group lives."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tpirt.batch import Segment
from tpirt.errors import RequestError
from tpirt.testing.cluster import memory_engine
from tpirt.testing.models import make_model
from tpirt.types import Progress, SamplingParams

PROMPT = list(range(40, 48))
PARAMS = SamplingParams(max_tokens=3)
GOOD = {"slot": 0, "position": 0, "tokens": 2, "num_logits": 1, "rope_length": 2}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"position": 20, "rope_length": 22}, "position 20"),
        ({"position": -1}, "position -1"),
        ({"num_logits": 3}, "results of 3 are wanted"),
        ({"num_logits": -1}, "results of -1 are wanted"),
        ({"rope_length": 10**6}, "the context ends at"),
        ({"tokens": 3}, r"\(2, 64\): expected \(3, 64\)"),
    ],
)
async def test_a_step_that_cannot_be_is_the_callers_error(
    tmp_path: Path, wrong: dict[str, int], message: str
) -> None:
    model = make_model(tmp_path / "model", "llama")
    async with memory_engine(model, 2) as engine:
        before = await engine.complete(PROMPT, PARAMS)
        group = engine._group
        hidden = engine.embed(PROMPT[:2]).float()
        with pytest.raises(RequestError, match=message):
            await group.step(hidden, [Segment(**(GOOD | wrong))], prefill=True)
        assert engine.broken is None
        engine.reset()
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == before.token_ids


async def test_a_reset_is_before_the_next_request(tmp_path: Path) -> None:
    """Also if that request begins at once, before any task of the reset has run."""
    model = make_model(tmp_path / "model", "llama")
    async with memory_engine(model, 2) as engine:
        computed: list[int] = []

        def progress(report: Progress) -> None:
            if report.stage == "prefill":
                computed.append(report.total)

        before = await engine.complete(PROMPT, PARAMS, progress)
        engine.reset()
        assert engine.cached_tokens == 0
        assert (await engine.complete(PROMPT, PARAMS, progress)).token_ids == before.token_ids
        await asyncio.sleep(0)  # the task of the reset
        assert engine.cached_tokens
        await engine.complete([*PROMPT, 3], PARAMS, progress)
        assert computed == [len(PROMPT), len(PROMPT), 1]
