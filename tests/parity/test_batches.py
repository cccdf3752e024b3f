"""Several sequences in one step: each gets what transformers computes for it alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.kernels import multiply_by_torch, multiply_few_rows_in_c
from tests.support.nightly import nightly_but
from tpirt.batch import Segment
from tpirt.collectives.context import StepContext
from tpirt.engine import Engine
from tpirt.model import attention as heads
from tpirt.testing import decoders
from tpirt.testing.cluster import memory_engine
from tpirt.testing.decoders import DecoderGroup, decoder_group
from tpirt.testing.models import make_model
from tpirt.types import SamplingParams

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral-window": {"family": "mistral", "sliding_window": 9},
    "qwen2-windowed-layers": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen3": {"family": "qwen3"},
    "dynamic": {
        "rope_scaling": {"type": "dynamic", "factor": 4.0},
        "max_position_embeddings": 32,
    },
}
MICRO_BATCHES = pytest.mark.parametrize("micro_batches", [False, True], ids=["whole", "halves"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("batches")

    @cache
    def make(name: str) -> Path:
        return make_model(root / name, **MODELS[name])

    return make


def ids_of(slot: int, count: int) -> list[int]:
    return [(37 * slot + 11 * i * i + 5 * i) % 256 for i in range(count)]


def assert_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding: sums over ranks have another order, and each CPU its own."""
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def theirs(path: Path, ids: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits after each id, (T, V) float32, of a model that has seen nothing else."""
    return computed(path, tuple(ids), dtype)


@cache  # many steps and tests look at parts of the same few sequences
def computed(path: Path, ids: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0].float()
    return logits


@dataclass
class Sequences:
    """What each slot holds, and the next step's rows.

    ``rope_length`` of a sequence is fixed, as dynamic scaling rotates all its keys by it.
    """

    group: DecoderGroup
    path: Path
    lengths: dict[int, int]
    done: dict[int, int] = field(default_factory=dict)

    async def step(self, *parts: tuple[int, int, int], micro_batches: bool) -> None:
        """Run (slot, tokens, num_logits) rows in one step and compare the wanted ones."""
        ids: list[int] = []
        segments, expected = [], []
        for slot, tokens, num_logits in parts:
            start = self.done.get(slot, 0)
            stop = start + tokens
            whole = ids_of(slot, self.lengths[slot])
            ids += whole[start:stop]
            segments.append(Segment(slot, start, tokens, num_logits, self.lengths[slot]))
            expected.append(theirs(self.path, whole)[stop - num_logits : stop])
            self.done[slot] = stop
        logits = await self.group.logits(ids, segments, micro_batches=micro_batches)
        assert_close(logits, torch.cat(expected))
        assert torch.equal(logits.argmax(1), torch.cat(expected).argmax(1))


@pytest.mark.parametrize(
    ("name", "micro_batches", "world"),
    nightly_but(
        {
            *((name, True, 3) for name in MODELS),
            ("dynamic", False, 3),
            ("mistral-window", False, 3),
            ("llama", False, 1),
        },
        product(MODELS, (False, True), (1, 3)),
        lambda case: f"{case[2]}-{'halves' if case[1] else 'whole'}-{case[0]}",
    ),
)
async def test_sequences_in_one_step_equal_each_alone(
    models: Any, name: str, micro_batches: bool, world: int
) -> None:
    """Prompts together, prompts with decoded tokens, in other orders, some rows not wanted."""
    path = models(name)
    async with decoder_group(path, world) as group:
        # 20 and 30 are below dynamic scaling's trained length of 32, 45 and 60 beyond it.
        sequences = Sequences(group, path, {0: 20, 1: 45, 2: 60, 7: 30})
        steps = [
            [(0, 5, 5), (1, 30, 1)],
            [(0, 1, 1), (2, 40, 40), (1, 1, 1)],
            [(2, 3, 0), (1, 1, 1), (0, 9, 2)],
            [(7, 28, 0)],
            [(7, 1, 1), (2, 1, 1), (1, 1, 1), (0, 1, 1)],
            [(0, 4, 0), (1, 2, 0), (2, 10, 10), (7, 1, 1)],
            [(2, 2, 1), (1, 4, 1)],
        ]
        for step in steps:
            await sequences.step(*step, micro_batches=micro_batches)


@MICRO_BATCHES
async def test_a_step_of_which_nothing_is_wanted(models: Any, micro_batches: bool) -> None:
    path = models("llama")
    async with decoder_group(path, 2) as group:
        sequences = Sequences(group, path, {0: 30, 1: 30})
        await sequences.step((0, 12, 0), (1, 7, 0), micro_batches=micro_batches)
        await sequences.step((1, 9, 9), (0, 1, 1), micro_batches=micro_batches)


async def test_float32_steps_repeat_bit_for_bit_and_do_not_depend_on_the_window(
    models: Any,
) -> None:
    segments = [Segment(0, 0, 17, 17, 40), Segment(1, 0, 6, 1, 6), Segment(2, 0, 1, 1, 1)]
    ids = [token for part in segments for token in ids_of(part.slot, part.tokens)]
    got: list[torch.Tensor] = []
    for window in (None, None, 2):
        async with decoder_group(models("llama"), 2, window=window) as group:
            for micro_batches in (False, True):
                got.append(await group.logits(ids, segments, micro_batches=micro_batches))
    assert torch.equal(got[0], got[2])
    assert torch.equal(got[0], got[4])
    assert torch.equal(got[1], got[3])
    assert torch.equal(got[1], got[5])


async def test_a_fork_goes_on_as_its_own_sequence(models: Any) -> None:
    path = models("llama")
    shared = ids_of(0, 25)
    async with decoder_group(path, 3) as group:
        await group.logits(shared, [Segment(0, 0, 25, 0, 25)])
        for rank in group.ranks:
            rank.decoder.kv.fork(0, 1, 18)
        other = [9, 8, 7]
        logits = await group.logits(
            [*other, 3], [Segment(1, 18, 3, 3, 21), Segment(0, 25, 1, 1, 26)]
        )
    assert_close(logits[:3], theirs(path, [*shared[:18], *other])[18:])
    assert_close(logits[3:], theirs(path, [*shared, 3])[25:])


async def test_rolled_back_and_freed_sequences_start_over(models: Any) -> None:
    path = models("llama")
    async with decoder_group(path, 2) as group:
        sequences = Sequences(group, path, {0: 90, 1: 12})
        await sequences.step((0, 80, 1), (1, 4, 1), micro_batches=False)
        sequences.done = {0: 30, 1: 4}
        held = [rank.decoder.kv.nbytes for rank in group.ranks]
        await sequences.step((1, 1, 1), (0, 2, 2), micro_batches=False)
        for rank in group.ranks:
            rank.decoder.kv.free(1)
        sequences.done[1] = 0
        await sequences.step((0, 1, 1), (1, 12, 12), micro_batches=False)
        for rank, before in zip(group.ranks, held, strict=True):
            rank.decoder.kv.free(0)
            assert rank.decoder.kv.nbytes < before / 2


# -- bfloat16 ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models whose weights are stored in bfloat16, so that both dtypes read the same numbers."""
    root = tmp_path_factory.mktemp("bfloat16")

    @cache
    def make(name: str) -> Path:
        return make_model(root / name, dtype=torch.bfloat16, **MODELS[name])

    return make


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("name", "world"),
    nightly_but(
        {("llama", 3), ("mistral-window", 1), ("qwen3", 1), ("dynamic", 1)},
        product(MODELS, (1, 3)),
    ),
)
async def test_bfloat16_equals_transformers_in_bfloat16(
    rounded: Any, name: str, world: int
) -> None:
    """As close to float32 as transformers in bfloat16 is, and as close to that."""
    path, ids = rounded(name), ids_of(3, 50)
    exact, reference = theirs(path, ids), theirs(path, ids, torch.bfloat16)
    async with memory_engine(path, world, dtype="bfloat16") as engine:
        got = await engine.logits(ids)
        await check_greedy(engine, path, ids)
    allowed = error(reference, exact)
    assert error(got, exact) < 1.2 * allowed
    assert error(got, reference) < 2 * allowed
    best = reference.topk(2).values
    clear = best[:, 0] - best[:, 1] > 2 * (got - reference).abs().max()
    assert clear.any()
    assert torch.equal(got.argmax(1)[clear], reference.argmax(1)[clear])


async def check_greedy(engine: Engine, path: Path, ids: list[int]) -> None:
    """Follow our own choices: wherever transformers' best is clear, it is ours."""
    tokens = (await engine.complete(ids, SamplingParams(max_tokens=6, temperature=0))).token_ids
    reference = theirs(path, [*ids, *tokens], torch.bfloat16)[len(ids) - 1 : -1]
    best = reference.topk(2)
    for token, values, indices in zip(tokens, best.values, best.indices, strict=True):
        if values[0] - values[1] > 0.5:
            assert token == int(indices[0])


@pytest.mark.parametrize(
    ("name", "world", "micro_batches", "multiply"),
    nightly_but(
        {
            ("llama", 1, False, multiply_few_rows_in_c),
            ("mistral-window", 2, True, multiply_few_rows_in_c),
            ("qwen3", 1, False, multiply_by_torch),
        },
        product(
            ("llama", "mistral-window", "qwen3"),
            (1, 2),
            (False, True),
            (multiply_few_rows_in_c, multiply_by_torch),
        ),
        lambda case: "-".join([*map(str, case[:3]), case[3].__name__]),
    ),
)
async def test_answers_have_the_bits_that_they_have_alone_while_prompts_are_computed(
    rounded: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    world: int,
    micro_batches: bool,
    multiply: Callable[..., None],
) -> None:
    """Torch multiplies a prompt's many rows in bfloat16, and C those of answers, or torch, too."""
    multiply(monkeypatch, decoders)
    begun = [Segment(slot, 0, 12, 0, 12) for slot in range(3)]
    going = [
        Segment(0, 12, 1, 1, 13),
        Segment(1, 12, 5, 5, 17, parents=(1, 2, 1, 3)),
        Segment(2, 12, 3, 3, 15),
    ]
    prompts = [
        Segment(3, 0, 40, 1, 40, prompt=True),
        Segment(4, 0, 9, 0, 30, prompt=True),
        Segment(5, 0, 12, 12, 12, prompt=True),  # scored: all are wanted
    ]
    async with decoder_group(rounded(name), world, dtype=torch.bfloat16) as group:
        alone, together = [], []
        for segments in (*((segment,) for segment in going), (*going, *prompts)):
            for segment in begun:
                await group.logits(ids_of(segment.slot, 12), [segment])
            ids = [
                token for part in segments for token in ids_of(part.slot, part.end)[part.position :]
            ]
            halves = micro_batches and len(segments) > 1  # a few rows are never cut in two
            out = await group.run(ids, group.contexts(segments, micro_batches=halves))
            logits = await group.ranks[0].decoder.logits(out[:9])  # as the driver: of answers
            (alone if len(segments) == 1 else together).append(logits)
    assert torch.equal(torch.cat(alone), *together)


# -- how a step ends ---------------------------------------------------------------------------


class GivenUpError(Exception):
    pass


async def run_until(
    group: DecoderGroup, ids: Sequence[int], steps: Sequence[StepContext], blocks: int
) -> None:
    """Run a step and abort it on all ranks when rank 1 has acquired ``blocks`` blocks."""
    window = group.ranks[1].streamer
    acquire, acquired = window.acquire, 0

    async def counted(index: int) -> Any:
        nonlocal acquired
        acquired += 1
        if acquired > blocks:
            for step in steps:
                step.abort(GivenUpError())
        return await acquire(index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window, "acquire", counted)
        await group.run(ids, steps)


@MICRO_BATCHES
async def test_an_aborted_step_leaves_the_positions_before_it(
    models: Any, micro_batches: bool
) -> None:
    """Given up at any block, nothing is left running, and the next step is right."""
    path = models("llama")
    async with decoder_group(path, 2, window=2) as group:
        sequences = Sequences(group, path, {0: 60, 1: 60})
        await sequences.step((0, 10, 1), (1, 3, 1), micro_batches=micro_batches)
        ids = [*ids_of(0, 24)[10:], *ids_of(1, 23)[3:]]
        segments = [Segment(0, 10, 14, 1, 60), Segment(1, 3, 20, 20, 60)]
        for blocks in range(2 * 3):  # three layers of two
            steps = group.contexts(segments, micro_batches=micro_batches)
            with pytest.raises(GivenUpError):
                await run_until(group, ids, steps, blocks)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            for rank in group.ranks:
                assert [rank.decoder.kv.length(slot) for slot in (0, 1)] == [10, 3]
        # A block still held would make this wait for ever: there is room for two.
        await sequences.step((1, 20, 20), (0, 14, 1), micro_batches=micro_batches)


@MICRO_BATCHES
async def test_a_cancelled_step_leaves_nothing_running(models: Any, micro_batches: bool) -> None:
    """Rank 1 is not there: rank 0 is cancelled while it waits for a sum."""
    path = models("llama")
    async with decoder_group(path, 2, window=2) as group:
        segments = [Segment(0, 0, 20, 1, 20)]
        step, _ = group.contexts(segments, micro_batches=micro_batches)
        running = asyncio.create_task(
            group.ranks[0].decoder.forward(group.embed(ids_of(0, 20)), step)
        )
        while not group.ranks[0].comm.calls:  # noqa: ASYNC110 - compute takes a thread's time
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert group.ranks[0].decoder.kv.length(0) == 0
        sequences = Sequences(group, path, {0: 20})
        await sequences.step((0, 20, 1), micro_batches=micro_batches)


async def test_a_second_cancellation_still_waits_for_the_thread_that_computes(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the block that it uses would be released, and overwritten."""
    path = models("llama")
    async with decoder_group(path, 1, window=2) as group:
        (rank,) = group.ranks
        entered, leave, computing = threading.Event(), threading.Event(), threading.Event()
        released_early: list[int] = []
        attention, release = heads.attention, rank.streamer.release

        def slow(*args: Any) -> torch.Tensor:
            computing.set()
            entered.set()
            assert leave.wait(10)
            computing.clear()
            return attention(*args)

        def noted(index: int) -> None:
            if computing.is_set():
                released_early.append(index)
            release(index)

        monkeypatch.setattr(heads, "attention", slow)
        monkeypatch.setattr(rank.streamer, "release", noted)
        (step,) = group.contexts([Segment(0, 0, 20, 1, 20)])
        running = asyncio.create_task(rank.decoder.forward(group.embed(ids_of(0, 20)), step))
        while not entered.is_set():  # noqa: ASYNC110 - set by the compute thread
            await asyncio.sleep(0)
        for _ in range(3):
            running.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not running.done()
        leave.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert released_early == []


async def test_every_sum_of_two_micro_batches_has_the_others_work_to_hide_behind(
    models: Any,
) -> None:
    """The second is one stage behind, on all ranks."""
    async with decoder_group(models("llama"), 2) as group:
        # More rows than are computed on the event loop.
        await group.logits(ids_of(0, 40), [Segment(0, 0, 40, 21, 40)], micro_batches=True)
        for rank in group.ranks:
            calls = rank.comm.calls
            assert calls[:2] == [("broadcast", 0), ("broadcast", 1)]
            # Three layers of attention and MLP. After the first attentions, one half begins its
            # MLP's and its next attention's sum between which the other computes half an MLP. The
            # last MLP's partials share one reduce.
            order = [0, 1, *[0, 0, 1, 1] * 2]
            assert calls[2:] == [*(("all_reduce", part) for part in order), ("reduce", -1)]
