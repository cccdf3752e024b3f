"""Every family and option on tiny random models: the same numbers as transformers'.

The models are made and saved by transformers itself. *Same tokens* and *tolerance* are against it
in float32; *exact* is streamed against resident weights, a rerun, and all ranks among themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support.nightly import nightly, nightly_but
from tpirt.batch import Algorithm, Segment
from tpirt.collectives.algorithms import GroupCommunicator
from tpirt.engine import Engine, EngineOptions
from tpirt.engine.sampler import Sampler
from tpirt.errors import MemoryLimitError
from tpirt.model import decoder
from tpirt.planning import Deployment, MemoryBudget
from tpirt.sharding import blocks as sharding
from tpirt.testing.cluster import memory_engine
from tpirt.testing.decoders import decoder_group
from tpirt.testing.models import make_tokenizer
from tpirt.types import SamplingParams

NEW_TOKENS = 10
CHUNK_TOKENS = 16
BASE: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
NO_RATIO: tuple[tuple[float, ...] | None, ...] = (None,)

Change = Callable[[Path], None]
World = int | tuple[float, ...]  # a tuple is a ratio


@dataclass(frozen=True)
class Case:
    """A model, where it is run, and what is done to its files after transformers wrote them."""

    family: str = "Llama"
    options: dict[str, Any] = field(default_factory=dict)
    worlds: Sequence[World] = (1, 3)
    change: Change | None = None
    prompt: int = 37
    dtype: torch.dtype = torch.float32
    save: dict[str, Any] = field(default_factory=dict)
    oracle_cache: bool = True
    base_model: bool = False


def rope(kind: str, **values: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **values}}


def edit_config(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    file = path / "config.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def old_rope(path: Path) -> None:
    """Spell rope as checkpoints of before transformers 5 do."""

    def edit(config: dict[str, Any]) -> None:
        values = config.pop("rope_parameters")
        config["rope_theta"] = values.pop("rope_theta")
        values["type"] = values.pop("rope_type")
        config["rope_scaling"] = None if values["type"] == "default" else values

    edit_config(path, edit)


def head_only(path: Path) -> None:
    """Store the tied matrix under the LM head's name alone."""
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def both_of_pair(path: Path) -> None:
    """Store the tied matrix under both names."""
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


LLAMA3 = rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
DYNAMIC = {**rope("dynamic", factor=2.0), "max_position_embeddings": 32}
ODD = {
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 6,
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 9}
UNEVEN_HEADS = (1.0, 0.3, 2.0)
UNEVEN_MANY = (5.0, 1.0, 1.0, 1.0, 1.0)  # five ranks, four KV heads

CASES = {
    "llama-gqa": Case(worlds=(1, 2, 3, 4, 5, 8, UNEVEN_HEADS, UNEVEN_MANY)),
    "llama-mha": Case(options={"num_key_value_heads": 8}, worlds=(1, 3, 8, UNEVEN_HEADS)),
    "llama-mqa": Case(options={"num_key_value_heads": 1}, worlds=(1, 2, 5, 8, UNEVEN_HEADS)),
    "llama-biases": Case(
        options={"attention_bias": True, "mlp_bias": True}, worlds=(1, 3, 8, UNEVEN_HEADS)
    ),
    "llama-head-dim": Case(options={"head_dim": 10}, worlds=(1, 2, 5)),
    "llama-tied": Case(options={"tie_word_embeddings": True}),
    "llama-tied-head-only": Case(options={"tie_word_embeddings": True}, change=head_only),
    "llama-tied-both": Case(options={"tie_word_embeddings": True}, change=both_of_pair),
    "llama-base-model": Case(options={"tie_word_embeddings": True}, base_model=True),
    "llama-sharded": Case(save={"max_shard_size": "40KB"}),
    "llama-old-rope": Case(change=old_rope),
    "llama-theta": Case(options={"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    "linear": Case(options=rope("linear", factor=3.0)),
    "linear-old": Case(options=rope("linear", factor=3.0), change=old_rope),
    "dynamic-short": Case(options=DYNAMIC, prompt=12),
    "dynamic-decode-crosses": Case(options=DYNAMIC, prompt=27, worlds=(1, 3, 5)),
    "dynamic-prompt-crosses": Case(options=DYNAMIC, prompt=45, worlds=(1, 3, 5)),
    "dynamic-old": Case(options=DYNAMIC, change=old_rope, prompt=45),
    "llama3": Case(options=LLAMA3, prompt=60),
    "llama3-old": Case(options=LLAMA3, prompt=60, change=old_rope),
    "gelu": Case(options={"hidden_act": "gelu"}),
    "gelu-tanh": Case(options={"hidden_act": "gelu_pytorch_tanh"}),
    "relu": Case(options={"hidden_act": "relu"}),
    "eps": Case(options={"rms_norm_eps": 0.05}),
    "odd": Case(options=ODD, worlds=(1, 2, 4, 5, 6, (1.0, 3.0))),
    "odd-qwen3": Case("Qwen3", options=ODD, worlds=(1, 4, 5)),
    "float16": Case(dtype=torch.float16, worlds=(1, 2)),
    "bfloat16": Case(dtype=torch.bfloat16, worlds=(1, 2)),
    "mistral": Case("Mistral", options={"sliding_window": None}),
    "mistral-window": Case("Mistral", options={"sliding_window": 9}, worlds=(1, 3, 5, 8)),
    # transformers' cache keeps everything where only the newest position should stay.
    "mistral-window-1": Case("Mistral", options={"sliding_window": 1}, oracle_cache=False),
    "mistral-window-2": Case("Mistral", options={"sliding_window": 2}),
    "mistral-window-chunk": Case("Mistral", options={"sliding_window": CHUNK_TOKENS}),
    "mistral-window-just-below-chunk": Case(
        "Mistral", options={"sliding_window": CHUNK_TOKENS - 1}
    ),
    "mistral-window-over-chunks": Case("Mistral", options={"sliding_window": 30}, prompt=70),
    "qwen2": Case("Qwen2", worlds=(1, 2, 5, 8, UNEVEN_MANY)),
    "qwen2-windowed-layers": Case("Qwen2", options={**WINDOWED, "max_window_layers": 1}),
    "qwen2-windows-off": Case("Qwen2", options={"sliding_window": 9, "max_window_layers": 1}),
    "qwen2-tied": Case("Qwen2", options={"tie_word_embeddings": True}),
    "qwen3": Case("Qwen3", options={"head_dim": 14}, worlds=(1, 2, 5, 8, UNEVEN_MANY)),
    "qwen3-windowed-layers": Case(
        "Qwen3", options={**WINDOWED, "head_dim": 10, "max_window_layers": 2}
    ),
    "qwen3-bias": Case("Qwen3", options={"attention_bias": True, "head_dim": 8}),
}
# What these try is in other cases, too.
NIGHTLY = {
    "llama-head-dim",
    "linear-old",
    "llama3-old",
    "dynamic-old",
    "dynamic-short",
    "mistral-window-2",
    "mistral-window-just-below-chunk",
    "qwen2-tied",
}
QUICK = CASES.keys() - NIGHTLY
# What these are about does not depend on how the model is split: a single rank is enough.
SINGLE_RANK = {
    "llama-tied-head-only",
    "llama-tied-both",
    "llama-base-model",
    "llama-old-rope",
    "llama-theta",
    "gelu",
    "gelu-tanh",
    "relu",
    "eps",
    "mistral",
    "qwen2-windows-off",
}
# In CI the others run over their second world, and over these:
QUICK_RUNS = {
    *((name, CASES[name].worlds[0 if name in SINGLE_RANK else 1]) for name in QUICK),
    ("llama-gqa", 1),
    ("llama-biases", UNEVEN_HEADS),
    ("mistral-window", 8),
    ("qwen3", UNEVEN_MANY),
}
# One of each kind: bias, uneven heads, rope that changes, windows of some layers, dtype.
QUICK_MICRO_BATCHED = {
    "llama-biases",
    "llama-mqa",
    "dynamic-decode-crosses",
    "odd-qwen3",
    "bfloat16",
    "mistral-window-1",
    "qwen2-windowed-layers",
}


def world_name(world: World) -> str:
    return str(world) if isinstance(world, int) else "x".join(f"{share:g}" for share in world)


def run_name(run: tuple[str, World]) -> str:
    name, world = run
    return f"{name}-{world_name(world)}"


RUNS = nightly_but(
    QUICK_RUNS, ((name, world) for name, case in CASES.items() for world in case.worlds), run_name
)


@dataclass(frozen=True)
class Reference:
    """A saved model and what transformers makes of it."""

    path: Path
    prompt: list[int]
    tokens: list[int]
    logits: torch.Tensor  # (T, V), of the prompt


def spread(model: torch.nn.Module) -> None:
    """Draw weights so that all parts of the model tell and greedy tokens are never close."""
    generator = torch.Generator().manual_seed(7)
    for name, weight in model.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.2 * values
        elif name.endswith("bias"):
            values *= 0.2
        elif "embed" in name or "lm_head" in name:
            values *= 1.0 / math.sqrt(weight.shape[1])
        elif "q_proj" in name or "k_proj" in name:  # attention that looks at places, not at all
            values *= 1.4 / math.sqrt(weight.shape[1])
        else:
            values *= 1.0 / math.sqrt(weight.shape[1])
        weight.data.copy_(values)


def save_model(path: Path, case: Case) -> None:
    config_class = getattr(transformers, f"{case.family}Config")
    name = f"{case.family}Model" if case.base_model else f"{case.family}ForCausalLM"
    config = config_class(**{**BASE, **case.options})
    model = getattr(transformers, name)(config)
    spread(model)
    model.to(case.dtype).save_pretrained(path, **case.save)
    make_tokenizer(path)
    (path / "generation_config.json").write_text('{"eos_token_id": []}')
    if case.change is not None:
        case.change(path)


def load_model(path: Path) -> Any:
    # Anew for each use: rope keeps the longest length that it has seen.
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def greedy(
    path: Path, prompt: Sequence[int], count: int = NEW_TOKENS, use_cache: bool = True
) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = load_model(path).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            use_cache=use_cache,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    root = tmp_path_factory.mktemp("families")

    @cache
    def make(name: str) -> Reference:
        case = CASES[name]
        path = root / name
        save_model(path, case)
        generator = torch.Generator().manual_seed(len(name))
        prompt = torch.randint(0, 100, (case.prompt,), generator=generator).tolist()
        with torch.no_grad():
            logits = load_model(path)(torch.tensor([prompt])).logits[0]
        tokens = greedy(path, prompt, use_cache=case.oracle_cache)
        return Reference(path, prompt, tokens, logits)

    return make


def split(world: World) -> dict[str, Any]:
    if isinstance(world, int):
        return {"world_size": world}
    return {"world_size": len(world), "ratio": world}


async def run(engine: Engine, prompt: Sequence[int], count: int = NEW_TOKENS) -> list[int]:
    return (await engine.complete(prompt, SamplingParams(max_tokens=count))).token_ids


@pytest.mark.parametrize(("name", "world"), RUNS)
async def test_equals_transformers(
    reference: Callable[[str], Reference], name: str, world: World
) -> None:
    expected = reference(name)
    store = expected.path / "slices"
    async with memory_engine(
        expected.path, **split(world), chunk_tokens=CHUNK_TOKENS, store=store
    ) as engine:
        logits = await engine.logits(expected.prompt)
        tokens = await run(engine, expected.prompt)
    torch.testing.assert_close(logits, expected.logits)
    assert tokens == expected.tokens


@pytest.mark.parametrize("name", nightly_but(QUICK, CASES))
def test_greedy_choices_are_never_close(reference: Callable[[str], Reference], name: str) -> None:
    best = reference(name).logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 3e-5


@pytest.mark.parametrize(
    ("name", "chunk_tokens"),
    nightly_but(
        # Chunks shorter than the window of 9, and as long.
        {("llama-gqa", 1), ("llama-gqa", 64), ("mistral-window", 5), ("mistral-window", 9)},
        product(("llama-gqa", "llama-mqa", "mistral-window", "dynamic-old"), (1, 5, 9, 64)),
    ),
)
async def test_chunks_of_any_size(
    reference: Callable[[str], Reference], name: str, chunk_tokens: int
) -> None:
    expected = reference(name)
    async with memory_engine(expected.path, 2, chunk_tokens=chunk_tokens) as engine:
        torch.testing.assert_close(await engine.logits(expected.prompt), expected.logits)
        assert await run(engine, expected.prompt) == expected.tokens


@pytest.mark.usefixtures("micro_batched")
@pytest.mark.parametrize(
    ("name", "algorithm"),
    nightly_but(
        {("mistral-window", Algorithm.STAR), ("odd-qwen3", Algorithm.TWO_SHOT)},
        product(("llama-gqa", "mistral-window", "dynamic-old", "odd-qwen3"), Algorithm),
        lambda case: f"{case[0]}-{case[1].value}",
    ),
)
async def test_micro_batches_of_a_chunk_interleaved(
    reference: Callable[[str], Reference], name: str, algorithm: Algorithm
) -> None:
    expected = reference(name)
    for world, chunk_tokens in ((2, 64), (4, 7)):
        async with memory_engine(
            expected.path, world, chunk_tokens=chunk_tokens, collective=algorithm.value, window=3
        ) as engine:
            logits = await engine.logits(expected.prompt)
            torch.testing.assert_close(logits, expected.logits)
            assert await run(engine, expected.prompt) == expected.tokens
            assert torch.equal(await engine.logits(expected.prompt), logits)


@pytest.mark.usefixtures("micro_batched")
@pytest.mark.parametrize("name", [nightly("llama-gqa"), "llama-biases"])
async def test_micro_batches_if_ranks_cut_their_mlps_differently(
    reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(decoder, "ROWS_UNIT", 8)
    monkeypatch.setattr(sharding, "_MLP_PIECE_BYTES", 6000)
    monkeypatch.setattr(sharding, "_PIECE_COLUMNS", 8)
    expected = reference(name)
    got = []
    for window in (None, 2):
        plans: list[Deployment] = []
        async with memory_engine(
            expected.path, 3, ratio=[4, 1, 2], window=window, on_plan=plans.append
        ) as engine:
            blocks = [len(rank.budget.block_bytes) // 3 for rank in plans[0].ranks]
            assert blocks == [1 + 5, 1 + 1, 1 + 2]  # a layer's: attention, pieces of the MLP
            got.append(await engine.logits(expected.prompt))
            torch.testing.assert_close(got[-1], expected.logits)
            assert await run(engine, expected.prompt) == expected.tokens
    assert torch.equal(*got)


@pytest.mark.usefixtures("micro_batched")
@pytest.mark.parametrize("name", nightly_but(QUICK_MICRO_BATCHED, CASES))
async def test_micro_batches_give_the_same_tokens(
    reference: Callable[[str], Reference], name: str
) -> None:
    expected = reference(name)
    async with memory_engine(
        expected.path, 2, chunk_tokens=CHUNK_TOKENS, store=expected.path / "slices"
    ) as engine:
        assert await run(engine, expected.prompt) == expected.tokens


@pytest.mark.parametrize("name", [nightly("llama-gqa"), "mistral-window"])
@pytest.mark.parametrize("halves", [False, True])
async def test_results_of_the_last_tokens_alone(
    reference: Callable[[str], Reference], name: str, halves: bool
) -> None:
    """What is not computed of the last layer is not missed: neither now nor by the next token."""
    expected = reference(name)
    tokens = len(expected.prompt)
    async with decoder_group(expected.path, 2) as group:

        async def step(ids: list[int], start: int, num_logits: int) -> torch.Tensor:
            segment = Segment(0, start, len(ids), num_logits, tokens + 1)
            return await group.run(ids, group.contexts([segment], micro_batches=halves))

        whole = await step(expected.prompt, 0, tokens)
        following = await step([1], tokens, 1)
        for num_logits in range(tokens):
            torch.testing.assert_close(
                await step(expected.prompt, 0, num_logits), whole[tokens - num_logits :]
            )
            torch.testing.assert_close(await step([1], tokens, 1), following)


@pytest.mark.parametrize(
    ("name", "world"),
    nightly_but(
        {("llama-gqa", 1), ("llama-biases", 3)}, product(("llama-gqa", "llama-biases"), (1, 3))
    ),
)
async def test_mlp_in_pieces(
    reference: Callable[[str], Reference],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    world: int,
) -> None:
    monkeypatch.setattr(sharding, "_MLP_PIECE_BYTES", 6000)
    monkeypatch.setattr(sharding, "_PIECE_COLUMNS", 8)
    expected = reference(name)
    got = []
    for window in (None, 3):
        plans: list[Deployment] = []
        async with memory_engine(
            expected.path, world, window=window, store=tmp_path, on_plan=plans.append
        ) as engine:
            layers = 3
            assert len(plans[0].ranks[-1].budget.block_bytes) >= layers * (
                1 + 2
            )  # pieces of the MLP
            got.append(await engine.logits(expected.prompt))
            torch.testing.assert_close(got[-1], expected.logits)
            assert await run(engine, expected.prompt) == expected.tokens
    assert torch.equal(*got)


# -- exact -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "world"),
    nightly_but(
        {("llama-gqa", 2), ("odd-qwen3", 1)},
        product(("llama-gqa", "llama-biases", "odd-qwen3"), (1, 2, 5)),
    ),
)
async def test_streamed_equals_resident_and_rerun(
    reference: Callable[[str], Reference], name: str, world: int
) -> None:
    expected = reference(name)
    store = expected.path / "slices"
    got = []
    for window in (None, None, 2, 3):
        async with memory_engine(
            expected.path, world, window=window, chunk_tokens=CHUNK_TOKENS, store=store
        ) as engine:
            first = await engine.logits(expected.prompt)
            assert await run(engine, expected.prompt) == expected.tokens
            again = await engine.logits(expected.prompt)
        assert torch.equal(first, again), window
        got.append(first)
    assert all(torch.equal(got[0], other) for other in got[1:])


async def test_partly_resident_equals_resident_while_the_cache_grows(
    reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reference("llama-gqa")
    store = expected.path / "slices"
    async with memory_engine(expected.path, 2, chunk_tokens=5, store=store) as engine:
        resident = await engine.logits(expected.prompt)
        sizes = engine.deployment.ranks[0].budget.block_bytes
        whole, block = sum(sizes), max(sizes)
    resident_blocks = set()
    for budget in range(2 * block, whole + block, block):
        monkeypatch.setattr(MemoryBudget, "left_for_weights", fixed_budget(budget))
        async with memory_engine(expected.path, 2, chunk_tokens=5, store=store) as engine:
            resident_blocks.add(len(engine.deployment.ranks[0].streaming.resident))
            try:
                logits = await engine.logits(expected.prompt)
            except MemoryLimitError as exc:
                assert "tokens of context need" in str(exc)  # noqa: PT017
                assert budget < 3 * block
                continue
            assert torch.equal(logits, resident), budget
            assert await run(engine, expected.prompt) == expected.tokens
    assert len(resident_blocks) >= 4


def fixed_budget(total: int) -> Callable[..., int]:
    return lambda _, tokens=None, kv_bytes=0, logits=1: total - kv_bytes


@pytest.mark.parametrize(
    ("world", "algorithm"),
    nightly_but(
        {(4, Algorithm.TWO_SHOT), (UNEVEN_MANY, Algorithm.STAR)},
        product((2, 4, 5, UNEVEN_MANY), Algorithm),
        lambda case: f"{world_name(case[0])}-{case[1].value}",
    ),
)
async def test_all_ranks_hold_identical_bits(
    reference: Callable[[str], Reference],
    monkeypatch: pytest.MonkeyPatch,
    world: World,
    algorithm: Algorithm,
) -> None:
    expected = reference("llama-gqa")
    recorded: dict[int, list[torch.Tensor]] = {}
    monkeypatch.setattr(
        GroupCommunicator, "all_reduce", recording(GroupCommunicator.all_reduce, recorded)
    )
    async with memory_engine(
        expected.path, **split(world), chunk_tokens=CHUNK_TOKENS, collective=algorithm.value
    ) as engine:
        assert await run(engine, expected.prompt) == expected.tokens
    assert len(recorded) == engine.world_size
    chunks = -(-len(expected.prompt) // CHUNK_TOKENS)
    sums = (chunks + NEW_TOKENS - 1) * (2 * 3 - 1)
    for rank in recorded:
        assert len(recorded[rank]) == sums - (chunks - 1)  # no last MLP without a result
        assert all(map(torch.equal, recorded[0], recorded[rank])), rank


def recording(all_reduce: Any, sums: dict[int, list[torch.Tensor]]) -> Any:
    async def recorded(self: Any, *args: Any) -> torch.Tensor:
        total: torch.Tensor = await all_reduce(self, *args)
        sums.setdefault(self.rank, []).append(total.clone())
        return total

    return recorded


# -- cached prefixes ---------------------------------------------------------------------------


def followers(prompt: list[int], tokens: list[int]) -> Iterator[list[int]]:
    """Prompts that share something with what went before."""
    yield prompt  # the very same
    yield [*prompt, *tokens[:-1], 3, 1, 4]  # the next turn
    yield prompt[: len(prompt) // 2]  # only the beginning
    yield [*prompt[:5], 9, *prompt[6:]]  # edited near the start
    yield [*prompt[:-1], 7]
    yield prompt[:1]


@pytest.mark.parametrize(
    "name",
    [
        nightly("llama-gqa"),
        "mistral-window",
        nightly("llama3"),
        nightly("linear"),
        nightly("qwen3"),
        nightly("dynamic-short"),
        "dynamic-decode-crosses",
        nightly("dynamic-prompt-crosses"),
    ],
)
async def test_cached_prefix_equals_fresh_run(
    reference: Callable[[str], Reference], name: str
) -> None:
    expected = reference(name)
    async with memory_engine(expected.path, 2, chunk_tokens=CHUNK_TOKENS) as engine:
        for prompt in followers(expected.prompt, expected.tokens):
            engine.reset()
            await run(engine, expected.prompt)
            reused, logits = await run_with_logits(engine, prompt)
            engine.reset()
            fresh, fresh_logits = await run_with_logits(engine, prompt)
            torch.testing.assert_close(logits, fresh_logits)
            assert reused == fresh == greedy(expected.path, prompt, len(fresh)), len(prompt)


async def run_with_logits(
    engine: Engine, prompt: Sequence[int], count: int = 6
) -> tuple[list[int], torch.Tensor]:
    """Tokens and the logits that they were chosen from."""
    seen: list[torch.Tensor] = []
    choose = Sampler.next

    def recorded(self: Sampler, logits: torch.Tensor, history: Sequence[int]) -> int:
        seen.append(logits.clone())
        return choose(self, logits, history)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "next", recorded)
        tokens = await run(engine, prompt, count)
    return tokens, torch.stack(seen)


async def test_left_prefill_is_not_reused_wrongly(
    reference: Callable[[str], Reference],
) -> None:
    expected = reference("dynamic-prompt-crosses")
    short = expected.prompt[:20]

    class LeftError(Exception):
        pass

    def leave(_: object) -> None:
        raise LeftError

    async with memory_engine(expected.path, 2, chunk_tokens=CHUNK_TOKENS) as engine:
        with pytest.raises(LeftError):
            await engine.complete(expected.prompt, progress=leave)
        tokens, logits = await run_with_logits(engine, short)
        engine.reset()
        fresh, fresh_logits = await run_with_logits(engine, short)
    torch.testing.assert_close(logits, fresh_logits)
    assert tokens == fresh == greedy(expected.path, short, len(fresh))


# -- real processes ----------------------------------------------------------------------------


@pytest.mark.usefixtures("warm_workers")
@pytest.mark.parametrize(
    ("name", "local", "options"),
    [
        ("llama-gqa", 3, {"window": 2}),
        ("qwen3", 2, {"ratio": (3.0, 1.0)}),
    ],
)
async def test_processes_equal_transformers(
    reference: Callable[[str], Reference],
    tmp_path: Path,
    name: str,
    local: int,
    options: dict[str, Any],
) -> None:
    expected = reference(name)
    async with Engine.connect(
        expected.path,
        EngineOptions(store=tmp_path, threads=1, chunk_tokens=CHUNK_TOKENS, **options),
        local=local,
    ) as engine:
        torch.testing.assert_close(await engine.logits(expected.prompt), expected.logits)
        assert await run(engine, expected.prompt) == expected.tokens
