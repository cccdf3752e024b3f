"""Requests that no rank can serve are refused on the master; the group lives."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from tpirt.batch import Segment
from tpirt.engine import Conversation
from tpirt.errors import LogitsError, RequestError
from tpirt.model.decoder import Decoder
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
        hidden = (await engine.embed(PROMPT[:2])).float()
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


@pytest.mark.parametrize(
    ("value", "temperature"),
    [(float("nan"), 0.0), (float("nan"), 1.0), (float("inf"), 0.0), (-float("inf"), 1.0)],
)
async def test_logits_that_are_not_finite_end_the_request_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, temperature: float
) -> None:
    model = make_model(tmp_path / "model", "llama")
    params = SamplingParams(max_tokens=3, temperature=temperature, seed=1)
    logits = Decoder.logits
    left = 2

    async def damaged(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        nonlocal left
        left -= 1
        out = await logits(self, hidden)
        if left <= 0:
            out[-1, 7] = value
        return out

    async def ask(talk: Conversation, text: str) -> list[int]:
        return [token.id async for token in talk.send(text, params)]

    async with memory_engine(model, 1) as engine:
        talk = Conversation(engine)
        await ask(talk, "first")
        turns, used = list(talk.turns), talk.used_tokens
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "logits", damaged)
            with pytest.raises(LogitsError, match=r"damaged .*--dtype float32"):
                await ask(talk, "second")
            assert left == 0  # one token of the answer was good
            with pytest.raises(LogitsError):
                await engine.loss(PROMPT)
        assert (talk.turns, talk.used_tokens) == (turns, used)
        again = await ask(talk, "second")
        other = Conversation(engine)
        await ask(other, "first")
        assert await ask(other, "second") == again
