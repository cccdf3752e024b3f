"""Layers that one rank computes in one call: the same bits, and an abort is heard in between."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from tpirt.batch import Segment
from tpirt.cluster import kernels
from tpirt.collectives.context import StepAborted
from tpirt.model import decoder
from tpirt.ops.native.bindings import LayerRun, NativeKernels, native_kernels
from tpirt.ops.plain_kernels import NATIVE_HALF
from tpirt.ops.quant import QuantSpec, Scheme
from tpirt.ops.quant_kernels import NATIVE
from tpirt.ops.quant_linear import KernelChoice
from tpirt.testing.cluster import memory_engine
from tpirt.testing.decoders import decoder_group
from tpirt.testing.models import make_model
from tpirt.types import SamplingParams, ignore_progress

pytestmark = pytest.mark.skipif(native_kernels(1) is None, reason="no kernels in C here")

PROMPT = [(37 * i + 11) % 256 for i in range(24)]
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 352}
MODELS: dict[str, dict[str, Any]] = {
    "mistral-window": {"family": "mistral", "sliding_window": 9},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
}


@pytest.fixture(autouse=True)
def in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """All products are those in C, whatever is faster."""

    def probe(spec: QuantSpec, *_: Any, **__: Any) -> KernelChoice:
        return KernelChoice((), (NATIVE if isinstance(spec, Scheme) else NATIVE_HALF).name)

    monkeypatch.setattr(kernels, "probe_kernels", probe)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """First layer and number of layers of each call in C."""
    made: list[tuple[int, int]] = []
    layers = NativeKernels.layers

    def noted(self: NativeKernels, run: LayerRun, hidden: torch.Tensor) -> None:
        made.append((run.first, run.count))
        layers(self, run, hidden)

    monkeypatch.setattr(NativeKernels, "layers", noted)
    return made


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("family", MODELS)
async def test_layers_in_one_call_equal_streamed_ones(
    tmp_path: Path, runs: list[tuple[int, int]], family: str, quantize: str, kv: str
) -> None:
    model = make_model(tmp_path / family, **SIZES, **MODELS[family])
    options = {"dtype": "bfloat16", "quantize": quantize, "kv": kv, "store": tmp_path / "store"}
    results = []
    for window in (None, 2):
        async with memory_engine(model, 1, window=window, chunk_tokens=8, **options) as engine:
            logits = await engine.logits(PROMPT)
            answer = await engine.complete(PROMPT, SamplingParams(max_tokens=6, temperature=0))
            results.append((logits, answer.token_ids))
            layers = engine.config.num_hidden_layers
        assert set(runs) == (set() if window else {(0, layers)})
        runs.clear()
    (logits, tokens), (streamed, streamed_tokens) = results
    assert torch.equal(logits, streamed)
    assert tokens == streamed_tokens


async def test_an_abort_is_heard_between_calls(
    tmp_path: Path, runs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model", **SIZES, num_hidden_layers=4)
    async with decoder_group(model, dtype=torch.bfloat16) as group:
        attention, mlp, *_ = group.ranks[0].streamer.blocks
        monkeypatch.setattr(decoder, "CHAIN_BYTES", 2 * (attention.nbytes + mlp.nbytes))
    async with decoder_group(model, dtype=torch.bfloat16) as group:
        await group.ranks[0].streamer.preload(ignore_progress)
        await group.run([1, 2, 3], group.contexts([Segment(0, 0, 3, 3, 3)]))
        assert runs == [(0, 2), (2, 2)]
        steps = group.contexts([Segment(0, 3, 1, 1, 4)])
        layers = NativeKernels.layers

        def aborted(self: NativeKernels, run: LayerRun, hidden: torch.Tensor) -> None:
            layers(self, run, hidden)
            asyncio.get_running_loop().call_soon(steps[0].abort, StepAborted())

        with monkeypatch.context() as patch:
            patch.setattr(NativeKernels, "layers", aborted)
            with pytest.raises(StepAborted):
                await group.run([4], steps)
        assert runs[2:] == [(0, 2)]
        kv = group.ranks[0].decoder.kv
        assert kv.length(0) == 3
        await group.run([4], group.contexts([Segment(0, 3, 1, 1, 4)]))
        assert kv.length(0) == 4
