"""Token time and peak memory over a sweep of memory limits, each rank in a real one.

    python -m bench.window --model DIR --store DIR --quantize int8 --share 25,50,75,100

A limit is a share of the rank's weights plus what tpirt plans for everything else: the process, a
step, keys and values. The floor of a decoded
token is the bytes that all ranks read for it over the rate of raw direct readers of the same files
(before and after each row; the better of two readers and two per rank, the median of the passes),
or the token time with everything resident, whichever is longer: ranks on one machine share its
disk. ``--disk-rate`` throttles the disk for ranks and raw readers alike: a disk of a known rate,
where a virtual one gives now this and now that. A row faster than its floor shows that the floor
was measured wrong and says so.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.lib.cgroup import disk_cgroup
from bench.lib.command import end_like_a_command, new_parser, run_tpirt, tell, values
from bench.lib.group import LimitedRun, run_limited
from bench.lib.record import Record, add_json_option
from tpirt.cli.options import count, size
from tpirt.cluster.machine import default_threads
from tpirt.planning import Limits, MemoryBudget
from tpirt.planning.memory import PROCESS_BYTES
from tpirt.units import format_bytes
from tpirt.weights.store import SliceStore

_PROMPT_TOKENS = 16  # one step


@dataclass(frozen=True)
class Row:
    """One limit: medians over trials; memory is that of the rank that needed most."""

    share: float
    limit_bytes: int
    ttft_ms: float
    token_ms: float
    read_bytes_per_token: float
    disk_bytes_per_s: float
    disk_floor_ms: float
    ratio: float
    valid: bool
    stall_disk_ms: float
    peak_rss_bytes: int
    peak_cgroup_bytes: int | None
    cache_bytes: int | None


def run(arguments: argparse.Namespace, limit: int | None) -> LimitedRun:
    """Generate once over all ranks."""
    store, threads = str(arguments.store), arguments.threads
    return run_limited(
        arguments.local,
        limit,
        ["--store", store, "--threads", str(threads)],
        {
            "model": str(arguments.model),
            "quantize": arguments.quantize,
            "store": store,
            "threads": threads,
            "chunk_tokens": _PROMPT_TOKENS,
        },
        prompt_tokens=_PROMPT_TOKENS,
        tokens=arguments.tokens,
    )


def limit_bytes(arguments: argparse.Namespace, share: float) -> int:
    """The memory limit under which the rank with the most weights can hold a share of them."""
    limits = Limits(window_blocks=None, memory_bytes=None, chunk_tokens=_PROMPT_TOKENS)
    context = _PROMPT_TOKENS + arguments.tokens + 1
    needs = []
    for stored in SliceStore(arguments.store).slices():
        spec = stored.manifest.spec
        budget = MemoryBudget.of(
            spec.config, spec.shard, arguments.local, spec.form, PROCESS_BYTES, limits
        )
        rest = budget.process_bytes + budget.step_bytes() + budget.kv_bytes(context)
        needs.append(rest + int(share * budget.weights_bytes))
    return max(needs)


def raw_rates(arguments: argparse.Namespace) -> dict[int, float]:
    """Bytes per second by number of raw readers, in a process that the throttle can hold."""
    rates = {}
    for readers in sorted({2, 2 * arguments.local}):
        command = [sys.executable, "-m", "bench.lib.disk", str(arguments.store), str(readers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        rates[readers] = float(done.stdout)
    return rates


def measure(arguments: argparse.Namespace, share: float, resident_ms: float) -> Row:
    """Run one limit several times, raw readers before and after."""
    limit = limit_bytes(arguments, share)
    raw = [raw_rates(arguments)]
    runs = []
    for _ in range(arguments.trials):
        runs.append(run(arguments, limit))
        raw.append(raw_rates(arguments))
    runs.sort(key=lambda done: done.request.tpot_ms)
    middle = runs[len(runs) // 2].request
    tokens = middle.tokens
    ranks = list(zip(middle.first, middle.ranks, strict=True))
    read = sum(last["bytes_read"] - first["bytes_read"] for first, last in ranks) / tokens
    rate = max(statistics.median(rates[n] for rates in raw) for n in raw[0])
    token_ms, floor_ms = middle.tpot_ms, read / rate * 1e3
    ratio = token_ms / max(floor_ms, resident_ms)
    return Row(
        share=share,
        limit_bytes=limit,
        ttft_ms=middle.ttft_ms,
        token_ms=token_ms,
        read_bytes_per_token=read,
        disk_bytes_per_s=rate,
        disk_floor_ms=floor_ms,
        ratio=ratio,
        valid=not read or ratio > 0.98,
        stall_disk_ms=max(last["io_ms"] - first["io_ms"] for first, last in ranks) / tokens,
        peak_rss_bytes=max(r["peak_rss_bytes"] for done in runs for r in done.request.ranks),
        peak_cgroup_bytes=_most(peak for done in runs for peak in done.peak_bytes),
        cache_bytes=_most(cache for done in runs for cache in done.cache_bytes),
    )


def _most(figures: Iterable[int | None]) -> int | None:
    return max((figure for figure in figures if figure is not None), default=None)


def show(rows: list[Row], resident_ms: float) -> None:
    """Print the table for people."""
    print(f"resident {resident_ms:.1f} ms per token")
    print("weights     limit  token ms   read/token    disk  floor ms  ratio   peak RSS     cgroup")
    for row in rows:
        peak = "-" if row.peak_cgroup_bytes is None else format_bytes(row.peak_cgroup_bytes)
        print(
            f"{row.share:6.0%} {format_bytes(row.limit_bytes):>10} {row.token_ms:9.1f} "
            f"{format_bytes(row.read_bytes_per_token):>12} {row.disk_bytes_per_s / 1e9:5.2f}G "
            f"{row.disk_floor_ms:9.1f} {row.ratio:6.2f} {format_bytes(row.peak_rss_bytes):>10} "
            f"{peak:>10}{'' if row.valid else '  INVALID: faster than its floor'}"
        )


def main(argv: Sequence[str]) -> int:
    """Parse arguments, measure, print."""
    parser = new_parser("bench.window", __doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True, help="a folder of its own")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--local", type=count, default=1)
    parser.add_argument("--threads", type=count)
    parser.add_argument(
        "--share",
        type=values(float),
        default=[25.0, 50.0, 75.0, 100.0],
        metavar="PERCENT,...",
        help="of the weights (default 25,50,75,100)",
    )
    parser.add_argument("--disk-rate", type=size, help="throttle the disk to so much a second")
    parser.add_argument("--tokens", type=count, default=16)
    parser.add_argument("--trials", type=count, default=3)
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    arguments.threads = arguments.threads or default_threads(arguments.local)
    record = Record("window", argv, arguments)
    split = ["--model", str(arguments.model), "--quantize", arguments.quantize]
    split += ["--local", str(arguments.local), "--store", str(arguments.store), "--quiet"]
    run_tpirt("generate", *split, "--prompt", "a", "--max-tokens", "1")
    resident_ms = statistics.median(
        run(arguments, None).request.tpot_ms for _ in range(arguments.trials)
    )
    rate = arguments.disk_rate
    with disk_cgroup(arguments.store, rate, tell) if rate else nullcontext():
        rows = []
        for share in arguments.share:
            rows.append(measure(arguments, share / 100, resident_ms))
            tell(f"{share:g} %: {rows[-1].token_ms:.1f} ms per token")
    show(rows, resident_ms)
    record.finish({"resident_ms": resident_ms, "rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(end_like_a_command(lambda: main(sys.argv[1:])))
