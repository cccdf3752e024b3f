"""Products of quantized and 16-bit matrices in C: time, and the rate at which weights are read.

    python -m bench.kernels --minutes 10 --json kernels.json

The shapes are those of a block of the ``bench-1.1b`` model, and one that is larger. Matrices of one
shape lie in memory one after another, 512 MiB of them, and are multiplied by turns, as a decoded
token does: so none of them is in the caches, unless those are larger. The floor is the time that
reading the same bytes takes, at the rate measured in the same run, in the same memory, with the
same threads. A ratio of 1 is as fast as memory.

``native`` rows are the C functions alone, without rounding their inputs. ``dense`` rows are
torch's products with matrices dequantized piece by piece, which is how long prompts may be
computed; their weights are read once, too. What lies between products is in a table of its own.

Times are medians over calls. One run measures every format, shape and set of instructions that is
here, and shares its minutes out evenly: fewer mean fewer calls of each. Several rows of input that
would take too long (plain C) are left out.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.lib.command import end_like_a_command, new_parser, values
from bench.lib.kernel_calls import Kernel, Weights, between, half_kernels, tile_kernels
from bench.lib.native_functions import NativeFunctions
from bench.lib.record import Record, add_json_option
from tpirt.cli.options import count, size
from tpirt.errors import ConfigError
from tpirt.ops.native.library import load
from tpirt.ops.quant import SCHEMES

Shape = tuple[int, int]

SHAPES: list[Shape] = [(2048, 2048), (3072, 2048), (16384, 2048), (2048, 8192), (28672, 4096)]
_FORMATS = ("int4", "nl4", "int8", "bf16", "f16")
_GLUE_ROWS = (1, 8)

_FEWEST_CALLS = 4
_PATIENCE = 4  # times its share of the run that a measurement may take, or is left out
_LEAST_S = 0.1  # or this long


@dataclass(frozen=True)
class Product:
    """One product: ``rows`` of input with an (N, K) matrix.

    Attributes:
        format: of the matrix.
        kernel: a set of instructions, or torch's kernel.
        read_bytes_per_s: measured in the same run.
        ratio: of the time that reading takes, to the time of the product.
    """

    format: str
    kernel: str
    threads: int
    out_features: int
    in_features: int
    rows: int
    ms: float
    best_ms: float
    weights_bytes: int
    bytes_per_s: float
    weights_per_s: float
    read_bytes_per_s: float
    ratio: float


@dataclass(frozen=True)
class Glue:
    """One function between products, for ``rows`` of ``width`` inputs or past tokens."""

    function: str
    kernel: str
    threads: int
    rows: int
    width: int
    us: float
    best_us: float


@dataclass(frozen=True)
class Times:
    """Seconds of one call."""

    median: float
    best: float


def timed(call: Callable[[], object], seconds: float) -> Times:
    """Call a function a few times at least, for about as many seconds."""
    began = now = time.perf_counter()
    call()  # starts threads, fills the caches that are meant to be full
    taken: list[float] = []
    while len(taken) < _FEWEST_CALLS or now - began < seconds:
        before = time.perf_counter()
        call()
        now = time.perf_counter()
        taken.append(now - before)
    return Times(statistics.median(taken), min(taken))


class Budget:
    """Time for some parts of a run: each gets an even share of what is left."""

    def __init__(self, seconds: float, parts: int):
        self._end = time.monotonic() + seconds
        self._left = parts

    def share(self) -> float:
        """Seconds for the next part."""
        left = max(0.0, self._end - time.monotonic())
        self._left -= 1
        return left / (self._left + 1)


def fits(expected_s: float, share_s: float) -> bool:
    """Whether a call that takes so long can be measured in about its share of the run."""
    return expected_s * (_FEWEST_CALLS + 1) <= max(_LEAST_S, _PATIENCE * share_s)


@dataclass(frozen=True)
class Place:
    """What all measurements with the same number of threads share."""

    functions: NativeFunctions
    threads: int
    weights: Weights

    def read_rate(self) -> float:
        """Bytes per second that the threads read from memory."""
        times = timed(lambda: self.functions.read(self.weights.memory), 0)
        return len(self.weights.memory) / times.median


def measure_products(
    place: Place,
    shape: Shape,
    format: str,
    sets: Sequence[str],
    rows: Sequence[int],
    seconds: float,
) -> Iterator[Product]:
    """Measure all kernels for one shape and format; leaves out what would take too long."""
    make = tile_kernels if format in SCHEMES else half_kernels
    kernels = make(place.functions, place.weights, format, *shape, sets)
    budget = Budget(seconds, 1 + len(kernels) * len(rows))
    read_rate = place.read_rate()
    budget.share()
    for kernel in kernels:
        expected_s = 0.0  # of a row
        for number in rows:
            share_s = budget.share()
            if number < kernel.fewest_rows or not fits(expected_s * number, share_s):
                continue
            times = timed(kernel.prepare(torch.randn(number, shape[1])), share_s)
            expected_s = times.best / number
            yield product(kernel, place.threads, shape, number, times, read_rate)


def product(
    kernel: Kernel,
    threads: int,
    shape: tuple[int, int],
    rows: int,
    times: Times,
    read_rate: float,
) -> Product:
    """Put one measurement together."""
    bytes_per_s = kernel.weights_bytes / times.median
    return Product(
        format=kernel.format,
        kernel=kernel.name,
        threads=threads,
        out_features=shape[0],
        in_features=shape[1],
        rows=rows,
        ms=times.median * 1e3,
        best_ms=times.best * 1e3,
        weights_bytes=kernel.weights_bytes,
        bytes_per_s=bytes_per_s,
        weights_per_s=shape[0] * shape[1] / times.median,
        read_bytes_per_s=read_rate,
        ratio=bytes_per_s / read_rate,
    )


def measure_glue(
    place: Place, sets: Sequence[str], rows: Sequence[int], seconds: float
) -> Iterator[Glue]:
    """Measure what lies between products, as far as the library has it."""
    calls = [
        (name, number, *each)
        for name in sets
        for number in rows
        for each in between(place.functions, place.functions.sets()[name], number)
    ]
    budget = Budget(seconds, len(calls))
    for name, number, function, width, call in calls:
        times = timed(call, budget.share())
        yield Glue(
            function,
            name,
            place.threads,
            number,
            width,
            times.median * 1e6,
            times.best * 1e6,
        )


def show_product(row: Product) -> None:
    """Print a line for people."""
    print(
        f"{row.format:6} {row.kernel:15} {row.threads:3d} {row.out_features:6d} x "
        f"{row.in_features:<5d} {row.rows:4d} {row.ms:9.3f} {row.bytes_per_s / 1e9:7.1f} "
        f"{row.weights_per_s / 1e9:7.1f} {row.read_bytes_per_s / 1e9:7.1f} {row.ratio:6.2f}",
        flush=True,
    )


def show_glue(row: Glue) -> None:
    """Print a line for people."""
    print(
        f"{row.function:8} {row.kernel:15} {row.threads:3d} {row.rows:4d} {row.width:6d} "
        f"{row.us:9.1f}",
        flush=True,
    )


def main(argv: Sequence[str]) -> int:
    """Parse arguments, measure, print."""
    arguments = _parse(argv)
    library = arguments.library or _used_library()
    weights = Weights(arguments.memory)
    record = Record("kernels", argv, arguments)
    about = record.environment
    print(f"{about.cpu}: {' '.join(about.cpu_flags)}; tpirt {(about.commit or 'unknown')[:10]}")
    products: list[Product] = []
    glue: list[Glue] = []
    cases = list(itertools.product(arguments.shapes, arguments.formats))
    # What lies between products is a part like a shape in a format.
    budget = Budget(60 * arguments.minutes, len(arguments.threads) * (len(cases) + 1))
    threads_before = torch.get_num_threads()
    print(
        "format kernel          thr       N x K     rows        ms    GB/s  Gwgt/s    read  ratio"
    )
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        with NativeFunctions(library, threads) as functions:
            place = Place(functions, threads, weights)
            sets = _chosen_sets(functions, arguments.sets)
            for case in cases:
                for row in measure_products(place, *case, sets, arguments.rows, budget.share()):
                    products.append(row)
                    show_product(row)
    print("function kernel         thr rows  width        us")
    for threads in arguments.threads:
        with NativeFunctions(library, threads) as functions:
            place = Place(functions, threads, weights)
            sets = _chosen_sets(functions, arguments.sets)
            for between in measure_glue(place, sets, _GLUE_ROWS, budget.share()):
                glue.append(between)
                show_glue(between)
    torch.set_num_threads(threads_before)
    record.finish(
        {"products": [asdict(row) for row in products], "glue": [asdict(row) for row in glue]}
    )
    return 0


def _chosen_sets(functions: NativeFunctions, wanted: Sequence[str]) -> list[str]:
    """Sets of instructions to measure, the best first.

    Raises:
        ConfigError: one of those wanted does not run here.
    """
    here = list(functions.sets())[::-1]
    if unknown := set(wanted) - set(here):
        raise ConfigError(f"--sets: expected {', '.join(here)}, got {', '.join(unknown)}")
    return [name for name in here if not wanted or name in wanted]


def _used_library() -> Path:
    """The library that tpirt uses.

    Raises:
        ConfigError: there is none.
    """
    found = load()
    if found.path is None:
        raise ConfigError(f"no native kernels: {found.note}")
    return found.path


def _shape(text: str) -> Shape:
    rows, _, columns = text.partition("x")
    return count(rows), count(columns)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("bench.kernels", __doc__)
    parser.add_argument("--threads", type=values(count), default=[1, 2], metavar="N,...")
    parser.add_argument(
        "--shapes", type=values(_shape), default=SHAPES, metavar="NxK,...", help="multiples of 32"
    )
    parser.add_argument(
        "--rows", type=values(count), default=[1, 2, 4, 8, 32, 128], metavar="N,..."
    )
    parser.add_argument("--formats", type=values(str), default=list(_FORMATS), metavar="NAME,...")
    parser.add_argument(
        "--sets", type=values(str), default=[], metavar="NAME,...", help="of instructions"
    )
    parser.add_argument(
        "--memory", type=size, default=512 << 20, metavar="SIZE", help="of matrices to go through"
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, metavar="M", help="for the whole run (default 10)"
    )
    parser.add_argument("--library", type=Path, metavar="FILE", help="default: what tpirt uses")
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.formats) - set(_FORMATS):
        parser.error(f"--formats: expected {', '.join(_FORMATS)}, got {', '.join(unknown)}")
    return arguments


if __name__ == "__main__":
    sys.exit(end_like_a_command(lambda: main(sys.argv[1:])))
