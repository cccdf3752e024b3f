"""The master of :mod:`bench.chaos`: holds a conversation and tells how it goes, a JSON line each.

It reads one line per round, the address of a connection and what to ask, and goes on with the same
conversation when a request fails, as a user would.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from contextlib import aclosing
from typing import Any

import psutil

from tpirt.engine import Engine, EngineOptions
from tpirt.errors import TpirtError
from tpirt.types import RECONNECTED, RESUMED, Progress, SamplingParams

_MOST_TRIES = 6
_PAUSE_S = 1.0
_SETTLE_S = 60  # gRPC gives up a handshake that a damaged link has left unfinished


def tell(event: str, **details: Any) -> None:
    """Write a line for the other side."""
    print(json.dumps({"event": event, **details}), flush=True)


async def _round(order: dict[str, Any]) -> None:
    options = EngineOptions(
        dtype="float32",
        threads=1,
        chunk_tokens=16,
        draft="none",
        store=order["store"],
        timeout_s=order["timeout_s"],
    )
    for attempt in range(_MOST_TRIES):
        tell("loading")
        try:
            async with Engine.connect(
                order["model"],
                options,
                peers=order["peers"],
                spares=order["spares"],
                progress=_progress,
            ) as engine:
                tell("loaded")
                await _converse(engine, order)
                tell("recoveries", recoveries=[vars(each) for each in engine.recoveries])
            break
        except TpirtError as exc:
            tell("failed", error=str(exc), attempt=attempt)
            await asyncio.sleep(_PAUSE_S)
    else:
        tell("given up")


async def _converse(engine: Engine, order: dict[str, Any]) -> None:
    asked = [_answer(engine, i, ids, order["tokens"]) for i, ids in enumerate(order["prompts"])]
    await asyncio.gather(*asked)
    tell("idle")
    await asyncio.sleep(order["idle_s"])
    await _answer(engine, len(asked), order["prompts"][0], order["tokens"])


async def _answer(engine: Engine, number: int, ids: list[int], tokens: int) -> None:
    """Have an answer to its end; after an error go on from what there is."""
    answer: list[int] = []
    for attempt in range(_MOST_TRIES):
        params = SamplingParams(max_tokens=tokens - len(answer))
        tell("prompt", number=number)
        try:
            async with aclosing(engine.generate([*ids, *answer], params, _progress)) as stream:
                async for token in stream:
                    answer.append(token.id)
                    if len(answer) in (1, tokens // 2):
                        tell("token", number=number, count=len(answer))
        except TpirtError as exc:
            tell("failed", error=str(exc), attempt=attempt)
            await asyncio.sleep(_PAUSE_S)
        else:
            tell("answer", number=number, ids=answer)
            return
    raise TpirtError(f"request {number}: no answer")


def _progress(progress: Progress) -> None:
    if progress.stage in (RECONNECTED, RESUMED):
        tell(progress.stage, detail=progress.detail)


async def main() -> None:
    """Serve rounds until standard input ends."""
    loop = asyncio.get_running_loop()
    process = psutil.Process()
    least = 1 << 20
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        begun_s = time.monotonic()
        await _round(json.loads(line))
        seconds = round(time.monotonic() - begun_s, 2)
        gc.collect()
        for _ in range(_SETTLE_S):  # gRPC closes connections on its own schedule
            if process.num_fds() <= least + 2:
                break
            tell("settling")
            await asyncio.sleep(1)
        least = min(least, process.num_fds())
        tell(
            "over",
            seconds=seconds,
            tasks=len(asyncio.all_tasks()) - 1,
            descriptors=process.num_fds(),
            threads=process.num_threads(),
            rss=process.memory_info().rss,
            children=len(process.children(recursive=True)),
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    asyncio.run(main())
