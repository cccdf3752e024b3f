"""Sampling against transformers' logits processors: the same survivors, probabilities, draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tpirt.engine.sampler import Sampler, check_params
from tpirt.errors import ConfigError
from tpirt.testing.cluster import memory_engine
from tpirt.testing.models import make_model
from tpirt.types import SamplingParams


def oracle(logits: torch.Tensor, history: list[int], params: SamplingParams) -> torch.Tensor:
    """Scores after transformers' processors, in the order in which ``generate`` applies them."""
    steps: list[Any] = []
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1:
        steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    scores: torch.Tensor = LogitsProcessorList(steps)(torch.tensor([history]), logits[None].clone())
    return scores[0]


def logits_of(kind: str, seed: int, size: int) -> torch.Tensor:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "wide":
            return values * 8
        case "ties":
            return (values * 2).round()
        case "flat":
            return torch.zeros(size)
        case "one":
            return torch.full((size,), -30.0).index_fill_(0, torch.tensor([seed % size]), 30.0)
        case _:
            return values


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.05, 0.7, 1.0, 1.3, 20.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 1000]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 0.7, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.2, 5.0]),
    seed=st.integers(0, 2**63 - 1),
)


@given(
    params=PARAMS,
    kind=st.sampled_from(["normal", "wide", "ties", "flat", "one"]),
    seed=st.integers(0, 1000),
    size=st.sampled_from([1, 2, 7, 64, 300]),
    history=st.lists(st.integers(0, 10**6), min_size=1, max_size=20),
)
@settings(max_examples=400)
def test_same_survivors_probabilities_and_draws(
    params: SamplingParams, kind: str, seed: int, size: int, history: list[int]
) -> None:
    check_params(params)
    history = [token % size for token in history]
    logits = logits_of(kind, seed, size)
    expected = oracle(logits, history, params)
    drawn = Sampler(params).next(logits, history)  # leaves the processed scores in ``logits``
    assert torch.equal(logits.isfinite(), expected.isfinite())
    torch.testing.assert_close(logits.softmax(-1), expected.softmax(-1))
    torch.manual_seed(params.seed)
    assert drawn == int(torch.multinomial(expected.softmax(-1)[None], 1))
    assert math.isfinite(expected[drawn])


def test_top_k_keeps_all_that_tie() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    Sampler(SamplingParams(temperature=1.0, top_k=2)).next(logits, [0])
    assert logits.isfinite().tolist() == [False, True, True, True, True, False]


def test_greedy_ignores_the_other_filters_and_takes_the_first_of_equals() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0])
    params = SamplingParams(temperature=0.0, top_k=1, top_p=0.1, min_p=1.0)
    assert Sampler(params).next(logits, [0]) == 1


def test_repetition_penalty_counts_a_token_once_and_handles_both_signs() -> None:
    logits = torch.tensor([2.0, -2.0, 1.5, 0.0])
    params = SamplingParams(repetition_penalty=2.0)
    assert Sampler(params).next(logits, [0, 0, 0, 1, 1]) == 2
    assert logits.tolist() == [1.0, -4.0, 1.5, 0.0]


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-20, 1e-7, 1e30, 3e38])
def test_any_positive_temperature_draws_something(temperature: float) -> None:
    logits = torch.tensor([1.0, 50.0, -40.0])
    drawn = Sampler(SamplingParams(temperature=temperature, seed=1)).next(logits, [0])
    assert drawn == 1 or temperature > 1


def test_same_seed_same_tokens_and_no_seed_differs() -> None:
    flat = torch.zeros(1000)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler.next(flat.clone(), [0]) for _ in range(8)]

    state = torch.get_rng_state()
    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)
    assert torch.equal(state, torch.get_rng_state())  # nobody else's generator is touched


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.01},
        {"min_p": 1.01},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"seed": -1},
        {"seed": 1 << 63},
        {"stop": ("a", "")},
        {"stop": ("\udcff",)},
        {"temperature": 10**400},
        {"repetition_penalty": 1e-4},
        {"stop": "abc"},
        {"stop": (1,)},
        {"max_tokens": 2.5},
        {"max_tokens": "3"},
        {"temperature": "1"},
        {"top_k": None},
        {"seed": 1.0},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        check_params(SamplingParams(**wrong))


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
    {"temperature": 2.0, "top_p": 0.95, "repetition_penalty": 1.1, "min_p": 0.01},
]


@pytest.mark.parametrize("world", [1, 2])
async def test_same_draws_as_generate(tmp_path: Path, world: int) -> None:
    path = make_model(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = list(range(40, 60))
    ids = torch.tensor([prompt])
    async with memory_engine(path, world) as engine:
        for seed, values in enumerate(SAMPLED):
            params = SamplingParams(max_tokens=24, seed=seed, **values)
            got = (await engine.complete(prompt, params)).token_ids
            torch.manual_seed(seed)
            with torch.no_grad():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    max_new_tokens=24,
                    pad_token_id=0,
                    **{"top_k": 0, "top_p": 1.0, **values},
                )
            assert got == out[0, len(prompt) :].tolist(), values
