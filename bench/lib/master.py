"""The master of a group under measurement: connects and generates, on orders from its input.

    python -m bench.lib.master

An order with ``connect`` connects, with a ``model``, ``peers`` or ``local``, and fields of
``EngineOptions``; a connection that there was is closed first. With ``hit_rate``, guesses come from
the answers to earlier ``ask`` orders, and are right that often; with a ``draft`` as well, that
small model guesses as often, for nothing but its costs, and the rate is known beforehand as it is
by a small model's own probabilities. An order with ``tokens`` generates that many after the first:
it answers once the first is there, and goes on when another line comes. One with ``ask`` answers a
prompt at once. Every answer is one JSON line; a failure is ``{"error": "..."}``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import asdict
from typing import Any

from tpirt import Engine, EngineOptions, Message, SamplingParams
from tpirt.cli.options import run_async
from tpirt.engine.drafts.model import ModelDrafter, draft_kv_tokens, draft_options
from tpirt.engine.token_times import token_times
from tpirt.errors import TpirtError
from tpirt.testing.drafters import KnownAnswers

_answers: dict[tuple[int, ...], list[int]] = {}  # by prompt, of all connections


async def next_line() -> str:
    """The next line of standard input; empty at its end."""
    return await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


def answer(values: dict[str, Any]) -> None:
    """Print one answer."""
    print(json.dumps(values), flush=True)


async def generate(engine: Engine, prompt_tokens: int, tokens: int) -> None:
    """Carry out one request from an empty cache."""
    engine.reset()
    prompt = _random_prompt(engine, prompt_tokens)
    params = SamplingParams(max_tokens=tokens + 1)
    began = time.perf_counter()
    async with aclosing(engine.generate(prompt, params)) as stream:
        await anext(stream)
        ttft_ms = (time.perf_counter() - began) * 1e3
        answer({"ttft_ms": ttft_ms, "first": [asdict(rank) for rank in await engine.stats()]})
        await next_line()
        began = time.perf_counter()
        decoded = [token.id async for token in stream]
        decode_ms = (time.perf_counter() - began) * 1e3
    ranks = await engine.stats()
    used = engine.collective(1)
    answer(
        {
            "tokens": len(decoded),
            "decode_ms": decode_ms,
            "decoded": [asdict(token) for token in token_times(ranks)],
            "ranks": [asdict(rank) for rank in ranks],
            "collective": used.algorithm.value if used else "none",
            "comm_dtype": used.comm_dtype.value if used else "none",
        }
    )


async def ask(engine: Engine, prompt: int | list[dict[str, str]], tokens: int) -> None:
    """Answer a prompt of so many tokens, or messages, from an empty cache and without a pause."""
    engine.reset()
    ids = engine.encode(
        _random_prompt(engine, prompt)
        if isinstance(prompt, int)
        else [Message(**message) for message in prompt]
    )
    before = _draft_stats(engine)
    done = await engine.complete(ids, SamplingParams(max_tokens=tokens))
    known = _answers.setdefault(tuple(ids), done.token_ids)
    common = min(len(known), len(done.token_ids))
    answer(
        {
            "ttft_ms": done.ttft_ms,
            "tokens": len(done.token_ids) - 1,
            "decode_ms": done.tpot_ms * max(1, len(done.token_ids) - 1),
            "steps": sum(not step.prefill for step in done.ranks[0].steps),
            "same": done.token_ids[:common] == known[:common],
            "drafts_before": before,
            "drafts": _draft_stats(engine),
        }
    )


def _random_prompt(engine: Engine, tokens: int) -> list[int]:
    return [(17 * i + 3) % engine.config.vocab_size for i in range(tokens)]


def _draft_stats(engine: Engine) -> dict[str, Any]:
    return asdict(engine.draft_stats) if engine.draft_stats is not None else {}


@asynccontextmanager
async def _connected(
    model: str | None = None,
    local: int = 1,
    peers: Sequence[str] = (),
    hit_rate: float | None = None,
    **options: Any,
) -> AsyncIterator[Engine]:
    async with AsyncExitStack() as stack:
        if hit_rate is not None:
            costs = None
            if draft := options.pop("draft", None):
                beside = EngineOptions(**options)
                small = Engine.connect(draft, draft_options(beside))
                running = await stack.enter_async_context(small)
                costs = ModelDrafter(running, draft_kv_tokens(beside))
            options["draft"] = KnownAnswers(_answers, hit_rate, told=costs is not None, costs=costs)
        connecting = Engine.connect(model, EngineOptions(**options), local=local, peers=peers)
        yield await stack.enter_async_context(connecting)


async def serve() -> None:
    """Carry out orders until there are no more."""
    async with AsyncExitStack() as stack:
        engine: Engine | None = None
        while line := await next_line():
            order = json.loads(line)
            try:
                if "connect" in order:
                    await stack.aclose()
                    connected = _connected(**order["connect"])
                    engine = await stack.enter_async_context(connected)
                    config = engine.config
                    answer(
                        {
                            "layers": config.num_hidden_layers,
                            "hidden_size": config.hidden_size,
                            "embedding_bytes": (await engine.embed([0])).nbytes,
                        }
                    )
                elif "ask" in order:
                    assert engine is not None
                    await ask(engine, **order["ask"])
                else:
                    assert engine is not None
                    await generate(engine, **order)
            except TpirtError as exc:
                answer({"error": str(exc)})


if __name__ == "__main__":
    run_async(serve())
