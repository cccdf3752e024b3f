"""Keys and values in int8 on the main path.

What is read back is always what was rounded, so steps, ranks, windows and kernels agree as they do
without rounding: bit for bit where products do, else to within the dtype's rounding.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.kernels import multiply_in_c
from tests.support.nightly import nightly, nightly_but
from tpirt.batch import DEFAULT_COLLECTIVE, Segment
from tpirt.cluster.collective_policy import CollectivePolicy
from tpirt.dtypes import RUN_DTYPES
from tpirt.model import attention as heads
from tpirt.model import products
from tpirt.model.products import Products
from tpirt.ops.native.bindings import native_kernels
from tpirt.testing.cluster import memory_engine
from tpirt.testing.decoders import decoder_group
from tpirt.testing.models import make_model
from tpirt.types import SamplingParams

PROMPT = [(37 * i + 11) % 256 for i in range(70)]
GREEDY = SamplingParams(max_tokens=8, temperature=0)
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 352}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral-window": {"family": "mistral", "sliding_window": 20},
    "qwen3": {"family": "qwen3"},
}

needs_native = pytest.mark.skipif(native_kernels(1) is None, reason="no kernels in C here")


@pytest.fixture(scope="module", params=nightly_but({"mistral-window", "qwen3"}, MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param
    return make_model(tmp_path_factory.mktemp("kv") / name, **SIZES, **MODELS[name])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("kv") / "llama", **SIZES)


async def run(model: Path, world: int = 1, **options: Any) -> tuple[torch.Tensor, list[int]]:
    """Logits of the prompt, and the greedy answer to it."""
    async with memory_engine(model, world, **{"kv": "int8", **options}) as engine:
        logits = await engine.logits(PROMPT)
        return logits, (await engine.complete(PROMPT, GREEDY)).token_ids


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


async def test_logits_are_close_to_those_of_a_whole_cache(model: Path) -> None:
    exact, _ = await run(model, kv="auto")
    got, _ = await run(model)
    assert 1e-4 < error(got, exact) < 0.04


async def test_a_prompt_in_one_chunk_equals_several_and_single_tokens(model: Path) -> None:
    """In float32: steps of up to 8 tokens attend in C, longer ones with torch."""
    exact, tokens = await run(model)
    for chunk in (16, 8, 1):
        got, ours = await run(model, chunk_tokens=chunk)
        assert error(got, exact) < 5e-4  # a number in the middle of two codes may take the other
        assert ours == tokens


@needs_native
async def test_in_c_chunks_are_equal_bit_for_bit(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products and attention in C: no row depends on another."""
    multiply_in_c(monkeypatch)
    options = {"dtype": "bfloat16", "quantize": "int4"}
    (first, tokens), *others = [
        await run(model, chunk_tokens=chunk, **options) for chunk in (8, 3, 1)
    ]
    for logits, ours in others:
        assert torch.equal(logits, first)
        assert ours == tokens


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_few_rows_attend_in_c_after_products_of_any_dtype(
    llama: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    project = Products.project

    def projected(self: Products, *args: Any) -> torch.Tensor:
        return project(self, *args).to(RUN_DTYPES[dtype])

    def refused(*_: object) -> torch.Tensor:
        raise AssertionError("attention with torch")

    monkeypatch.setattr(Products, "project", projected)
    monkeypatch.setattr(heads, "attention", refused)
    await run(llama, dtype=dtype, chunk_tokens=8)


@pytest.mark.parametrize("dtype", [nightly("float32"), "bfloat16"])
async def test_without_c_it_is_computed_with_torch(
    model: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    exact, tokens = await run(model, dtype=dtype, chunk_tokens=4)
    for module in (heads, products):
        monkeypatch.setattr(module, "available_kernels", lambda: None)
    got, ours = await run(model, dtype=dtype, chunk_tokens=4)
    assert error(got, exact) < (5e-4 if dtype == "float32" else 0.05)
    assert dtype != "float32" or ours == tokens


async def test_ranks_agree(model: Path) -> None:
    exact, tokens = await run(model)
    for world, ratio in ((2, None), (3, (2, 1, 1))):
        got, ours = await run(model, world, ratio=ratio)
        assert error(got, exact) < 5e-4
        assert ours == tokens


@pytest.mark.parametrize("micro_batches", [nightly(False), True])
@pytest.mark.parametrize("dtype", [nightly("float32"), "bfloat16"])
async def test_streamed_equals_resident_bit_for_bit(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, micro_batches: bool
) -> None:
    choice = replace(DEFAULT_COLLECTIVE, micro_batches=micro_batches)
    monkeypatch.setattr(CollectivePolicy, "for_step", lambda *_: choice)
    options = {"dtype": dtype, "store": tmp_path, "chunk_tokens": 32}
    resident, tokens = await run(llama, 2, **options)
    for window in (2, 3):
        logits, ours = await run(llama, 2, window=window, **options)
        assert torch.equal(logits, resident)
        assert ours == tokens


async def test_sequences_in_one_step_equal_each_alone(model: Path) -> None:
    async def alone(ids: list[int]) -> torch.Tensor:
        async with decoder_group(model, 2, kv_bits=8) as group:
            return await group.logits(ids, [Segment(0, 0, len(ids), len(ids), len(ids))])

    first, second = PROMPT[:30], PROMPT[20:60]
    async with decoder_group(model, 2, kv_bits=8) as group:
        parts = [Segment(0, 0, 20, 20, 30), Segment(1, 0, 12, 12, 40)]
        begun = await group.logits(first[:20] + second[:12], parts)
        parts = [Segment(1, 12, 28, 28, 40), Segment(0, 15, 15, 15, 30)]
        ended = await group.logits(second[12:] + first[15:], parts, micro_batches=True)
    assert error(torch.cat((begun[:15], ended[28:])), await alone(first)) < 5e-4
    assert error(torch.cat((begun[20:], ended[:28])), await alone(second)) < 5e-4
