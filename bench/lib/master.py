"""The master of a group under measurement: connects and generates, on orders from its input.

    python -m bench.lib.master

An order with ``connect`` connects, with a ``model``, ``peers`` or ``local``, and fields of
``EngineOptions``; a connection that there was is closed first. One with ``tokens`` generates that
many after the first: it answers once the first is there, and goes on when another line comes. Every
answer is one JSON line; a failure is ``{"error": "..."}``.
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


def _connected(
    model: str | None = None, local: int = 1, peers: Sequence[str] = (), **options: Any
) -> AbstractAsyncContextManager[Engine]:
    return Engine.connect(model, EngineOptions(**options), local=local, peers=peers)


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
