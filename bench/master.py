"""The master of ``bench.latency``: connects to peers and generates, on orders from its input.

    python -m bench.master

An order with ``peers`` connects anew; it has a ``model`` and fields of ``EngineOptions``. One with
``tokens`` generates so many after the first; it answers when the first is there, and goes on when
it gets another line. Every answer is one JSON line; a failure is ``{"error": "..."}``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import asdict
from typing import Any

from tpirt import Engine, EngineOptions, SamplingParams
from tpirt.cli.options import run_async
from tpirt.engine.token_times import token_times
from tpirt.errors import TpirtError


async def next_line() -> str:
    """The next line of standard input; empty at its end."""
    return await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


def answer(values: dict[str, Any]) -> None:
    """Print one answer."""
    print(json.dumps(values), flush=True)


async def generate(engine: Engine, prompt_tokens: int, tokens: int) -> None:
    """Carry out one request from an empty cache."""
    engine.reset()
    vocabulary = engine.config.vocab_size
    prompt = [(17 * i + 3) % vocabulary for i in range(prompt_tokens)]
    began = time.perf_counter()
    async with aclosing(engine.generate(prompt, SamplingParams(max_tokens=tokens + 1))) as texts:
        await anext(texts)
        answer({"ttft_ms": (time.perf_counter() - began) * 1e3})
        await next_line()
        async for _ in texts:
            pass
    ranks = await engine.stats()
    answer(
        {
            "decoded": [asdict(token) for token in token_times(ranks)],
            "ranks": [asdict(rank) for rank in ranks],
            "explained": engine.explain(),
        }
    )


def _connected(
    peers: Sequence[str], model: str | None = None, **options: Any
) -> AbstractAsyncContextManager[Engine]:
    return Engine.connect(model, EngineOptions(**options), peers=peers)


async def serve() -> None:
    """Carry out orders until there are no more."""
    async with AsyncExitStack() as stack:
        engine: Engine | None = None
        while line := await next_line():
            order = json.loads(line)
            try:
                if "peers" in order:
                    await stack.aclose()
                    engine = await stack.enter_async_context(_connected(**order))
                    config = engine.config
                    answer(
                        {
                            "layers": config.num_hidden_layers,
                            "hidden_size": config.hidden_size,
                            "embedding_bytes": engine.embed([0]).nbytes,
                        }
                    )
                else:
                    assert engine is not None
                    await generate(engine, **order)
            except TpirtError as exc:
                answer({"error": str(exc)})


if __name__ == "__main__":
    run_async(serve())
