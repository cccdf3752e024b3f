"""Trees of guesses: every path computes what it computes as a sequence of its own."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.kernels import multiply_in_c
from tests.support.nightly import nightly_but
from tests.support.steps import take_free_rows
from tpirt.batch import Batch, Segment
from tpirt.cluster.group import Group
from tpirt.engine import Engine
from tpirt.engine.drafts.base import Guess
from tpirt.engine.kv_manager import KVManager
from tpirt.engine.scheduler import Piece
from tpirt.engine.sequence import Answer
from tpirt.engine.step_costs import StepCosts
from tpirt.errors import MemoryLimitError, TransportError
from tpirt.planning import Deployment
from tpirt.testing.cluster import memory_engine
from tpirt.testing.decoders import DecoderGroup, decoder_group
from tpirt.testing.models import make_model
from tpirt.types import SamplingParams

PROMPT = [(37 * i * i + 5 * i) % 256 for i in range(21)]
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 352}  # heads of 16
WINDOWED = {"family": "mistral", "sliding_window": 9}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("trees") / "llama", "llama", **SIZES)


def random_tree(choice: random.Random, rows: int) -> list[int]:
    """The parent of each row after the first."""
    return [choice.randrange(max(0, row - 3), row) for row in range(1, rows)]


def path_to(row: int, parents: Sequence[int]) -> list[int]:
    path = [row]
    while path[0]:
        path.insert(0, parents[path[0] - 1])
    return path


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


async def compute(
    group: DecoderGroup, ids: Sequence[int], slot: int, start: int, **tree: Any
) -> torch.Tensor:
    segment = Segment(slot, start, len(ids), len(ids), start + len(ids), **tree)
    return await group.logits(ids, [segment])


@pytest.mark.parametrize(
    ("world", "kind", "options"),
    [
        (1, {}, {}),
        (2, WINDOWED, {"window": 2}),
        (2, {}, {"kv_bits": 8}),
        (1, WINDOWED, {"kv_bits": 8, "dtype": torch.bfloat16}),
        (2, {}, {"dtype": torch.bfloat16}),
    ],
    ids=["float32", "window", "codes", "bfloat16-codes", "bfloat16"],
)
async def test_rows_of_a_tree_equal_those_of_their_paths(
    tmp_path: Path, world: int, kind: dict[str, Any], options: dict[str, Any]
) -> None:
    """Then a path is kept, and the next step goes on from there."""
    family = {"family": "llama", **SIZES, **kind}
    path = make_model(tmp_path / "model", dtype=options.get("dtype", torch.float32), **family)
    choice = random.Random(7)
    # In bfloat16, torch rounds products of other numbers of rows otherwise.
    most = 0.05 if "dtype" in options else 1e-5
    async with decoder_group(path, world, **options) as group:
        for rows in (2, 5, 12):
            await compute(group, PROMPT, 0, 0)
            parents, ids = random_tree(choice, rows), choice.sample(range(256), rows)
            backs = tuple(row - parent for row, parent in enumerate(parents, 1))
            got = await compute(group, ids, 0, len(PROMPT), parents=backs)
            for row in range(rows):
                own = [ids[at] for at in path_to(row, parents)]
                await compute(group, PROMPT, 1, 0)
                alone = await compute(group, own, 1, len(PROMPT))
                assert difference(got[row], alone[-1]) < most
            kept = path_to(rows - 1, parents)
            start = len(PROMPT) + len(kept)
            after = await compute(group, [3, 4], 0, start, keep=tuple(kept))
            await compute(group, PROMPT, 1, 0)
            await compute(group, [ids[at] for at in kept], 1, len(PROMPT))
            alone = await compute(group, [3, 4], 1, start)
            assert difference(after, alone) < most


async def test_a_chain_written_as_a_tree_has_the_same_bits(model: Path) -> None:
    ids = [5, 6, 7, 8]
    for options in ({}, {"kv_bits": 8}):
        async with decoder_group(model, 2, **options) as group:
            got = []
            for tree in ({}, {"parents": (1, 1, 1)}):
                await compute(group, PROMPT, 0, 0)
                got.append(await compute(group, ids, 0, len(PROMPT), **tree))
        if options:
            assert torch.equal(*got)
        torch.testing.assert_close(*got)


class Bushes:
    """Trees of 2 to 9 guesses, a path of which is often right; answers are known."""

    held_bytes = 0

    def __init__(self, answers: Mapping[tuple[int, ...], Sequence[int]]):
        self._answers = answers
        self._choice = random.Random(1)

    def prospects(self, most: int) -> None:
        pass

    def seconds(self, depth: int) -> float:
        return 0.0

    def learn(self, ids: Sequence[int], logits: torch.Tensor) -> None:
        pass

    def forget(self, answer: Answer) -> None:
        pass

    def reset(self) -> None:
        pass

    async def propose(self, answers: Sequence[Answer], most: int) -> list[list[Guess]]:
        return [self._bush(answer)[:most] for answer in answers]

    def _bush(self, answer: Answer) -> list[Guess]:
        choice = self._choice
        known = self._answers[tuple(answer.ids[: answer.prompt])][answer.sampled :]
        rows = choice.randint(3, 10)
        parents = random_tree(choice, rows)
        right = path_to(choice.randrange(rows), parents)
        tokens = dict(zip(right[1:], known, strict=False))
        return [
            Guess(tokens.get(row, choice.randrange(256)), parent - 1, "bush", 0.9)
            for row, parent in enumerate(parents, 1)
        ]


@pytest.mark.parametrize(
    ("world", "window", "kv"),
    nightly_but(
        {(1, None, "auto"), (2, 2, "int8")},
        [
            (world, window, kv)
            for world in (1, 2)
            for window in (None, 2)
            for kv in ("auto", "int8")
        ],
    ),
)
async def test_sampled_answers_are_those_without_guesses(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    world: int,
    window: int | None,
    kv: str,
    tmp_path: Path,
) -> None:
    """With the kernels in C a row's bits do not depend on the others: for every seed."""
    take_free_rows(monkeypatch)
    kept, made = 0, Piece.segment

    def segment(piece: Piece, source: int | None = None) -> Segment:
        nonlocal kept
        found = made(piece, source)
        kept += len(found.keep)
        return found

    prompts = [tuple(PROMPT[:length]) for length in (3, 8, 21)]
    options = {"quantize": "int4", "dtype": "bfloat16", "window": window, "kv": kv}
    options["store"] = tmp_path  # the same kernels, which are chosen by their time
    sampled = {
        prompt: SamplingParams(max_tokens=40, temperature=1.0, top_k=40, seed=seed)
        for seed, prompt in enumerate(prompts)
    }
    async with memory_engine(model, world, draft="none", **options) as engine:
        answers: dict[tuple[int, ...], list[int]] = {}
        for prompt, params in sampled.items():
            engine.reset()  # prompts of more rows have other kernels
            answers[prompt] = (await engine.complete(prompt, params)).token_ids
    monkeypatch.setattr(Piece, "segment", segment)
    async with memory_engine(model, world, draft=Bushes(answers), **options) as engine:
        for prompt, params in sampled.items():
            answer = await engine.complete(prompt, params)
            assert answer.token_ids == answers[prompt]
            # What was kept of trees is the prefix of another turn, too.
            again = [*prompt, *answer.token_ids[:-1]]
            params = replace(params, max_tokens=1, temperature=0)
            answers[tuple(again)] = []
            turn = await engine.complete(again, params)
            engine.reset()
            assert turn.token_ids == (await engine.complete(again, params)).token_ids
            engine.reset()
        stats = engine.draft_stats
        assert stats is not None
        assert stats.right > 40
    assert kept > 10


async def test_tokens_are_computed_again_if_the_step_that_keeps_them_fails(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All ranks have moved them, or some have: they agree only on the positions before."""
    take_free_rows(monkeypatch)
    multiply_in_c(monkeypatch)
    prompt, params = tuple(PROMPT[:8]), SamplingParams(max_tokens=30, temperature=0)
    options = {"quantize": "int4", "dtype": "bfloat16", "store": tmp_path}
    async with memory_engine(model, 2, draft="none", **options) as engine:
        answers = {prompt: (await engine.complete(prompt, params)).token_ids}
    step, failed = Group.step, 0

    async def failing(group: Group, hidden: Any, segments: Sequence[Segment], prefill: bool) -> Any:
        nonlocal failed
        failed += bool(segments[0].keep)
        if segments[0].keep and failed % 2:  # none has moved them
            raise MemoryLimitError("refused")
        out = await step(group, hidden, segments, prefill)
        if segments[0].keep:
            raise MemoryLimitError("refused")
        return out

    async def relieve(_: KVManager) -> bool:
        return True

    monkeypatch.setattr(Group, "step", failing)
    monkeypatch.setattr(KVManager, "relieve", relieve)
    async with memory_engine(model, 2, draft=Bushes(answers), **options) as engine:
        assert (await engine.complete(prompt, params)).token_ids == answers[prompt]
    assert failed > 1


@pytest.mark.parametrize("seed", nightly_but({0, 1}, range(8)))
async def test_conversations_that_are_left_within_a_tree_go_to_disk_and_on(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    """Their last tokens lie among wrong guesses, and no step comes that moves them together."""
    take_free_rows(monkeypatch)
    multiply_in_c(monkeypatch)
    choice = random.Random(seed)
    turns = [
        (turn % 2, choice.randint(2, 9), choice.sample(range(3, 250), choice.randint(1, 4)))
        for turn in range(12)
    ]
    answers: dict[tuple[int, ...], list[int]] = {}

    async def talk(engine: Engine, *, whole: bool) -> list[list[int]]:
        texts = [[(first + 7 * at) % 250 + 3 for at in range(70)] for first in (3, 90)]
        for conversation, read, words in turns:
            text, tokens = texts[conversation], []
            params = SamplingParams(max_tokens=30, temperature=1.0, seed=len(text))
            async with aclosing(engine.generate(text, params)) as answer:
                async for token in answer:
                    tokens.append(token.id)
                    if len(tokens) == read and not whole:
                        break
            answers.setdefault(tuple(text), tokens)
            text += [*tokens[:read], *words]
        return texts

    options = {"quantize": "int4", "dtype": "bfloat16", "kv": ("auto", "int8")[seed // 2 % 2]}
    options["store"] = tmp_path
    world = 1 + seed % 2
    async with memory_engine(model, world, draft="none", **options) as engine:
        expected = await talk(engine, whole=True)
    end, pending = Answer.end, 0

    def ended(answer: Answer, *arguments: Any) -> None:
        nonlocal pending
        pending += bool(answer.keep)
        end(answer, *arguments)

    monkeypatch.setattr(Answer, "end", ended)
    monkeypatch.setattr(Deployment, "has_room", lambda *_, displacing: displacing)
    monkeypatch.setattr(StepCosts, "prompt_seconds", lambda *_: float("inf"))
    async with memory_engine(model, world, draft=Bushes(answers), **options) as engine:
        assert await talk(engine, whole=False) == expected
        assert "11 spilled, 10 restored" in engine.explain_cache()
    assert pending >= 2


async def test_a_step_with_an_impossible_tree_is_refused(model: Path) -> None:
    async with memory_engine(model) as engine:
        await engine.complete(PROMPT, SamplingParams(max_tokens=1))
        runtime = engine._group.runtime  # the check that every rank makes
        good = Segment(0, 21, 3, 3, 24)
        for wrong in (
            replace(good, parents=(1, 3)),
            replace(good, parents=(0, 1)),
            replace(good, parents=(1, 1, 1)),
            replace(good, tokens=65, parents=(1,)),
            replace(good, keep=(1, 0)),
            replace(good, keep=(0, 1, 2, 99)),
            replace(good, position=1, keep=(0, 1)),
        ):
            with pytest.raises(TransportError, match=r"tree|keeps"):
                runtime.validate(Batch((wrong,)))
