"""Time to first token and time per output token over world sizes on one machine.

    python -m bench.generate --model DIR --local 1,2,4

The floor of a decoded token is the bytes of weights that all ranks read from memory, divided by
the memory read rate measured in the same run: on one machine the ranks share it. Streamed runs
(``--memory``, ``--window``) have the disk as a further floor, which ``bench.window`` measures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.lib.command import (
    add_engine_options,
    end_like_a_command,
    engine_options,
    new_parser,
    percentile,
    values,
)
from bench.lib.group import Group, LocalPlace, Request
from bench.lib.record import Record, add_json_option
from tpirt.cli.options import count
from tpirt.units import format_bytes

_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Row:
    """One world size: medians over trials; ``tpot_p95_ms`` and ``comm_ms`` are over all tokens."""

    world_size: int
    ttft_ms: float
    tpot_ms: float
    tpot_p95_ms: float
    floor_ms: float
    ratio: float
    comm_ms: float
    peak_rss_bytes: int


def measure(arguments: argparse.Namespace, world_size: int, bytes_per_s: float) -> Row:
    """Run one world size: one warm-up, then the trials."""
    with Group([LocalPlace()]) as group:
        model = arguments.model and str(arguments.model)
        group.connect(local=world_size, model=model, **engine_options(arguments))
        group.generate(arguments.prompt_tokens, _WARM_UP_TOKENS)
        requests = [
            group.generate(arguments.prompt_tokens, arguments.tokens)
            for _ in range(arguments.trials)
        ]
    return summarize(world_size, requests, bytes_per_s)


def summarize(world_size: int, requests: Sequence[Request], bytes_per_s: float) -> Row:
    """Put the requests of one world size together."""
    tokens = [token for request in requests for token in request.decoded]
    weights = sum(rank["weights_bytes"] for rank in requests[0].ranks)
    floor_ms = weights / bytes_per_s * 1e3
    tpot_ms = statistics.median(request.tpot_ms for request in requests)
    return Row(
        world_size=world_size,
        ttft_ms=statistics.median(request.ttft_ms for request in requests),
        tpot_ms=tpot_ms,
        tpot_p95_ms=percentile([token["total_ms"] for token in tokens], 95),
        floor_ms=floor_ms,
        ratio=tpot_ms / floor_ms,
        comm_ms=statistics.median(token["comm_ms"] for token in tokens),
        peak_rss_bytes=max(rank["peak_rss_bytes"] for rank in requests[-1].ranks),
    )


def show(rows: Sequence[Row], bytes_per_s: float) -> None:
    """Print the table for people."""
    print(f"{bytes_per_s / 1e9:.1f} GB/s of memory")
    print("ranks   TTFT ms   TPOT ms       p95     floor   ratio   comm ms   peak memory")
    for row in rows:
        print(
            f"{row.world_size:5d} {row.ttft_ms:9.1f} {row.tpot_ms:9.2f} {row.tpot_p95_ms:9.2f} "
            f"{row.floor_ms:9.2f} {row.ratio:7.2f} {row.comm_ms:9.2f} "
            f"{format_bytes(row.peak_rss_bytes):>13}"
        )


def main(argv: Sequence[str]) -> int:
    """Parse arguments, measure, print."""
    parser = new_parser("bench.generate", __doc__)
    parser.add_argument("--model", type=Path, help="default: the bundled model")
    parser.add_argument(
        "--local", type=values(count), default=[1, 2, 4], help="world sizes (default 1,2,4)"
    )
    parser.add_argument("--prompt-tokens", type=count, default=64, metavar="N")
    parser.add_argument("--tokens", type=count, default=32, metavar="N", help="after the first")
    parser.add_argument("--trials", type=count, default=5, metavar="N")
    add_engine_options(parser)
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    record = Record("generate", argv, arguments)
    bytes_per_s = max(record.environment.memory_bytes_per_s.values())
    rows = [measure(arguments, world_size, bytes_per_s) for world_size in arguments.local]
    show(rows, bytes_per_s)
    record.finish({"rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(end_like_a_command(lambda: main(sys.argv[1:])))
