"""The plan and the memory budget: what is advised works, and the plan shown is the plan made."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.nightly import nightly
from tpirt.cluster import machine
from tpirt.cluster.rank import RankRuntime
from tpirt.cluster.roster import machines
from tpirt.collectives.cost_model import Machine
from tpirt.config import ModelConfig
from tpirt.engine import Engine, EngineOptions
from tpirt.errors import ConfigError, MemoryLimitError
from tpirt.model.kv_store import KVNeed
from tpirt.planning import PeerProfile, PlanOptions, advise, plan, plan_model
from tpirt.planning.memory import PROCESS_BYTES, SLACK_BYTES
from tpirt.testing.cluster import memory_engine
from tpirt.testing.models import make_model
from tpirt.types import ProgressCallback, SamplingParams
from tpirt.units import parse_bytes
from tpirt.weights import streamer
from tpirt.weights.reader import read_file
from tpirt.weights.shapes import find_shape
from tpirt.weights.stream_plan import StreamPlan, plan_streaming
from tpirt.weights.streamer import WeightStreamer

MIB = 1 << 20

# A few MiB of weights in blocks of 256 KiB: a limit in whole MiB then leaves some of them out.
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}


def profile(rank: int = 0, **changes: Any) -> PeerProfile:
    peer = PeerProfile(rank, f"pi{rank}", f"host{rank}", None, None, 1, 1, False)
    return replace(peer, **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("planning") / "model", **SIZES)


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {
        "hidden_size": 256,
        "num_key_value_heads": 8,
        "num_hidden_layers": 2,
        "max_position_embeddings": 16_384,
    }
    return make_model(tmp_path_factory.mktemp("planning") / "long", **sizes)


@pytest.fixture(autouse=True)
def known_base(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All ranks are in this process, whose size depends on the tests before: take a fixed one."""
    monkeypatch.setattr(machine, "resident_bytes", lambda: PROCESS_BYTES)
    machine.base_bytes.cache_clear()
    yield
    machine.base_bytes.cache_clear()


@pytest.fixture(scope="module")
def config(model: Path) -> ModelConfig:
    return ModelConfig.from_dir(model)


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"window": 1}, MemoryLimitError, "window 1: at least 2 blocks"),
        ({"memory_bytes": 0}, ConfigError, "memory_bytes: expected a number from 1"),
        ({"chunk_tokens": 0}, ConfigError, "chunk_tokens: expected"),
        ({"threads": 1025}, ConfigError, "threads: expected a number from 1 to 1024, got 1025"),
        ({"dtype": "float16"}, ConfigError, "dtype 'float16': expected auto, float32"),
        ({"quantize": "int3"}, ConfigError, "int3"),
        ({"kv": "int3"}, ConfigError, "kv 'int3': expected auto or int8"),
        ({"collective": "ring"}, ConfigError, "collective 'ring': expected one of"),
        ({"comm_dtype": "fp8"}, ConfigError, "comm_dtype 'fp8': expected one of"),
        ({"timeout_s": 0.0}, ConfigError, "timeout_s: expected"),
        ({"timeout_s": float("nan")}, ConfigError, "timeout_s: expected"),
    ],
)
def test_options_are_validated_when_made(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=re.escape(text)):
        EngineOptions(**options)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ({"local": 0}, "local 0: expected at least 1 rank"),
        ({"local": 2, "peers": ["pi:50051"]}, "local and peers exclude each other"),
    ],
)
async def test_ranks_are_local_or_peers(where: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        async with Engine.connect(**where):
            pytest.fail("loaded")


# -- limits and chunks -------------------------------------------------------------------------


def test_a_peers_own_limit_bounds_its_chunks(config: ModelConfig) -> None:
    tight = PlanOptions(memory_bytes=342 * MIB)
    with_limit = plan(config, [profile(), profile(1, memory_bytes=342 * MIB)], PlanOptions())
    assert with_limit.chunk_tokens == plan(config, [profile(), profile(1)], tight).chunk_tokens
    assert (
        with_limit.chunk_tokens < plan(config, [profile(), profile(1)], PlanOptions()).chunk_tokens
    )


def test_ranks_of_one_machine_share_its_free_memory(config: ModelConfig) -> None:
    free = 1000 * MIB
    peers = [
        profile(0, host_id="a", available_bytes=free),
        profile(1, host_id="a", available_bytes=free),
        profile(2, host_id="b", available_bytes=free),
        profile(3, host_id="c", available_bytes=free, memory_bytes=400 * MIB),
    ]
    limits = [each.memory_bytes for each in plan(config, peers, PlanOptions()).limits]
    assert limits == [425 * MIB, 425 * MIB, 850 * MIB, 400 * MIB]
    asked = plan(config, peers, PlanOptions(memory_bytes=500 * MIB)).limits
    assert [each.memory_bytes for each in asked] == [500 * MIB] * 3 + [400 * MIB]


def test_containers_of_one_machine_share_its_cores_but_not_their_memory(
    config: ModelConfig,
) -> None:
    peers = [
        profile(0, host_id="a/1", available_bytes=1000 * MIB, cores=4),
        profile(1, host_id="a/2", available_bytes=1000 * MIB, cores=4),
        profile(2, host_id="b", available_bytes=1000 * MIB),
    ]
    limits = [each.memory_bytes for each in plan(config, peers, PlanOptions()).limits]
    assert limits == [850 * MIB] * 3
    assert machines(peers) == [Machine((0, 1), 4), Machine((2,), 1)]


def test_ahead_of_time_there_are_no_limits(config: ModelConfig) -> None:
    deployment = plan_model(
        config, 3, profile(available_bytes=1, memory_bytes=1), PlanOptions(ratio=[2, 1, 1])
    )
    assert [rank.held for rank in deployment.ranks] == ["resident"] * 3
    assert [rank.limits.memory_bytes for rank in deployment.ranks] == [None] * 3
    assert deployment.ranks[0].shard.q_heads.size == 2 * deployment.ranks[1].shard.q_heads.size


# -- advice ------------------------------------------------------------------------------------


def refused(config: ModelConfig, peers: list[PeerProfile], options: PlanOptions) -> str:
    with pytest.raises(MemoryLimitError) as caught:
        plan(config, peers, options)
    return str(caught.value)


def test_every_limit_that_is_too_low_is_named(config: ModelConfig) -> None:
    peers = [profile(), profile(1, memory_bytes=60 * MIB), profile(2, memory_bytes=900 * MIB)]
    text = refused(config, peers, PlanOptions(memory_bytes=50 * MIB))
    assert text.startswith("rank 0 (pi0): its memory limit of 50 MiB is too low: the process needs")
    common, own = re.findall(r"raise --memory(?: of (?:\w+))? to (\w+)", text)
    assert "--memory of pi1 to" in text
    assert "pi2" not in text
    peers[1] = profile(1, memory_bytes=parse_bytes(own))
    deployment = plan(config, peers, PlanOptions(memory_bytes=parse_bytes(common)))
    assert deployment.world_size == 3


def test_too_little_free_memory_is_named(config: ModelConfig) -> None:
    peers = [profile(available_bytes=356 * MIB)]  # of which 302 are taken unasked
    text = refused(config, peers, PlanOptions())
    assert "free memory on its machine, raise its container's limit, or set --memory to" in text
    advised = parse_bytes(text.rpartition(" ")[2])
    plan(config, peers, PlanOptions(memory_bytes=advised))


@pytest.mark.parametrize("asked", [None, 50 * MIB])
def test_no_limit_is_advised_that_a_machine_does_not_have(
    config: ModelConfig, asked: int | None
) -> None:
    small = {"host_id": "small", "available_bytes": 400 * MIB}  # for both
    peers = [profile(), profile(1, **small), profile(2, memory_bytes=60 * MIB, **small)]
    text = refused(config, peers, PlanOptions(memory_bytes=asked))
    assert "its machine or container has 200 MiB free: end other programs" in text
    assert "raise --memory" not in text


def test_no_limit_is_advised_for_a_context_that_a_machine_does_not_have(
    long_model: Path,
) -> None:
    peers = [profile(), profile(1, available_bytes=414 * MIB, memory_bytes=352 * MIB)]
    deployment = plan(ModelConfig.from_dir(long_model), peers, PlanOptions())
    deployment.check_context(500)
    with pytest.raises(MemoryLimitError, match=r"has 414 MiB free: end .* or shorten") as caught:
        deployment.check_context(16_000)
    assert "raise --memory" not in str(caught.value)


def test_a_higher_limit_never_holds_less(config: ModelConfig) -> None:
    """Longer steps, which a higher limit selects, do not count while tokens are generated."""
    ranks = [
        plan(config, [profile()], PlanOptions(memory_bytes=limit * MIB)).ranks[0]
        for limit in range(341, 416)
    ]
    assert len({rank.limits.chunk_tokens for rank in ranks}) > 2
    held = [
        (rank.budget.fits, rank.held == "resident", len(rank.decoding.resident)) for rank in ranks
    ]
    assert held == sorted(held)
    assert {fits for fits, *_ in held} == {False, True}


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        nightly(1, {}),
        nightly(1, {"dtype": "bfloat16", "chunk_tokens": 40}),
        nightly(2, {"window": 3, "chunk_tokens": 64}),
        (3, {"ratio": [4.0, 1.0, 2.0]}),
        nightly(4, {"quantize": "int8", "chunk_tokens": 256}),
    ],
)
async def test_advice_works_at_the_first_try(
    model: Path,
    tmp_path: Path,
    world_size: int,
    options: dict[str, Any],
) -> None:
    options = {**options, "store": tmp_path}
    with pytest.raises(MemoryLimitError) as caught:
        async with memory_engine(model, world_size, memory_bytes=MIB, **options):
            pytest.fail("loaded")
    advised = parse_bytes(str(caught.value).rpartition(" ")[2])
    async with memory_engine(model, world_size, memory_bytes=advised, **options) as engine:
        await engine.complete([7] * 400, SamplingParams(max_tokens=3))


@pytest.mark.parametrize("ratio", [nightly(None), (1.0, 3.0)])
async def test_advice_for_a_long_prompt_works_at_the_first_try(
    long_model: Path, tmp_path: Path, ratio: tuple[float, ...] | None
) -> None:
    prompt = [7] * 3500
    options = {"store": tmp_path, "ratio": ratio}
    low = PlanOptions(memory_bytes=1, ratio=ratio)
    text = refused(ModelConfig.from_dir(long_model), [profile()] * 2, low)
    limit = parse_bytes(text.rpartition(" ")[2])
    async with memory_engine(long_model, 2, memory_bytes=limit, **options) as engine:
        with pytest.raises(MemoryLimitError, match="tokens of context need") as caught:
            await engine.complete(prompt, SamplingParams(max_tokens=1))
        await engine.complete(prompt[:500], SamplingParams(max_tokens=1))
    advised = re.search(r"--memory to (\w+)", str(caught.value))
    assert advised is not None
    limit = parse_bytes(advised[1])
    async with memory_engine(long_model, 2, memory_bytes=limit, **options) as engine:
        await engine.complete(prompt, SamplingParams(max_tokens=1))


def test_a_context_that_one_peer_cannot_hold_is_refused(long_model: Path) -> None:
    config = ModelConfig.from_dir(long_model)
    peers = [profile(), profile(1, memory_bytes=352 * MIB)]
    deployment = plan(config, peers, PlanOptions(memory_bytes=400 * MIB))
    deployment.check_context(500)
    with pytest.raises(MemoryLimitError, match=r"on rank 1 \(pi1\), whose .* is 352 MiB") as caught:
        deployment.check_context(12_000)
    common, own = map(parse_bytes, re.findall(r"to (\w+M)", str(caught.value)))
    peers[1] = profile(1, memory_bytes=own)
    plan(config, peers, PlanOptions(memory_bytes=common)).check_context(12_000)


async def test_a_prompt_is_refused_before_its_first_step_or_runs(long_model: Path) -> None:
    """The lowest limit that is said to hold a prompt does; one MiB less is refused at once."""
    config = ModelConfig.from_dir(long_model)
    prompt = [1 + i % 250 for i in range(700)]

    def holds(limit: int) -> bool:
        options = PlanOptions(memory_bytes=limit, chunk_tokens=64, dtype="float32")
        return plan(config, [profile()], options).ranks[0].budget.holds(len(prompt))

    low, high = 344, 1024
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle * MIB) else (middle, high)
    options: dict[str, Any] = {"chunk_tokens": 64}
    async with memory_engine(long_model, memory_bytes=high * MIB, **options) as engine:
        await engine.complete(prompt, SamplingParams(max_tokens=1))
    async with memory_engine(long_model, memory_bytes=low * MIB, **options) as engine:
        with pytest.raises(MemoryLimitError, match="700 tokens of context need"):
            await engine.complete(prompt, SamplingParams(max_tokens=1))
        assert engine.cached_tokens == 0
        await engine.complete(prompt[:100], SamplingParams(max_tokens=1))


def test_a_context_that_was_asked_for(long_model: Path) -> None:
    config = ModelConfig.from_dir(long_model)
    whole = plan(config, [profile()], PlanOptions())
    assert whole.context_length == config.context_length
    short = plan(config, [profile()], PlanOptions(context=8))
    assert (short.context_length, short.chunk_tokens) == (8, 8)
    assert any("conversations of up to 8 tokens" in line for line in short.explain())
    with pytest.raises(ConfigError, match=f"has at most {config.context_length} tokens"):
        plan(config, [profile()], PlanOptions(context=config.context_length + 1))
    with pytest.raises(ConfigError, match="context: expected a number from 1"):
        PlanOptions(context=0)


@pytest.mark.parametrize("limit", [1, 366 * MIB])
def test_memory_for_the_whole_context_is_asked_for_at_once(long_model: Path, limit: int) -> None:
    config = ModelConfig.from_dir(long_model)
    text = refused(config, [profile()], PlanOptions(memory_bytes=limit, context=12_000))
    advised = re.search(r"--memory to (\w+)", text)
    assert advised is not None
    assert limit == 1 or "give a lower --context" in text
    enough = PlanOptions(memory_bytes=parse_bytes(advised[1]), context=12_000)
    plan(config, [profile()], enough).check_context(12_000)


def test_keys_and_values_in_int8_are_counted_as_such(long_model: Path) -> None:
    config = ModelConfig.from_dir(long_model)
    limit, context = 400 * MIB, 12_000
    options = PlanOptions(memory_bytes=limit, dtype="bfloat16", chunk_tokens=64)
    whole, rounded = (
        plan(config, [profile(), profile(1)], replace(options, kv=kv)) for kv in ("auto", "int8")
    )
    assert rounded.world_size == 2
    for before, after in zip(whole.ranks, rounded.ranks, strict=True):
        smaller = (config.head_dim + 2) / (2 * config.head_dim)
        restored = 2 * 2 * context * config.head_dim * before.shard.kv_heads.size
        least = before.budget.kv_bytes(context) * smaller
        assert least <= after.budget.kv_bytes(context) <= least + restored
        assert after.budget.advised_bytes(context) < before.budget.advised_bytes(context)
    assert any("KV cache per rank, in bfloat16" in line for line in whole.explain())
    assert any("KV cache per rank, in int8" in line for line in rounded.explain())
    longest = [replace(each, context_length=1 << 20).usable_context for each in (whole, rounded)]
    assert longest[1] > 1.3 * longest[0]


def test_the_usable_context_is_the_longest_that_fits(long_model: Path) -> None:
    config = ModelConfig.from_dir(long_model)
    assert plan(config, [profile()], PlanOptions()).usable_context == config.context_length
    limited = plan(config, [profile()], PlanOptions(memory_bytes=366 * MIB))
    longest = limited.usable_context
    assert 0 < longest < config.context_length
    limited.check_context(longest)
    with pytest.raises(MemoryLimitError):
        limited.check_context(longest + 1)
    assert any(f"conversations of up to {longest} tokens" in line for line in limited.explain())


def test_every_limit_above_the_advised_one_works(long_model: Path) -> None:
    """A higher limit brings longer steps, which must not take what the conversation needs."""
    config = ModelConfig.from_dir(long_model)
    chunks = set()
    for context in (100, 3000, 12_000):
        options = PlanOptions(chunk_tokens=16)
        advised = plan_model(config, 1, profile(), options).ranks[0].budget.advised_bytes(context)
        for limit in range(advised, advised + 64 * MIB, MIB):
            deployment = plan(config, [profile()], PlanOptions(memory_bytes=limit))
            chunks.add(deployment.chunk_tokens)
            budget = deployment.ranks[0].budget
            left = budget.left_for_weights(kv_bytes=budget.kv_bytes(context))
            assert left is not None
            plan_streaming(budget.block_bytes, None, left)
    assert len(chunks) > 1


@pytest.mark.parametrize(
    ("options", "fast", "stored", "run"),
    [
        ({}, True, torch.float16, torch.bfloat16),
        ({}, False, torch.float32, torch.float32),
        ({"dtype": "bfloat16"}, True, torch.bfloat16, torch.bfloat16),
        ({"dtype": "float32"}, True, torch.float32, torch.float32),
        ({"quantize": "int4"}, True, torch.bfloat16, torch.bfloat16),
    ],
)
def test_weights_stay_in_float16_and_nothing_else_is(
    options: dict[str, str], fast: bool, stored: torch.dtype, run: torch.dtype
) -> None:
    config = replace(llama("llama-3.2-1b"), dtype="float16")
    (rank,) = plan(config, [profile(bfloat16=fast)], PlanOptions(**options)).ranks
    assert (rank.form.dtype, rank.form.run_dtype) == (stored, run)


# -- quantization that fits --------------------------------------------------------------------


def llama(name: str) -> ModelConfig:
    return ModelConfig.from_hf(find_shape(name))


@pytest.mark.parametrize(
    ("gigabytes", "chosen", "reason"),
    [
        (None, "none", "all weights fit in memory"),
        (16, "none", "all weights fit in memory"),
        (9, "int8", "14 GiB in bfloat16 do not fit rank 0"),
        (6, "int4", "7 GiB in int8 do not fit rank 0"),
        (3, "int4", "the smallest, yet 4.23 GiB in int4 do not fit rank 0"),
    ],
)
def test_auto_takes_the_first_quantization_that_fits(
    gigabytes: int | None, chosen: str, reason: str
) -> None:
    limit = None if gigabytes is None else gigabytes << 30
    options = PlanOptions(quantize="auto", memory_bytes=limit)
    deployment = plan(llama("llama-3.1-8b"), [profile(bfloat16=True)], options)
    assert (str(deployment.quant.spec), deployment.quant.reason) == (chosen, reason)
    (rank,) = deployment.ranks
    assert rank.form.quant == deployment.quant.spec
    assert (rank.held == "resident") is (gigabytes != 3)


def test_auto_depends_on_the_rank_with_the_least_memory() -> None:
    peers = [profile(bfloat16=True), profile(1, bfloat16=True, memory_bytes=5 << 30)]
    deployment = plan(llama("llama-3.1-8b"), peers, PlanOptions(quantize="auto"))
    assert deployment.quant.reason == "6.5 GiB in bfloat16 do not fit rank 1"
    assert {str(rank.form.quant) for rank in deployment.ranks} == {"int8"}


def test_ahead_of_time_auto_has_nothing_to_choose_by(config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="quantize 'auto' depends on the memory of the peers"):
        plan_model(config, 1, profile(), PlanOptions(quantize="auto"))


async def test_what_auto_chose_is_what_runs(model: Path) -> None:
    needed = plan_model(ModelConfig.from_dir(model), 1, profile(), PlanOptions(chunk_tokens=16))
    memory = needed.ranks[0].budget.resident_bytes - MIB
    options = {"memory_bytes": memory, "chunk_tokens": 16, "quantize": "auto"}
    async with memory_engine(model, **options) as engine:
        assert str(engine.deployment.quant.spec) == "int8"
        await engine.complete([7] * 8, SamplingParams(max_tokens=2))


@pytest.mark.parametrize(
    ("gigabytes", "changes", "lines"),
    [
        (16, {"bfloat16": True}, []),
        (
            6,
            {"bfloat16": True},
            [
                r"memory is short: rank 0 \(pi0\) needs 14\.\d GiB .* may use 6 GiB; .*",
                r"try --quantize int4: 4.23 GiB of weights instead of 14 GiB on rank 0, all .*",
            ],
        ),
        (
            64,
            {},
            [
                "weights in bfloat16 take twice their size, as float32: no fast bfloat16 on pi0",
                "try --quantize int8: 7 GiB of weights instead of 28 GiB on rank 0, all .*",
            ],
        ),
        (
            3,
            {},
            [
                "memory is short: .*",
                "weights in bfloat16 take twice .*",
                r"try --quantize int4: 4.23 GiB of weights instead of .*, so that less is read",
            ],
        ),
    ],
)
def test_what_a_large_model_takes_is_said_with_an_option(
    gigabytes: int, changes: dict[str, Any], lines: list[str]
) -> None:
    options = PlanOptions(memory_bytes=gigabytes << 30)
    advice = advise(plan(llama("llama-3.1-8b"), [profile(**changes)], options))
    assert len(advice) == len(lines)
    for line, pattern in zip(advice, lines, strict=True):
        assert re.fullmatch(pattern, line), line


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"quantize": "auto"}])
def test_who_chose_float32_is_not_advised(options: dict[str, str]) -> None:
    assert advise(plan(llama("llama-3.2-1b"), [profile()], PlanOptions(**options))) == []


def test_float32_of_a_small_model_is_not_worth_a_line(config: ModelConfig) -> None:
    config = replace(config, dtype="bfloat16")
    assert advise(plan(config, [profile()], PlanOptions())) == []


def test_with_the_smallest_weights_other_peers_are_advised() -> None:
    options = PlanOptions(memory_bytes=3 << 30, quantize="int4")
    advice = advise(plan(llama("llama-3.1-8b"), [profile()], options))
    assert advice[-1] == "more peers would share the weights; a smaller model would fit"


@pytest.mark.parametrize(
    ("own", "advised"),
    [(None, r"raise --memory to \d+M"), (3 << 30, r"raise --memory of pi0 to \d+M")],
)
def test_a_limit_that_is_lower_than_need_be_is_said(own: int | None, advised: str) -> None:
    """What is advised keeps all weights in memory."""
    options = PlanOptions(memory_bytes=3 << 30, quantize="int4")
    peers = [profile(available_bytes=8 << 30, memory_bytes=own)]
    advice = advise(plan(llama("llama-3.1-8b"), peers, options))
    assert re.fullmatch(advised, advice[-1])
    limit = parse_bytes(advice[-1].rpartition(" ")[2])
    enough = replace(options, memory_bytes=limit)
    assert advise(plan(llama("llama-3.1-8b"), [replace(peers[0], memory_bytes=None)], enough)) == []
    peers = [profile(available_bytes=limit - (1 << 20))]
    assert "--memory" not in advise(plan(llama("llama-3.1-8b"), peers, options))[-1]


@pytest.mark.parametrize("master", [4 << 30, 5 << 30, 2 << 30])
def test_shares_with_which_all_weights_are_in_memory_are_advised(master: int) -> None:
    """The least uneven ones; none if memory is too short for all weights."""
    peers = [profile(memory_bytes=master), *(profile(r, memory_bytes=1500 << 20) for r in (1, 2))]
    options = PlanOptions(quantize="int4")
    *_, advice = advise(plan(llama("llama-3.1-8b"), peers, options))
    if master == 2 << 30:
        assert "--ratio" not in advice
        return
    found = re.fullmatch(r"try --ratio ([\d,]+): all weights in memory", advice)
    assert found is not None
    ratio = tuple(map(float, found[1].split(",")))
    assert ratio[0] <= 4
    enough = plan(llama("llama-3.1-8b"), peers, replace(options, ratio=ratio))
    assert advise(enough) == []


# -- the plan shown is the plan made -----------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("world_size", [nightly(1), 3])
async def test_ranks_hold_what_the_plan_says(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    world_size: int,
    window: int | None,
) -> None:
    held: dict[int, list[StreamPlan]] = {}
    load = RankRuntime.load

    async def recorded(self: RankRuntime, progress: ProgressCallback) -> None:
        held.setdefault(self.comm.rank, []).append(self.streamer.plan)
        await load(self, progress)

    monkeypatch.setattr(RankRuntime, "load", recorded)
    kinds = set()
    for spare in (8, 24, 48):
        limit = PROCESS_BYTES + SLACK_BYTES + spare * MIB
        held.clear()
        async with memory_engine(
            model,
            world_size,
            memory_bytes=limit,
            window=window,
            store=tmp_path,
            ratio=[3, 1, 2][:world_size],
        ) as engine:
            plans = [rank.streaming for rank in engine.deployment.ranks]
        assert [held[rank] for rank in range(world_size)] == [[each] for each in plans]
        kinds |= {(each.slots, len(each.resident)) for each in plans}
    assert len(kinds) > 1 or window is not None


# -- memory given back -------------------------------------------------------------------------


async def test_weights_use_the_memory_of_a_prompt_once_it_is_computed(
    model: Path, tmp_path: Path
) -> None:
    async with memory_engine(
        model, 1, memory_bytes=PROCESS_BYTES + SLACK_BYTES + 20 * MIB, store=tmp_path
    ) as engine:
        rank = engine.deployment.ranks[0]
        sizes, resident = rank.budget.block_bytes, rank.streaming.resident
        streamed = sum(sizes) - sum(sizes[i] for i in resident)  # by each step of the prompt
        await engine.complete([7] * 300, SamplingParams(max_tokens=2))
        answer = await engine.complete([7] * 300, SamplingParams(max_tokens=10))
        assert 0 < answer.ranks[0].bytes_read < 9 * streamed  # in ten steps


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planning") / "deep"
    return make_model(path, max_position_embeddings=4096, **SIZES)


def just_enough(path: Path, world_size: int) -> int:
    """A limit under which all weights stay in memory during a short conversation only."""
    options = PlanOptions(dtype="float32", chunk_tokens=64)
    deployment = plan_model(ModelConfig.from_dir(path), world_size, profile(), options)
    budgets = [rank.budget for rank in deployment.ranks]
    needed = (b.process_bytes + b.step_bytes() + b.kv_bytes(64) + b.weights_bytes for b in budgets)
    return PROCESS_BYTES - budgets[0].base_bytes + max(needed)


@pytest.mark.nightly
@pytest.mark.parametrize("world_size", [1, 2])
async def test_reset_gives_the_memory_of_a_conversation_back(
    deep_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    reads: list[Path] = []
    since: list[int] = []  # how many reads there were when a rank changed its budget
    set_budget = WeightStreamer.set_budget

    def noted(path: Path, target: memoryview, nbytes: int) -> None:
        reads.append(path)
        read_file(path, target, nbytes)

    async def marked(self: WeightStreamer, budget_bytes: int) -> None:
        before = self.plan
        await set_budget(self, budget_bytes)  # nothing is being read
        if self.plan != before:
            since.append(len(reads))

    monkeypatch.setattr(streamer, "read_file", noted)
    short, params = [7] * 20, SamplingParams(max_tokens=3)
    async with memory_engine(
        deep_model,
        world_size,
        memory_bytes=just_enough(deep_model, world_size),
        chunk_tokens=64,
        store=tmp_path,
    ) as engine:
        first = await engine.complete(short, params)
        assert [rank.bytes_read for rank in first.ranks] == [0] * world_size
        long = await engine.complete([7] * 2000, params)
        assert all(rank.steps[-1].io_ms > 0 for rank in long.ranks)  # decoding reads weights
        assert all(rank.bytes_read > 0 for rank in long.ranks)
        monkeypatch.setattr(WeightStreamer, "set_budget", marked)
        engine.reset()
        await engine.complete(short, params)
        last = await engine.complete(short, params)
        assert [rank.bytes_read for rank in last.ranks] == [0] * world_size
        assert last.token_ids == first.token_ids
    if world_size == 1:  # of several ranks, one reads already while the next one changes
        assert max(Counter(reads[since[0] :]).values()) == 1


def test_a_draft_model_is_part_of_the_process(config: ModelConfig) -> None:
    """Whatever it takes, the limit that is advised is enough for both."""
    beside = replace(profile(), reserved_bytes=500 * MIB)
    text = refused(config, [beside], PlanOptions(memory_bytes=MIB))
    assert "with 500 MiB of a draft model" in text
    advised = parse_bytes(text.rpartition(" ")[2])
    alone = refused(config, [profile()], PlanOptions(memory_bytes=MIB))
    assert advised == parse_bytes(alone.rpartition(" ")[2]) + 500 * MIB
    plan(config, [beside], PlanOptions(memory_bytes=advised))


def test_positions_in_memory_can_have_a_limit(config: ModelConfig) -> None:
    deployment = plan(config, [profile()], PlanOptions(kv_tokens=128))
    room = [
        deployment.has_room(KVNeed(held, held, (1,)), 1, displacing=displacing)
        for held in (128, 192, 256)
        for displacing in (False, True)
    ]
    assert room == [True, True, True, True, False, False]
    with pytest.raises(ConfigError, match="kv_tokens"):
        PlanOptions(kv_tokens=0)
