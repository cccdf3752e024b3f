"""Token time and peak memory over a sweep of memory limits, each rank in a real one.

    python -m bench.window --model DIR --quantize int8 --local 2 --share 25,50,75,100

A limit is what the process takes anyway plus a share of the rank's weights. The floor of a token
is the bytes streamed for it over the rate at which this disk gives direct reads, measured in the
same run, or the token time with everything resident, whichever is longer: ranks on one machine
share its disk, so their bytes add up. A ratio below 1 says that the disk gave less to the raw
measurement than to the run (seen on virtual disks: 1.1 to 3.1 GB/s from one pass to the next);
such a row proves nothing about the floor.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.cgroup import MemoryCgroup, memory_cgroup
from tpirt.cli.options import count
from tpirt.cluster.machine import default_threads
from tpirt.ops.buffers import page_buffer, tensor_bytes
from tpirt.units import format_bytes
from tpirt.weights.reader import buffer_bytes, read_file
from tpirt.weights.store import SliceStore

_MIB = 1 << 20
_OVERHEAD_BYTES = 420 * _MIB  # process, activations, slack: what a rank needs beside weights


@dataclass(frozen=True)
class Row:
    """One limit: medians over trials; memory is that of the rank that needed most."""

    share: float
    limit_bytes: int
    tpot_ms: float
    read_bytes_per_token: float
    disk_floor_ms: float
    ratio: float
    peak_rss_bytes: int
    peak_cgroup_bytes: int | None
    cache_bytes: int | None


def tpirt(*arguments: str) -> list[str]:
    """The command line of this tpirt."""
    return [sys.executable, "-m", "tpirt", *arguments]


@contextmanager
def worker(options: list[str], group: MemoryCgroup) -> Iterator[str]:
    """Run a worker inside ``group``; yields its address."""
    command = tpirt("peer", "--listen", "127.0.0.1:0", "--until-stdin-closes", "--quiet", *options)
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, preexec_fn=group.enter
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[2]
        finally:
            process.stdin.close()
            process.wait(30)


def run(arguments: argparse.Namespace, limit: int | None) -> dict[str, Any]:
    """Generate once over ``arguments.local`` ranks; with a limit, each in a cgroup of its own."""
    shared = ["--store", str(arguments.store), "--threads", str(arguments.threads)]
    if limit is not None:
        shared += ["--memory", str(limit)]
    with ExitStack() as stack:
        groups = [
            stack.enter_context(memory_cgroup(f"rank{rank}", limit, warn))
            if limit is not None
            else MemoryCgroup(None)
            for rank in range(arguments.local)
        ]
        peers = [stack.enter_context(worker(shared, group)) for group in groups[1:]]
        command = tpirt("generate", "--quiet", "--json", "--quantize", arguments.quantize, *shared)
        command += ["--model", str(arguments.model), "--max-tokens", str(arguments.tokens)]
        command += ["--prompt", "a b c d e f g h", "--temperature", "0"]
        if peers:
            command += ["--peers", ",".join(peers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=groups[0].enter)
        if done.returncode:
            raise SystemExit(f"tpirt generate ended with exit code {done.returncode}")
        # The figures are read while the groups are still there.
        facts = [(g.peak_bytes(), g.cache_bytes()) for g in groups]
    result: dict[str, Any] = json.loads(done.stdout)
    result["cgroups"] = facts
    return result


def disk_rate(store: Path) -> float:
    """Bytes per second of direct reads, one thread: the best of four passes over the store.

    The first pass after writing is slower on virtual disks, whose host caches too: a floor must
    not be taken from it.
    """
    paths = list(store.glob("*/*.safetensors"))
    sizes = [path.stat().st_size for path in paths]
    target = tensor_bytes(page_buffer(buffer_bytes(max(sizes))))
    best = 0.0
    for _ in range(4):
        started = time.perf_counter()
        for path, nbytes in zip(paths, sizes, strict=True):
            read_file(path, 0, target[: buffer_bytes(nbytes)], nbytes)
        best = max(best, sum(sizes) / (time.perf_counter() - started))
    return best


def warn(text: str) -> None:
    """Tell what the figures lack."""
    print(text, file=sys.stderr)


def measure(arguments: argparse.Namespace, share: float, resident_ms: float, rate: float) -> Row:
    """Run one limit several times."""
    weights = max(s.manifest.nbytes for s in SliceStore(arguments.store).slices())
    limit = int(_OVERHEAD_BYTES + share * weights)
    results = [run(arguments, limit) for _ in range(arguments.trials)]
    results.sort(key=lambda result: result["tpot_ms"])
    middle = results[len(results) // 2]
    read = sum(rank["bytes_read"] for rank in middle["ranks"]) / len(middle["token_ids"])
    floor = read / rate * 1e3
    peaks = [peak for result in results for peak, _ in result["cgroups"] if peak is not None]
    caches = [cache for result in results for _, cache in result["cgroups"] if cache is not None]
    return Row(
        share=share,
        limit_bytes=limit,
        tpot_ms=middle["tpot_ms"],
        read_bytes_per_token=read,
        disk_floor_ms=floor,
        ratio=middle["tpot_ms"] / max(floor, resident_ms),
        peak_rss_bytes=max(r["peak_rss_bytes"] for result in results for r in result["ranks"]),
        peak_cgroup_bytes=max(peaks, default=None),
        cache_bytes=max(caches, default=None),
    )


def show(rows: list[Row], resident_ms: float, rate: float) -> None:
    """Print the table for people."""
    print(f"resident {resident_ms:.1f} ms per token; direct reads {rate / 1e9:.2f} GB/s")
    print("weights     limit   TPOT ms   read/token   floor ms   ratio   peak RSS     cgroup")
    for row in rows:
        peak = "-" if row.peak_cgroup_bytes is None else format_bytes(row.peak_cgroup_bytes)
        print(
            f"{row.share:6.0%} {format_bytes(row.limit_bytes):>10} {row.tpot_ms:9.1f} "
            f"{format_bytes(row.read_bytes_per_token):>12} {row.disk_floor_ms:10.1f} "
            f"{row.ratio:7.2f} {format_bytes(row.peak_rss_bytes):>10} {peak:>10}"
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
    parser.add_argument("--tokens", type=count, default=12)
    parser.add_argument("--trials", type=count, default=5)
    arguments = parser.parse_args()
    arguments.threads = arguments.threads or default_threads(arguments.local)
    run(arguments, None)  # makes the slices, warms up
    resident = sorted(run(arguments, None)["tpot_ms"] for _ in range(arguments.trials))
    resident_ms = resident[len(resident) // 2]
    rate = disk_rate(arguments.store)
    shares = [float(share) / 100 for share in arguments.share.split(",")]
    rows = [measure(arguments, share, resident_ms, rate) for share in shares]
    show(rows, resident_ms, rate)
    settings = {key: str(value) for key, value in vars(arguments).items()}
    print(
        json.dumps(
            {
                "bench": "window",
                "settings": settings,
                "resident_ms": resident_ms,
                "disk_bytes_per_s": rate,
                "rows": [asdict(row) for row in rows],
            }
        )
    )


if __name__ == "__main__":
    main()
