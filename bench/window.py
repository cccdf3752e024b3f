"""Token time and peak memory over a sweep of memory limits, each rank in a real one.

    python -m bench.window --model DIR --store DIR --quantize int8 --share 25,50,75,100

A limit is what a process takes anyway plus a share of the rank's weights. The floor of a decoded
token is the bytes that all ranks read for it over the rate of raw direct readers of the same files
(before and after each row; the better of two readers and two per rank, the median of the passes),
or the token time with everything resident, whichever is longer: ranks on one machine share its
disk. ``--disk-rate`` throttles the disk for ranks and raw readers alike: a disk of a known rate,
where a virtual one gives now this and now that. A row faster than its floor shows that the floor
was measured wrong and says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.cgroup import disk_cgroup
from bench.peers import GroupRun, run_group, tpirt, warn
from tpirt.cli.options import count, size
from tpirt.cluster.machine import default_threads
from tpirt.units import format_bytes
from tpirt.weights.store import SliceStore

_MIB = 1 << 20
_PROCESS_BYTES = 360 * _MIB  # Python, torch, a step's work: what a rank needs beside weights


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


def run(arguments: argparse.Namespace, limit: int | None) -> GroupRun:
    """Generate once over all ranks."""
    shared = ["--store", str(arguments.store), "--threads", str(arguments.threads)]
    master = [sys.executable, "-m", "bench.decode", "--quiet", "--model", str(arguments.model)]
    master += ["--quantize", arguments.quantize, "--tokens", str(arguments.tokens)]
    master += ["--prompt-tokens", "16"]
    return run_group(arguments.local, limit, shared, master)


def raw_rates(arguments: argparse.Namespace) -> dict[int, float]:
    """Bytes per second by number of raw readers, in a process that the throttle can hold."""
    rates = {}
    for readers in sorted({2, 2 * arguments.local}):
        command = [sys.executable, "-m", "bench.disk", str(arguments.store), str(readers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        rates[readers] = float(done.stdout)
    return rates


def measure(arguments: argparse.Namespace, share: float, resident_ms: float) -> Row:
    """Run one limit several times, raw readers before and after."""
    weights = max(s.manifest.nbytes for s in SliceStore(arguments.store).slices())
    limit = int(_PROCESS_BYTES + share * weights)
    raw = [raw_rates(arguments)]
    runs = []
    for _ in range(arguments.trials):
        runs.append(run(arguments, limit))
        raw.append(raw_rates(arguments))
    runs.sort(key=lambda done: float(done.printed["token_s"]))
    middle = runs[len(runs) // 2].printed
    tokens = int(middle["tokens"])
    ranks = list(zip(middle["first"], middle["last"], strict=True))
    read = sum(last["bytes_read"] - first["bytes_read"] for first, last in ranks) / tokens
    rate = max(statistics.median(rates[n] for rates in raw) for n in raw[0])
    token_ms, floor_ms = middle["token_s"] * 1e3, read / rate * 1e3
    ratio = token_ms / max(floor_ms, resident_ms)
    return Row(
        share=share,
        limit_bytes=limit,
        ttft_ms=middle["ttft_s"] * 1e3,
        token_ms=token_ms,
        read_bytes_per_token=read,
        disk_bytes_per_s=rate,
        disk_floor_ms=floor_ms,
        ratio=ratio,
        valid=not read or ratio > 0.98,
        stall_disk_ms=max(last["io_ms"] - first["io_ms"] for first, last in ranks) / tokens,
        peak_rss_bytes=max(r["peak_rss_bytes"] for done in runs for r in done.printed["last"]),
        peak_cgroup_bytes=_most(peak for done in runs for peak in done.peak_bytes),
        cache_bytes=_most(cache for done in runs for cache in done.cache_bytes),
    )


def _most(figures: object) -> int | None:
    return max((f for f in figures if f is not None), default=None)  # type: ignore[attr-defined]


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


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True, help="a folder of its own")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--local", type=count, default=1)
    parser.add_argument("--threads", type=count)
    parser.add_argument("--share", default="25,50,75,100", help="percent of the weights")
    parser.add_argument("--disk-rate", type=size, help="throttle the disk to so much a second")
    parser.add_argument("--tokens", type=count, default=16)
    parser.add_argument("--trials", type=count, default=3)
    parser.add_argument("--out", type=Path, help="where the JSON goes, beside the last line")
    arguments = parser.parse_args()
    arguments.threads = arguments.threads or default_threads(arguments.local)
    split = tpirt("generate", "--model", str(arguments.model), "--quantize", arguments.quantize)
    split += ["--local", str(arguments.local), "--store", str(arguments.store), "--quiet"]
    subprocess.run([*split, "--prompt", "a", "--max-tokens", "1"], check=True, stdout=-3)
    resident = sorted(
        float(run(arguments, None).printed["token_s"]) for _ in range(arguments.trials)
    )
    resident_ms = resident[len(resident) // 2] * 1e3
    rate = arguments.disk_rate
    with disk_cgroup(arguments.store, rate, warn) if rate else nullcontext():
        rows = []
        for share in arguments.share.split(","):
            rows.append(measure(arguments, float(share) / 100, resident_ms))
            warn(f"{share} %: {rows[-1].token_ms:.1f} ms per token")
    show(rows, resident_ms)
    settings = {k: str(v) for k, v in vars(arguments).items() if k not in ("store", "out")}
    settings["model"] = arguments.model.name
    content = {
        "bench": "window",
        "settings": settings,
        "resident_ms": resident_ms,
        "rows": [asdict(row) for row in rows],
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content))


if __name__ == "__main__":
    main()
