"""A model far beyond memory on one machine: token time, memory and bytes read, beside the floor.

    python -m bench.scale70b --shape llama-2-70b --quantize int4 --world-size 8 --dir DIR

Makes the synthetic model in DIR (unless it is there), runs one rank per process with one thread,
each in a memory cgroup with the limit that tpirt is given, and removes the model after
(``--keep`` keeps it). All ranks share this machine's cores and its one disk.

All figures per token are of decoded tokens, the first one excepted. The floor is the bytes that all
ranks read for a token over the rate at which raw direct readers read the same files (the fastest
median of the passes before or after the run, with 2 readers or with one per rank),
or the computing of the busiest rank as the run measured it, whichever is longer. A run that is
faster than its floor shows that the floor was measured wrong: it is reported as invalid.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.lib.command import end_like_a_command, new_parser, run_tpirt, tell
from bench.lib.disk import every_nth, read_rate
from bench.lib.group import LimitedRun, run_limited
from bench.lib.record import Record, add_json_option
from tpirt.cli.options import count, size
from tpirt.units import format_bytes
from tpirt.weights.synthetic import MARKER, SLICES, is_synthetic

_PASS_BYTES = 8 * 10**9  # of a raw pass: seconds, and beyond what a disk's host may cache
_TIMEOUT_S = 600  # the first token waits for everything to be read once

# TPI-LLM, arXiv 2410.00531: 8 emulated devices, float32.
_PUBLISHED = {
    "llama-2-70b": {"ttft_s": 29.4, "token_s": 26.1, "peak_bytes": 3_100_000_000},
}


@dataclass(frozen=True)
class Rank:
    """One rank: its peaks over the whole run; times and bytes per decoded token."""

    peak_rss_bytes: int
    peak_cgroup_bytes: int | None
    cache_bytes: int | None
    weights_bytes: int
    read_bytes: float
    io_s: float
    compute_s: float
    comm_s: float


@dataclass(frozen=True)
class Result:
    """What is reported; rates in bytes per second."""

    ttft_s: float
    token_s: float
    weights_bytes: int
    read_bytes_per_token: float
    raw_rates: dict[int, list[float]]  # by number of readers; before the run, then after it
    rate: float
    disk_floor_s: float
    compute_s: float
    ratio: float
    valid: bool
    ranks: list[Rank]


def make_model(arguments: argparse.Namespace) -> None:
    """Make the model and its slices; what is there whole already stays."""
    tell(f"making {arguments.shape} in {arguments.dir}")
    started = time.monotonic()
    options = ["--world-size", str(arguments.world_size), "--out", str(arguments.dir)]
    options += ["--shape", arguments.shape, "--quantize", arguments.quantize]
    run_tpirt("synth", *options)
    tell(f"made, or found, in {time.monotonic() - started:.0f} s")


def remove_model(folder: Path) -> None:
    """Remove what ``tpirt synth`` put into a folder, and the folder if that was all."""
    if not is_synthetic(folder):
        return
    shutil.rmtree(folder / SLICES, ignore_errors=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", MARKER):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def measure_disk(arguments: argparse.Namespace, rates: dict[int, list[float]]) -> None:
    """Read the slices' files raw, some other ones in each pass; adds to ``rates``."""
    paths = sorted((arguments.dir / SLICES).glob("*/*.safetensors"), key=lambda path: path.name)
    for _ in range(arguments.passes):
        for readers, seen in rates.items():
            seen.append(read_rate(every_nth(paths, _PASS_BYTES, len(seen)), readers))
            tell(f"raw direct reads, {readers} readers: {seen[-1] / 1e9:.2f} GB/s")


def run(arguments: argparse.Namespace) -> LimitedRun:
    """Generate over all ranks, each with one thread and within the limit."""
    store = str(arguments.dir / SLICES)
    done = run_limited(
        arguments.world_size,
        arguments.memory,
        ["--threads", "1", "--store", store],
        {
            "model": str(arguments.dir),
            "quantize": arguments.quantize,
            "collective": arguments.collective,
            "store": store,
            "threads": 1,
            "timeout_s": _TIMEOUT_S,
        },
        prompt_tokens=arguments.prompt_tokens,
        tokens=arguments.tokens,
    )
    tell(f"sums: {done.request.collective}, {done.request.comm_dtype}")
    return done


def evaluate(done: LimitedRun, raw_rates: dict[int, list[float]]) -> Result:
    """Put the figures of a run together."""
    request = done.request
    token_s = request.tpot_ms / 1e3

    def per_token(first: dict[str, float], last: dict[str, float], name: str) -> float:
        return (last[name] - first[name]) / request.tokens

    ranks = [
        Rank(
            peak_rss_bytes=last["peak_rss_bytes"],
            peak_cgroup_bytes=done.peak_bytes[number],
            cache_bytes=done.cache_bytes[number],
            weights_bytes=last["weights_bytes"],
            read_bytes=per_token(first, last, "bytes_read"),
            io_s=per_token(first, last, "io_ms") / 1e3,
            compute_s=per_token(first, last, "compute_ms") / 1e3,
            comm_s=per_token(first, last, "comm_ms") / 1e3,
        )
        for number, (first, last) in enumerate(zip(request.first, request.ranks, strict=True))
    ]
    rate = max(
        statistics.median(half)
        for rates in raw_rates.values()
        for half in _before_and_after(rates)
        if half
    )
    read = sum(rank.read_bytes for rank in ranks)
    compute_s = max(rank.compute_s for rank in ranks)
    ratio = token_s / max(read / rate, compute_s)
    return Result(
        ttft_s=request.ttft_ms / 1e3,
        token_s=token_s,
        weights_bytes=sum(rank.weights_bytes for rank in ranks),
        read_bytes_per_token=read,
        raw_rates=raw_rates,
        rate=rate,
        disk_floor_s=read / rate,
        compute_s=compute_s,
        ratio=ratio,
        valid=ratio >= 1,
        ranks=ranks,
    )


def _before_and_after(rates: list[float]) -> tuple[list[float], list[float]]:
    """The passes before the run and those after it."""
    middle = len(rates) // 2
    return rates[:middle], rates[middle:]


def show(arguments: argparse.Namespace, result: Result) -> None:
    """Print the table for people."""
    print(
        f"{arguments.shape} in {arguments.quantize}: {format_bytes(result.weights_bytes)} over "
        f"{arguments.world_size} ranks of {format_bytes(arguments.memory)}, {os.cpu_count()} cores"
    )
    print("rank   peak RSS     cgroup      cache   read/token   waits for: disk  compute   peers")
    for number, rank in enumerate(result.ranks):
        print(
            f"{number:4d} {format_bytes(rank.peak_rss_bytes):>10} "
            f"{_bytes(rank.peak_cgroup_bytes):>10} {_bytes(rank.cache_bytes):>10} "
            f"{format_bytes(rank.read_bytes):>12} {rank.io_s:14.2f} s {rank.compute_s:6.2f} s "
            f"{rank.comm_s:5.2f} s"
        )
    for readers, rates in result.raw_rates.items():
        seen = ", ".join(f"{rate / 1e9:.2f}" for rate in rates)
        print(f"raw direct reads, {readers} readers: {seen} GB/s")
    # Either may be the larger: a cgroup counts file cache, but libraries only for their first user.
    peak = max(max(rank.peak_rss_bytes, rank.peak_cgroup_bytes or 0) for rank in result.ranks)
    rows = [("this run", result.ttft_s, result.token_s, peak)]
    if published := _PUBLISHED.get(arguments.shape):
        figures = (published["ttft_s"], published["token_s"], int(published["peak_bytes"]))
        rows.append(("TPI-LLM, published", *figures))
    print("                       TTFT    per token   peak memory per peer")
    for name, ttft_s, token_s, peak_bytes in rows:
        print(f"{name:18} {ttft_s:7.2f} s {token_s:10.2f} s {peak_bytes / 1e9:16.2f} GB")
    print(
        f"read per token {result.read_bytes_per_token / 1e9:.2f} GB, floor: disk "
        f"{result.disk_floor_s:.2f} s, compute {result.compute_s:.2f} s; ratio {result.ratio:.2f}"
    )
    if not result.valid:
        print("INVALID: faster than its floor, so the raw readers did not reach the disk's limit")


def _bytes(figure: int | None) -> str:
    return "-" if figure is None else format_bytes(figure)


def main(argv: Sequence[str]) -> int:
    """Parse arguments, make, measure, print, remove."""
    parser = new_parser("bench.scale70b", __doc__)
    parser.add_argument("--shape", default="llama-2-70b", help="as of `tpirt synth`")
    parser.add_argument("--quantize", default="int4")
    parser.add_argument("--world-size", type=count, default=8)
    parser.add_argument("--memory", type=size, default=10**9, help="of each rank (default 1e9)")
    parser.add_argument("--dir", type=Path, required=True, help="where the model is made")
    parser.add_argument("--keep", action="store_true", help="do not remove the model after")
    parser.add_argument("--collective", default="auto", help="as of `tpirt generate`")
    parser.add_argument("--tokens", type=count, default=4)
    parser.add_argument("--prompt-tokens", type=count, default=8)
    parser.add_argument("--passes", type=count, default=3, help="raw ones, before and after each")
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    record = Record("scale70b", argv, arguments)
    rates: dict[int, list[float]] = {readers: [] for readers in (2, arguments.world_size)}
    try:
        make_model(arguments)
        measure_disk(arguments, rates)
        done = run(arguments)
        measure_disk(arguments, rates)
        result = evaluate(done, rates)
    finally:
        if not arguments.keep:
            remove_model(arguments.dir)
    show(arguments, result)
    record.finish({"published": _PUBLISHED.get(arguments.shape), **asdict(result)})
    return 0


if __name__ == "__main__":
    sys.exit(end_like_a_command(lambda: main(sys.argv[1:])))
