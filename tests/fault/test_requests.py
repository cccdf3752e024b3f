"""Requests that no rank can serve are refused on the master; the group lives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpirt.batch import Segment
from tpirt.errors import RequestError
from tpirt.testing.cluster import memory_engine
from tpirt.testing.models import make_model
from tpirt.types import SamplingParams

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
