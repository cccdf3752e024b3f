"""Many sequences in one step, with and without guesses: each answers as it does alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.kernels import multiply_few_rows_in_c
from tests.support.nightly import nightly_but
from tests.support.steps import take_free_rows
from tpirt.engine import Engine
from tpirt.engine.model import BUNDLED_MODEL
from tpirt.engine.sampler import Sampler
from tpirt.errors import CheckpointError, ConfigError, QueueFullError
from tpirt.model.decoder import Decoder
from tpirt.testing.cluster import memory_engine
from tpirt.testing.drafters import KnownAnswers
from tpirt.testing.models import make_model
from tpirt.types import Completion, Progress, SamplingParams

SYSTEM = [(7 * i) % 200 + 3 for i in range(40)]  # a prefix that many prompts have
PROMPTS = [
    tuple(SYSTEM[: 40 * (n % 2)] + [(n * n + 3 * i) % 250 + 3 for i in range(length)])
    for n, length in enumerate((1, 2, 5, 9, 17, 30, 50, 70, 3, 40, 11, 64, 20, 7, 33, 25))
]
PARAMS = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny", "llama")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def alone(model: Path, store: Path) -> dict[tuple[int, ...], list[int]]:
    """The answer of each prompt by itself, on one rank, without guesses."""

    async def answers() -> dict[tuple[int, ...], list[int]]:
        found = {}
        async with memory_engine(model, store=store, draft="none") as engine:
            for prompt in PROMPTS:
                found[prompt] = (await engine.complete(prompt, PARAMS)).token_ids
                engine.reset()
        return found

    return asyncio.run(answers())


@asynccontextmanager
async def connected(model: Path, world_size: int, **options: Any) -> AsyncIterator[Engine]:
    tasks = asyncio.all_tasks()
    async with memory_engine(model, world_size, chunk_tokens=32, **options) as engine:
        yield engine
    assert asyncio.all_tasks() == tasks


async def ask(
    engine: Engine, choice: random.Random, alone: dict[tuple[int, ...], list[int]]
) -> None:
    """Send a request some time later, read it or leave it, and compare what came."""
    prompt = choice.choice(PROMPTS)
    for _ in range(choice.choice([0, 0, 3, 20])):
        await asyncio.sleep(0)
    wanted = choice.choice([12, 12, 12, 1, 5])
    tokens = []
    request = engine.generate(
        prompt, PARAMS, user=choice.choice("ab"), priority=choice.randrange(2)
    )
    async with aclosing(request):
        async for token in request:
            tokens.append(token.id)
            if choice.random() < 0.1:
                await asyncio.sleep(0.001)
            if len(tokens) == wanted:
                break
    assert tokens == alone[prompt][: len(tokens)]
    assert len(tokens) == wanted or wanted == 12


@pytest.mark.parametrize(
    ("world_size", "window", "draft"),
    nightly_but(
        {
            *((1, None, "none"), (1, 2, "right"), (2, None, "right"), (2, 2, "suffix")),
            *((3, 2, "right"), (3, None, "suffix"), (5, None, "right")),
        },
        product((1, 2, 3, 5), (None, 2), ("none", "right", "suffix")),
    ),
)
async def test_answers_are_those_given_alone(
    model: Path,
    store: Path,
    alone: dict[tuple[int, ...], list[int]],
    world_size: int,
    window: int | None,
    draft: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random schedules: up to 16 at once, prompts that come in the middle, some left early."""
    take_free_rows(monkeypatch)
    chosen: Any = KnownAnswers(alone, 0.8) if draft == "right" else draft
    options = {"store": store, "window": window, "draft": chosen, "sequences": 5}
    async with connected(model, world_size, **options) as engine:
        for seed, count in enumerate((1, 4, 16)):
            choice = random.Random(seed)
            async with asyncio.TaskGroup() as tasks:
                for _ in range(count):
                    tasks.create_task(ask(engine, random.Random(choice.random()), alone))
            assert engine.broken is None
        if draft == "right":
            stats = engine.draft_stats
            assert stats is not None
            assert stats.right > 20
            assert stats.right <= stats.hit["known"] <= stats.tested["known"]
            assert min(stats.seconds, stats.predicted_s) > 0
        engine.reset()
        assert engine.cached_tokens == 0


@pytest.mark.parametrize(
    ("world_size", "quantize", "draft"),
    nightly_but(
        {(2, "none", "suffix")},
        product((1, 2), ("none", "int4"), ("none", "suffix")),
    ),
)
async def test_sampled_answers_do_not_change_while_prompts_are_computed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    world_size: int,
    quantize: str,
    draft: str,
) -> None:
    """Prompts come one by one, and are multiplied by torch; answers go on in C."""
    multiply_few_rows_in_c(monkeypatch)
    take_free_rows(monkeypatch)
    sizes = {"hidden_size": 128, "intermediate_size": 352}  # heads of 16
    model = make_model(tmp_path / "model", "llama", dtype=torch.bfloat16, **sizes)
    prompts = [[(7 * n + 3 * i * i) % 250 + 3 for i in range(25 + n)] for n in range(17)]
    options = {"dtype": "bfloat16", "quantize": quantize, "store": tmp_path / "store"}
    logits, rows = Decoder.logits, [0]

    async def counted(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return await logits(decoder, hidden)

    async def ask(engine: Engine, number: int, begun: asyncio.Event) -> list[int]:
        params = SamplingParams(max_tokens=24, temperature=1.0, seed=number)
        tokens = []
        async for token in engine.generate(prompts[number], params):
            tokens.append(token.id)
            begun.set()
        return tokens

    async with memory_engine(model, world_size, draft="none", **options) as engine:
        alone = [await ask(engine, number, asyncio.Event()) for number in range(len(prompts))]
    monkeypatch.setattr(Decoder, "logits", counted)
    async with memory_engine(model, world_size, draft=draft, **options) as engine:
        async with asyncio.TaskGroup() as tasks:
            asked = []
            for number in range(len(prompts)):
                begun = asyncio.Event()
                asked.append(tasks.create_task(ask(engine, number, begun)))
                await begun.wait()
        assert [answer.result() for answer in asked] == alone
    assert max(rows) <= 16


async def test_a_prefix_that_several_prompts_have_is_computed_once(
    model: Path, alone: dict[tuple[int, ...], list[int]]
) -> None:
    """Also if they come at once; and it is copied, so that each goes on by itself."""
    async with connected(model, 2, draft="none") as engine:
        totals: list[int] = []

        def progress(report: Progress) -> None:
            if report.done == report.total:
                totals.append(report.total)

        shared = [prompt for prompt in PROMPTS if prompt[:40] == tuple(SYSTEM)]
        requests = (engine.complete(prompt, PARAMS, progress) for prompt in shared)
        for prompt, answer in zip(shared, await asyncio.gather(*requests), strict=True):
            assert answer.token_ids == alone[prompt]
        assert sum(totals) == sum(map(len, shared)) - 40 * (len(shared) - 1)


async def test_more_requests_than_may_wait_are_refused(
    model: Path, alone: dict[tuple[int, ...], list[int]]
) -> None:
    async with connected(model, 1, sequences=2, waiting=1) as engine:
        requests = (engine.complete(prompt, PARAMS) for prompt in PROMPTS[:4])
        *served, refused = await asyncio.gather(*requests, return_exceptions=True)
        for prompt, answer in zip(PROMPTS, served, strict=False):
            assert isinstance(answer, Completion)
            assert answer.token_ids == alone[prompt]
        assert isinstance(refused, QueueFullError)
        assert "3 requests are under way, and at most 2 run and 1 wait" in str(refused)
        assert (await engine.complete(PROMPTS[3], PARAMS)).token_ids == alone[PROMPTS[3]]


async def test_a_small_model_guesses(
    model: Path,
    tmp_path: Path,
    alone: dict[tuple[int, ...], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model itself is always right; another one hardly ever. Neither changes a token."""
    take_free_rows(monkeypatch)
    other = make_model(tmp_path / "small", "llama", seed=5)
    for draft, right in ((model, True), (other, False)):
        async with connected(model, 2, draft=draft) as engine:
            requests = (engine.complete(prompt, PARAMS) for prompt in PROMPTS[3:7])
            for prompt, answer in zip(PROMPTS[3:], await asyncio.gather(*requests), strict=False):
                assert answer.token_ids == alone[prompt]
                if right:
                    assert answer.right_guesses > 0
        assert engine.explain_drafts().startswith("drafts: ")


async def test_a_small_model_keeps_to_its_memory(
    model: Path, alone: dict[tuple[int, ...], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more answers, at once and one after another, than it has room for."""
    take_free_rows(monkeypatch)
    monkeypatch.setattr("tpirt.engine.drafts.model.ADVISED_CONTEXT", 64)
    async with connected(model, 1, draft=model) as engine:
        assert engine._driver._drafts is not None
        small: Any = engine._driver._drafts._drafter
        kv = small._engine._group.runtime.decoder.kv
        for some in (PROMPTS[:1], PROMPTS[1:2], PROMPTS[2:3], PROMPTS[4:]):
            requests = (engine.complete(prompt, PARAMS) for prompt in some)
            for prompt, answer in zip(some, await asyncio.gather(*requests), strict=True):
                assert answer.token_ids == alone[prompt]
                assert 0 < kv._capacity <= 128
        assert engine.draft_stats is not None
        assert engine.draft_stats.right > 0
        engine.reset()
        await small._engine.complete([5], SamplingParams(max_tokens=1))
        assert kv._capacity <= 64


async def test_first_tokens_of_others_are_no_merit_of_guesses(
    model: Path, alone: dict[tuple[int, ...], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer has guesses; meanwhile prompts come and go."""
    take_free_rows(monkeypatch, 64)
    drafter: Any = KnownAnswers(alone, 1.0, told=True)
    first = SamplingParams(max_tokens=1)
    async with memory_engine(model, 1, draft=drafter, sequences=2) as engine:
        others = (engine.complete(prompt, first) for prompt in PROMPTS[4:12])
        done, *_ = await asyncio.gather(engine.complete(PROMPTS[3], PARAMS), *others)
        stats = engine.draft_stats
        assert stats is not None
        assert stats.tokens == stats.steps + done.right_guesses
        assert done.right_guesses > 3


async def test_a_draft_of_another_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its tokenizer is not that of tiny"):
        async with connected(model, 1, draft=BUNDLED_MODEL):
            pass
    with pytest.raises(CheckpointError, match="found no directory"):
        async with connected(model, 1, draft=str(tmp_path / "nothing")):
            pass


async def test_readers_that_stopped_take_nobodys_place(
    model: Path, alone: dict[tuple[int, ...], list[int]]
) -> None:
    async with connected(model, 1, sequences=2) as engine:
        long = SamplingParams(max_tokens=60)
        stopped = [engine.generate(prompt, long) for prompt in PROMPTS[:2]]
        for answer in stopped:
            await anext(answer)
        async with asyncio.timeout(20):
            assert (await engine.complete(PROMPTS[2], PARAMS)).token_ids == alone[PROMPTS[2]]
        for answer in stopped:
            await answer.aclose()


@pytest.mark.parametrize("raised", [ValueError("mine"), asyncio.CancelledError()])
async def test_what_a_caller_does_wrong_ends_only_its_own_request(
    model: Path,
    alone: dict[tuple[int, ...], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
) -> None:
    draw = Sampler.next

    def drawn(self: Sampler, logits: torch.Tensor, history: list[int]) -> int:
        if self._temperature == 1:
            raise ValueError("no such token")
        return draw(self, logits, history)

    monkeypatch.setattr(Sampler, "next", drawn)

    def progress(_: Progress) -> None:
        raise raised

    async with connected(model, 1) as engine, asyncio.timeout(20):
        wrong = SamplingParams(temperature=1, seed=1)
        results = await asyncio.gather(
            engine.complete(PROMPTS[3], PARAMS, progress),
            engine.complete(PROMPTS[4], wrong),
            engine.complete(PROMPTS[5], PARAMS),
            return_exceptions=True,
        )
        assert [isinstance(result, Exception) for result in results] == [True, True, False]
        assert isinstance(results[2], Completion)
        assert results[2].token_ids == alone[PROMPTS[5]]
        with pytest.raises(ConfigError, match="priority"):
            async for _ in engine.generate(PROMPTS[1], priority="high"):  # type: ignore[arg-type]
                pass
        with pytest.raises(ConfigError, match="user"):
            await engine.complete(PROMPTS[1], user=7)  # type: ignore[arg-type]


async def test_guesses_stay_within_the_chunk(
    model: Path, alone: dict[tuple[int, ...], list[int]]
) -> None:
    drafter: Any = KnownAnswers(alone, 1.0, told=True)
    async with memory_engine(model, 1, chunk_tokens=5, draft=drafter) as engine:
        requests = (engine.complete(prompt, PARAMS) for prompt in PROMPTS[:6])
        for prompt, answer in zip(PROMPTS, await asyncio.gather(*requests), strict=False):
            assert answer.token_ids == alone[prompt]
