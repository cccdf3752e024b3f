"""Time to first token and time per output token over world sizes on one machine.

    python -m bench.generate --model DIR --local 1,2,4

The floor of a decoded token is the bytes of weights that all ranks read from memory, divided by
the memory bandwidth measured in the same run: on one machine the ranks share it. Streamed runs
(``--memory``, ``--window``) have the disk as a further floor, which is not measured here.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tpirt import Engine, EngineOptions, SamplingParams
from tpirt.cli.options import run_async, size
from tpirt.cluster.machine import default_threads
from tpirt.units import format_bytes


@dataclass(frozen=True)
class Row:
    """One world size: medians over trials, p95 of the time per token."""

    world_size: int
    ttft_ms: float
    tpot_ms: float
    tpot_p95_ms: float
    floor_ms: float
    ratio: float
    comm_ms: float
    peak_rss_bytes: int


def memory_bandwidth() -> float:
    """Bytes per second at which this machine's default threads read memory: best of seven."""
    data = torch.ones(1 << 27, dtype=torch.float32)  # 512 MiB, far beyond any cache
    best = 0.0
    for _ in range(7):
        started = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - started))
    return best


async def measure(arguments: argparse.Namespace, world_size: int, bandwidth: float) -> Row:
    """Run one world size: one warm-up, then the trials."""
    params = SamplingParams(max_tokens=arguments.tokens)
    completions = []
    async with Engine.connect(
        arguments.model,
        EngineOptions(
            window=arguments.window,
            memory_bytes=arguments.memory,
            dtype=arguments.dtype,
            store=arguments.store,
        ),
        local=world_size,
    ) as engine:
        vocabulary = engine.config.vocab_size
        prompt = [(17 * i + 3) % vocabulary for i in range(arguments.prompt_tokens)]
        for _ in range(arguments.trials + 1):
            engine.reset()
            completions.append(await engine.complete(prompt, params))
    counted = completions[1:]
    weights = sum(rank.weights_bytes for rank in counted[0].ranks)
    floor_ms = weights / bandwidth * 1e3
    times = [completion.tpot_ms for completion in counted]
    tpot = statistics.median(times)
    tokens = len(counted[0].token_ids)
    return Row(
        world_size=world_size,
        ttft_ms=statistics.median(completion.ttft_ms for completion in counted),
        tpot_ms=tpot,
        tpot_p95_ms=statistics.quantiles(times, n=20, method="inclusive")[-1],
        floor_ms=floor_ms,
        ratio=tpot / floor_ms,
        comm_ms=statistics.median(c.ranks[0].comm_ms for c in counted) / tokens,
        peak_rss_bytes=max(rank.peak_rss_bytes for rank in counted[-1].ranks),
    )


def show(rows: Sequence[Row], bandwidth: float) -> None:
    """Print the table for people."""
    print(f"{platform.machine()}, {default_threads()} cores, {bandwidth / 1e9:.1f} GB/s of memory")
    print("ranks   TTFT ms   TPOT ms       p95     floor   ratio   comm ms   peak memory")
    for row in rows:
        print(
            f"{row.world_size:5d} {row.ttft_ms:9.1f} {row.tpot_ms:9.2f} {row.tpot_p95_ms:9.2f} "
            f"{row.floor_ms:9.2f} {row.ratio:7.2f} {row.comm_ms:9.2f} "
            f"{format_bytes(row.peak_rss_bytes):>13}"
        )


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: the bundled model")
    parser.add_argument("--local", default="1,2,4", help="world sizes (default 1,2,4)")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--window", type=int)
    parser.add_argument("--memory", type=size)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--store")
    arguments = parser.parse_args()
    bandwidth = memory_bandwidth()
    rows: list[Row] = []

    async def run() -> None:
        for world_size in map(int, arguments.local.split(",")):
            rows.append(await measure(arguments, world_size, bandwidth))

    run_async(run())
    show(rows, bandwidth)
    settings = {key: str(value) for key, value in vars(arguments).items() if value is not None}
    print(
        json.dumps(
            {
                "bench": "generate",
                "settings": settings,
                "bandwidth_bytes_per_s": bandwidth,
                "rows": [asdict(row) for row in rows],
            }
        )
    )


if __name__ == "__main__":
    main()
