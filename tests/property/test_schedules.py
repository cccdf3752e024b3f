"""Whatever else runs, each answer is the one that it is alone."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.kernels import attend_in_c, multiply_in_c
from tests.support.nightly import examples
from tests.support.steps import take_free_rows
from tpirt.engine import Engine
from tpirt.engine.model import BUNDLED_MODEL
from tpirt.testing.cluster import ChannelHook, memory_engine
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
SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2}  # heads of 16

pytestmark = pytest.mark.timeout(examples(in_ci=60, at_night=900))

Answers = dict[int, list[int]]  # by number of the prompt


@dataclass(frozen=True)
class Request:
    """A request of a schedule.

    Attributes:
        prompt: its number.
        after: tokens of others that come before it, unless these have ended.
        read: how many tokens are read before it is left; it may have ended by then.
    """

    prompt: int
    after: int
    read: int


REQUESTS = st.builds(
    Request,
    st.integers(0, len(PROMPTS) - 1),
    st.integers(0, 25),
    st.sampled_from((TOKENS, TOKENS, TOKENS, 1, 4)),
)
SCHEDULES = st.one_of(*(st.lists(REQUESTS, min_size=n, max_size=n) for n in (1, 4, 4, 16)))
SETTINGS = st.fixed_dictionaries(
    {
        "window": st.sampled_from((None, 2)),
        "draft": st.sampled_from(("none", "suffix", "auto")),
        "chunk_tokens": st.sampled_from((5, 16, 33, 64)),
        "sequences": st.sampled_from((2, 5, 16)),
        "objective": st.sampled_from(("latency", "throughput")),
    }
)
WORLDS = st.sampled_from((1, 2, 3, 5))
IN_C = st.sampled_from(
    (("none", "auto"), ("int4", "auto"), ("int4", "int8"), ("int8", "auto"))
).map(lambda pair: {"dtype": "bfloat16", "quantize": pair[0], "kv": pair[1]})


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
    tokens = []
    async with aclosing(engine.generate(PROMPTS[request.prompt], params)) as answer:
        async for token in answer:
            tokens.append(token.id)
            come.token()
            if len(tokens) == request.read:
                break
    come.end()
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
        self, path: Path, world: int, form: dict[str, Any], temperature: float, prompts: set[int]
    ) -> Answers:
        """The answers of some prompts, each by itself and without guesses."""
        known = self._alone.setdefault((path, world, *form.items()), {})

        async def ask_each() -> None:
            async with memory_engine(path, world, **self.options(form)) as engine:
                for prompt in prompts - known.keys():
                    engine.reset()
                    request = Request(prompt, 0, TOKENS)
                    (known[prompt],) = await answers(engine, [request], temperature)

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
    ) -> None:
        """Compare the answers of a schedule with those alone.

        Args:
            form: options that decide the bits.
            options: others.
        """

        async def run() -> None:
            hooks = {key: options.pop(key) for key in [*options] if key.endswith("_side")}
            chosen = self.options(form | options)
            async with memory_engine(path, world, **hooks, **chosen) as engine:
                found = await answers(engine, schedule, temperature)
                assert engine.broken is None
            for request, tokens in zip(schedule, found, strict=True):
                assert tokens == alone[request.prompt][: request.read]

        # In float32 greedy tokens are the same in every world.
        prompts = {request.prompt for request in schedule}
        alone = self.alone(path, world if temperature else 1, form, temperature, prompts)
        with pytest.MonkeyPatch.context() as patch:
            if options["draft"] != "none":
                take_free_rows(patch)
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


@given(world=WORLDS, schedule=SCHEDULES, options=SETTINGS)
@settings(max_examples=examples(in_ci=3, at_night=150))
def test_greedy_answers_in_float32(
    models: Models, world: int, schedule: list[Request], options: dict[str, Any]
) -> None:
    models.check(models.path("float32"), world, FLOAT32, 0.0, schedule, options)


@pytest.mark.nightly
@given(world=st.sampled_from((1, 2, 3)), schedule=SCHEDULES, options=SETTINGS)
@settings(max_examples=30)
def test_greedy_answers_of_a_trained_model(
    models: Models, world: int, schedule: list[Request], options: dict[str, Any]
) -> None:
    models.check(Path(BUNDLED_MODEL), world, FLOAT32, 0.0, schedule, options)


@given(world=WORLDS, form=IN_C, schedule=SCHEDULES, options=SETTINGS)
@settings(max_examples=examples(in_ci=2, at_night=150))
@pytest.mark.usefixtures("in_c")
def test_sampled_answers_with_kernels_in_c(
    models: Models,
    world: int,
    form: dict[str, Any],
    schedule: list[Request],
    options: dict[str, Any],
) -> None:
    models.check(models.path("bfloat16"), world, form, 1.0, schedule, options)


def lost_once(rank: int, after: int) -> ChannelHook:
    """Cut the connection to a worker instead of the step after so many."""
    cut = False

    def hook(of: int, channel: Channel) -> Channel:
        nonlocal cut
        if of != rank or cut:
            return channel
        cut = True
        return FaultyChannel(channel, Fault.DROP, after=after, kind="step")

    return hook


@given(
    world=st.sampled_from((2, 3)),
    form=st.sampled_from((FLOAT32, {"dtype": "bfloat16", "quantize": "int4"})),
    schedule=SCHEDULES,
    options=SETTINGS,
    rank=st.integers(1, 2),
    after=st.integers(0, 20),
)
@settings(max_examples=examples(in_ci=2, at_night=60))
@pytest.mark.usefixtures("in_c")
def test_answers_with_a_loss_in_the_middle(
    models: Models,
    world: int,
    form: dict[str, Any],
    schedule: list[Request],
    options: dict[str, Any],
    rank: int,
    after: int,
) -> None:
    hook = lost_once(min(rank, world - 1), after)
    path, temperature = models.path(form["dtype"]), float(form is not FLOAT32)
    models.check(path, world, form, temperature, schedule, options | {"master_side": hook})
