"""Whatever else runs, each answer is the one that it is alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.kernels import attend_in_c, multiply_few_rows_in_c, multiply_in_c
from tests.support.nightly import examples, named_examples
from tests.support.steps import have_memory_for, take_free_rows
from tpirt.engine import Engine
from tpirt.engine.model import BUNDLED_MODEL
from tpirt.engine.step_costs import StepCosts
from tpirt.ops.quant_linear import FEW_ROWS
from tpirt.testing.cluster import memory_engine
from tpirt.testing.faults import Fault, FaultyChannel
from tpirt.testing.models import make_model
from tpirt.transport.base import Channel
from tpirt.types import SamplingParams

SHARED = [(7 * i) % 200 + 3 for i in range(40)]  # a prefix of every other prompt
PROMPTS = [
    tuple(SHARED[: 40 * (n % 2)] + [(n * n + 3 * i) % 90 + 3 for i in range(length)])
    for n, length in enumerate((1, 5, 9, 17, 30, 2, 50, 11, 64, 20))
]
TOKENS = 10
# Heads that C attends with; rows that are no multiple of 128, whose int8 sums have a short block.
SIZES = {"hidden_size": 192, "head_dim": 16, "intermediate_size": 352, "num_hidden_layers": 2}
MOST_AFTER = 20

pytestmark = pytest.mark.timeout(examples(in_ci=60, at_night=900))

Answers = dict[int, list[int]]  # by number of the prompt


@dataclass(frozen=True)
class Request:
    """A request of a schedule.

    Attributes:
        prompt: its number.
        after: tokens of others that come before it, unless these have ended.
        read: how many tokens are read before it is left; it may have ended by then.
        kind: an answer, or instead of it the prompt's logits, or that kept tokens are forgotten.
        slow: whether others have many turns between two of its reads.
    """

    prompt: int
    after: int
    read: int = TOKENS
    kind: str = "answer"
    slow: bool = False


REQUESTS = st.builds(
    Request,
    st.integers(0, len(PROMPTS) - 1),
    st.integers(0, 25),
    st.sampled_from((TOKENS, TOKENS, TOKENS, 1, 4)),
    st.sampled_from((*["answer"] * 6, "logits", "reset")),
    st.sampled_from((False, False, True)),
)
SCHEDULES = st.one_of(*(st.lists(REQUESTS, min_size=n, max_size=n) for n in (1, 4, 4, 16))).filter(
    lambda schedule: any(request.kind == "answer" for request in schedule)
)
# Answers that begin and end while others run, with a scored text and shared prefixes between.
MIXED = [
    Request(7, 0),
    Request(0, 2, slow=True),
    Request(8, 4),
    Request(3, 6, read=4),
    Request(4, 8, kind="logits"),
    Request(5, 10),
    Request(2, 12, kind="reset"),
    Request(9, 14),
]
SETTINGS = st.fixed_dictionaries(
    {
        "window": st.sampled_from((None, 2)),
        "draft": st.sampled_from(("none", "suffix", "auto")),
        "chunk_tokens": st.sampled_from((5, 16, 33, 64)),
        "sequences": st.sampled_from((2, 5, 16)),
        "objective": st.sampled_from(("latency", "throughput")),
    }
)
# Positions that there is memory for, twice as many where weights are given up for them. A few
# answers take more: idle slots go to disk, and the youngest sequence begins again.
MEMORY = st.sampled_from((None, None, 128, 320))
WORLDS = st.sampled_from((1, 2, 3, 5))


def settings_of(draft: str, objective: str, window: int | None = None) -> dict[str, Any]:
    return {
        "window": window,
        "draft": draft,
        "chunk_tokens": 33,
        "sequences": 5,
        "objective": objective,
    }


def in_bfloat16(quantize: str, kv: str, comm_dtype: str) -> dict[str, Any]:
    return {"dtype": "bfloat16", "quantize": quantize, "kv": kv, "comm_dtype": comm_dtype}


IN_C = st.builds(
    in_bfloat16,
    st.sampled_from(("none", "int4", "int8")),
    st.sampled_from(("auto", "int8")),
    st.sampled_from(("auto", "int8")),
)


class Arrivals:
    """Lets each request come when so many tokens have come out, or nothing else runs."""

    def __init__(self) -> None:
        self._tokens = self._running = 0
        self._waiting: list[tuple[int, asyncio.Event]] = []

    async def wait(self, after: int) -> None:
        event = asyncio.Event()
        self._waiting.append((after, event))
        self._waiting.sort(key=lambda pair: pair[0])
        asyncio.get_running_loop().call_soon(self._admit)  # when all have asked
        await event.wait()

    def token(self) -> None:
        self._tokens += 1
        self._admit()

    def end(self) -> None:
        self._running -= 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting and (self._waiting[0][0] <= self._tokens or not self._running):
            self._running += 1
            self._waiting.pop(0)[1].set()


async def ask(engine: Engine, request: Request, params: SamplingParams, come: Arrivals) -> Any:
    await come.wait(request.after)
    tokens: list[int] = []
    if request.kind == "reset":
        engine.reset()
    elif request.kind == "logits":
        assert (await engine.logits(PROMPTS[request.prompt])).isfinite().all()
    else:
        tokens = await read(engine, request, params, come)
    come.end()
    return tokens


async def read(
    engine: Engine, request: Request, params: SamplingParams, come: Arrivals
) -> list[int]:
    tokens = []
    async with aclosing(engine.generate(PROMPTS[request.prompt], params)) as answer:
        async for token in answer:
            tokens.append(token.id)
            come.token()
            if len(tokens) == request.read:
                break
            for _ in range(100 * request.slow):
                await asyncio.sleep(0)
    return tokens


def params(prompt: int, temperature: float) -> SamplingParams:
    return SamplingParams(max_tokens=TOKENS, temperature=temperature, seed=prompt)


async def answers(engine: Engine, schedule: list[Request], temperature: float) -> list[list[int]]:
    come = Arrivals()
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        asked = [
            tasks.create_task(ask(engine, request, params(request.prompt, temperature), come))
            for request in schedule
        ]
    return [task.result() for task in asked]


def came_again(tokens: list[int]) -> bool:
    """Whether a token that an answer goes on from came before: then there are guesses."""
    going_on = tokens[:-1]
    return len(set(going_on)) < len(going_on)


async def compute(engine: Engine, prompts: Iterable[int]) -> None:
    """Have the keys and values of prompts kept, computed one after another."""
    for prompt in prompts:
        await engine.complete(PROMPTS[prompt], SamplingParams(max_tokens=1))


class Loss:
    """Cuts the connection to a worker instead of the step after so many, once."""

    def __init__(self, rank: int, after: int):
        self._rank = rank
        self._after = after
        self._channel: FaultyChannel | None = None

    def __call__(self, rank: int, channel: Channel) -> Channel:
        if rank != self._rank or self._channel is not None:
            return channel
        self._channel = FaultyChannel(channel, Fault.DROP, after=self._after, kind="step")
        return self._channel

    @property
    def happened(self) -> bool:
        return self._channel is not None and self._channel.fired.is_set()


class Models:
    """A model of each dtype, and the answers of its prompts alone."""

    def __init__(self, folder: Path):
        self.store = folder / "store"
        self._folder = folder
        self.path = cache(self._path)
        self._alone: dict[Any, Answers] = {}

    def options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"store": self.store, **options}

    def _path(self, dtype: str) -> Path:
        return make_model(self._folder / dtype, "llama", dtype=getattr(torch, dtype), **SIZES)

    def alone(
        self,
        path: Path,
        world: int,
        form: dict[str, Any],
        temperature: float,
        prompts: set[int],
        cached: Sequence[int] = (),
    ) -> Answers:
        """The answers of some prompts, each by itself and without guesses."""
        known = self._alone.setdefault((path, world, *form.items(), *cached), {})

        async def ask_each() -> None:
            async with memory_engine(path, world, **self.options(form)) as engine:
                for prompt in prompts - known.keys():
                    engine.reset()
                    await compute(engine, [prompt] if prompt in cached else [])
                    (known[prompt],) = await answers(engine, [Request(prompt, 0)], temperature)

        if prompts - known.keys():
            asyncio.run(ask_each())
        return known

    def check(
        self,
        path: Path,
        world: int,
        form: dict[str, Any],
        temperature: float,
        schedule: list[Request],
        options: dict[str, Any],
        loss: Loss | None = None,
        cached: Sequence[int] = (),
        memory: int | None = None,
    ) -> None:
        """Compare the answers of a schedule with those alone.

        Args:
            form: options that decide the bits.
            options: others.
            loss: happens in the schedule, which is repeated until then.
            cached: prompts that are computed before it; then only their answers are compared, and
                nothing is forgotten.
            memory: positions that there is memory for; None for all.
        """

        async def run() -> None:
            hooks = {} if loss is None else {"master_side": loss}
            chosen = self.options(form | options)
            async with memory_engine(path, world, **hooks, **chosen) as engine:
                await compute(engine, cached)
                await compare(engine, schedule)
                for _ in range(MOST_AFTER):
                    if loss is None or loss.happened:
                        break
                    await compare(engine, schedule)
                await compare(engine, [last])  # forms the group again if nobody had to
                assert engine.broken is None
                assert len(engine.recoveries) == (loss is not None)
                if options["draft"] == "auto" and came_again(alone[last.prompt][: last.read]):
                    assert engine.draft_stats is not None
                    assert engine.draft_stats.guesses

        async def compare(engine: Engine, schedule: list[Request]) -> None:
            found = await answers(engine, schedule, temperature)
            for request, tokens in zip(schedule, found, strict=True):
                if request.kind == "answer" and (not cached or request.prompt in cached):
                    assert tokens == alone[request.prompt][: request.read]

        last = max((r for r in schedule if r.kind == "answer"), key=lambda request: request.read)
        # In float32 greedy tokens are the same in every world.
        prompts = {request.prompt for request in schedule}
        alone = self.alone(path, world if temperature else 1, form, temperature, prompts, cached)
        with pytest.MonkeyPatch.context() as patch:
            take_free_rows(patch, FEW_ROWS)
            if memory is not None:
                have_memory_for(patch, memory)
                # What went to disk comes back rather than being computed.
                patch.setattr(StepCosts, "prompt_seconds", lambda *_: float("inf"))
            asyncio.run(run())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("schedules"))


@pytest.fixture(scope="module")
def in_c() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        multiply_in_c(patch)
        attend_in_c(patch)
        yield


FLOAT32 = {"dtype": "float32"}


@given(world=WORLDS, schedule=SCHEDULES, options=SETTINGS, memory=MEMORY)
@example(world=1, schedule=MIXED, options=settings_of("auto", "latency"), memory=128)
@example(world=3, schedule=MIXED, options=settings_of("none", "throughput", window=2), memory=None)
@named_examples(at_night=150)
def test_greedy_answers_in_float32(
    models: Models,
    world: int,
    schedule: list[Request],
    options: dict[str, Any],
    memory: int | None,
) -> None:
    models.check(models.path("float32"), world, FLOAT32, 0.0, schedule, options, memory=memory)


@pytest.mark.nightly
@given(world=st.sampled_from((1, 2, 3)), schedule=SCHEDULES, options=SETTINGS)
@named_examples(at_night=30)
def test_greedy_answers_of_a_trained_model(
    models: Models, world: int, schedule: list[Request], options: dict[str, Any]
) -> None:
    models.check(Path(BUNDLED_MODEL), world, FLOAT32, 0.0, schedule, options)


@given(world=WORLDS, form=IN_C, schedule=SCHEDULES, options=SETTINGS, memory=MEMORY)
@example(
    world=2,
    form=in_bfloat16("none", "auto", "int8"),
    schedule=MIXED,
    options=settings_of("suffix", "latency"),
    memory=None,
)
@example(
    world=1,
    form=in_bfloat16("int4", "int8", "auto"),
    schedule=MIXED,
    options=settings_of("auto", "throughput"),
    memory=128,
)
@named_examples(at_night=150)
@pytest.mark.usefixtures("in_c")
def test_sampled_answers_with_kernels_in_c(
    models: Models,
    world: int,
    form: dict[str, Any],
    schedule: list[Request],
    options: dict[str, Any],
    memory: int | None,
) -> None:
    models.check(models.path("bfloat16"), world, form, 1.0, schedule, options, memory=memory)


CACHED = tuple(range(0, len(PROMPTS), 2))  # none begins like another


def keeping(schedule: list[Request]) -> list[Request]:
    """A schedule in which nothing is forgotten."""
    return [request for request in schedule if request.kind != "reset"]


@given(
    world=st.sampled_from((1, 2)),
    quantize=st.sampled_from(("none", "int4")),
    schedule=st.lists(REQUESTS, min_size=4, max_size=10)
    .map(keeping)
    .filter(lambda schedule: any(r.kind == "answer" and r.prompt in CACHED for r in schedule)),
    draft=st.sampled_from(("none", "suffix", "auto")),
)
@example(world=1, quantize="none", schedule=keeping(MIXED), draft="none")
@example(world=2, quantize="int4", schedule=keeping(MIXED), draft="auto")
@named_examples(at_night=100)
def test_sampled_answers_beside_prompts_that_have_another_kernel(
    models: Models, world: int, quantize: str, schedule: list[Request], draft: str
) -> None:
    """A prompt's bits depend on its step: those of the answers are computed before, and kept."""
    options = settings_of(draft, "throughput") | {"chunk_tokens": 64, "sequences": 16}
    form = in_bfloat16(quantize, "auto", "auto")
    with pytest.MonkeyPatch.context() as patch:
        multiply_few_rows_in_c(patch)
        models.check(models.path("bfloat16"), world, form, 1.0, schedule, options, cached=CACHED)


@given(
    world=st.sampled_from((2, 3)),
    form=st.sampled_from((FLOAT32, in_bfloat16("int4", "auto", "auto"))),
    schedule=SCHEDULES,
    options=SETTINGS,
    rank=st.integers(1, 2),
    after=st.integers(0, MOST_AFTER),
    memory=MEMORY,
)
@example(
    world=3,
    form=FLOAT32,
    schedule=MIXED,
    options=settings_of("none", "latency"),
    rank=2,
    after=9,
    memory=128,
)
@example(
    world=2,
    form=in_bfloat16("int4", "auto", "auto"),
    schedule=MIXED,
    options=settings_of("auto", "throughput"),
    rank=1,
    after=5,
    memory=None,
)
@named_examples(at_night=60)
@pytest.mark.usefixtures("in_c")
def test_answers_with_a_loss_in_the_middle(
    models: Models,
    world: int,
    form: dict[str, Any],
    schedule: list[Request],
    options: dict[str, Any],
    rank: int,
    after: int,
    memory: int | None,
) -> None:
    loss = Loss(min(rank, world - 1), after)
    path, temperature = models.path(form["dtype"]), float(form is not FLOAT32)
    models.check(path, world, form, temperature, schedule, options, loss=loss, memory=memory)
