"""tpirt, llama.cpp and distributed-llama by turns on this machine: the same model, bits, threads.

    python -m bench.peers --model DIR --store DIR --llama-bench FILE --gguf DIR \\
        --dllama FILE --dllama-model FILE

One process is measured against llama.cpp at 4, 8 and 16 bits (Q4_0, Q8_0, F16), and against
distributed-llama at 4 bits; two processes of one thread each, which talk over loopback, against
distributed-llama. A program whose file is not given is left out. The bench's README says how to
build the programs and make the files.

Figures are tokens per second: of a prompt, or of decoding, where they are the tokens after the
first divided by the time of all of them. tpirt's include everything from token to token; the
others report their computation and leave out drawing the token. Every program does its work once
before it counts, except for distributed-llama, which has no such option.

In a round, every program runs once in every case, in processes of its own. The order is reversed
from round to round: a machine that slows down or speeds up costs all the same. The ratio is
tpirt's figure to the other's of the same round: its median, the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench.lib.command import end_like_a_command, new_parser, tell, values
from bench.lib.environment import Environment, git_state
from bench.lib.group import Group, LocalPlace
from bench.lib.record import Record, add_json_option
from bench.lib.rivals import DECODE, Dllama, LlamaBench, prompt_name, write_dllama_tokenizer
from tpirt.cli.options import count
from tpirt.errors import ConfigError
from tpirt.ops.native.library import load

_FORMATS: Mapping[int, Mapping[str, str]] = {
    4: {"quantize": "int4"},
    8: {"quantize": "int8"},
    16: {"quantize": "none", "dtype": "bfloat16"},
}
_GGUF_ENDINGS = {4: "q4_0.gguf", 8: "q8_0.gguf", 16: "f16.gguf"}
_WARM_UP_TOKENS = 8
_DECODE_PROMPT = 8  # llama.cpp decodes from an empty cache


class Program(Protocol):
    """One that is measured."""

    @property
    def name(self) -> str: ...

    def run(
        self, bits: int, processes: int, threads: int, prompts: Sequence[int], tokens: int
    ) -> dict[str, float]:
        """Measure once, in new processes; returns tokens per second by what was measured."""
        ...


@dataclass(frozen=True)
class Tpirt:
    """The tpirt of this checkout.

    Attributes:
        formats: keyword arguments of ``Engine.connect`` by number of bits.
    """

    model: Path
    store: Path | None
    formats: Mapping[int, Mapping[str, str]] = field(default_factory=lambda: _FORMATS)
    name = "tpirt"

    def run(
        self, bits: int, processes: int, threads: int, prompts: Sequence[int], tokens: int
    ) -> dict[str, float]:
        """See :class:`Program`."""
        options: dict[str, Any] = {"model": str(self.model), **self.formats[bits]}
        if self.store is not None:
            options["store"] = str(self.store)
        with Group([LocalPlace()]) as group:
            group.connect(local=processes, threads=threads, **options)
            group.generate(max(prompts), _WARM_UP_TOKENS)
            rates = {DECODE: 1e3 / group.generate(_DECODE_PROMPT, tokens).tpot_ms}
            for prompt in prompts:
                group.generate(prompt, 1)
                rates[prompt_name(prompt)] = prompt * 1e3 / group.generate(prompt, 1).ttft_ms
        return rates


@dataclass(frozen=True)
class Case:
    """What is measured with which programs, tpirt first.

    Attributes:
        threads: of each process.
    """

    bits: int
    processes: int
    threads: int
    programs: Sequence[Program]

    def __str__(self) -> str:
        return f"{self.bits} bits, {self.processes} x {self.threads}"


Rates = dict[str, float]
Rounds = dict[str, list[Rates]]  # by program


@dataclass(frozen=True)
class Row:
    """One figure of a case, of tpirt and one other program; tokens per second.

    Attributes:
        figure: ``decode``, or ``prompt`` and its number of tokens.
        tpirt, other: medians.
        ratio: tpirt's to the other's: the median of the rounds, the lowest and the highest.
        tpirt_rounds, other_rounds: all of them.
    """

    bits: int
    processes: int
    threads: int
    figure: str
    program: str
    tpirt: float
    other: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float
    tpirt_rounds: list[float]
    other_rounds: list[float]


def find_gguf(folder: Path, bits: int) -> Path:
    """The file of so many bits.

    Raises:
        ConfigError: there is none, or more than one.
    """
    ending = _GGUF_ENDINGS[bits]
    found = [path for path in folder.glob("*.gguf") if path.name.lower().endswith(ending)]
    if len(found) != 1:
        raise ConfigError(f"{folder}: expected one file *{ending}, found {len(found)}")
    return found[0]


def cases(
    tpirt: Program,
    llama: Program | None,
    dllama: Program | None,
    bits: Iterable[int],
    threads: int,
) -> list[Case]:
    """What to measure: one process at each number of bits, then two where there is a rival."""
    found = []
    for each in bits:
        programs = [tpirt, llama, dllama if each == 4 else None]
        found.append(Case(each, 1, threads, [program for program in programs if program]))
        if each == 4 and dllama is not None:
            found.append(Case(each, 2, 1, [tpirt, dllama]))
    return [case for case in found if len(case.programs) > 1]


def run_rounds(
    cases: Sequence[Case], rounds: int, prompts: Sequence[int], tokens: int
) -> list[Rounds]:
    """Run all programs of all cases by turns; returns each case's figures."""
    results: list[Rounds] = [{program.name: [] for program in case.programs} for case in cases]
    for number in range(rounds):
        for case, result in zip(cases, results, strict=True):
            for program in case.programs[:: -1 if number % 2 else 1]:
                tell(f"round {number + 1} of {rounds}: {case}: {program.name}")
                rates = program.run(case.bits, case.processes, case.threads, prompts, tokens)
                result[program.name].append(rates)
    return results


def summarize(case: Case, result: Rounds) -> list[Row]:
    """Compare tpirt with every other program of a case."""
    first, *others = (program.name for program in case.programs)
    return [
        _row(case, other, figure, result[first], result[other])
        for figure in result[first][0]
        for other in others
    ]


def _row(case: Case, program: str, figure: str, ours: list[Rates], others: list[Rates]) -> Row:
    tpirt, other = ([rates[figure] for rates in side] for side in (ours, others))
    ratios = [mine / its for mine, its in zip(tpirt, other, strict=True)]
    return Row(
        bits=case.bits,
        processes=case.processes,
        threads=case.threads,
        figure=figure,
        program=program,
        tpirt=statistics.median(tpirt),
        other=statistics.median(other),
        ratio=statistics.median(ratios),
        lowest_ratio=min(ratios),
        highest_ratio=max(ratios),
        tpirt_rounds=tpirt,
        other_rounds=other,
    )


def show(rows: Sequence[Row], environment: Environment, kernels: str) -> None:
    """Print the table for people."""
    commit = (environment.commit or "unknown")[:10] + ("-dirty" if environment.dirty else "")
    print(f"{environment.cpu}: {' '.join(environment.cpu_flags)}; tpirt {commit}, {kernels}")
    print("tokens per second: median, lowest to highest; ratio: tpirt's to the other's")
    print(
        f"bits  procs  figure       {'tpirt':>23}  {'program':17}  {'its':>23}"
        "   ratio  lowest  highest"
    )
    for row in rows:
        print(
            f"{row.bits:4d}  {row.processes} x {row.threads:<2d} {row.figure:11} "
            f"{_spread(row.tpirt, row.tpirt_rounds):>24}  {row.program:17}  "
            f"{_spread(row.other, row.other_rounds):>23} {row.ratio:7.2f} "
            f"{row.lowest_ratio:7.2f} {row.highest_ratio:8.2f}"
        )


def _spread(median: float, rounds: Sequence[float]) -> str:
    return f"{median:.1f} ({min(rounds):.1f} to {max(rounds):.1f})"


def versions(programs: Mapping[str, Path | None]) -> dict[str, Any]:
    """The commit that each program's folder is a checkout of; None for another folder."""
    found = {}
    for name, path in programs.items():
        if path is not None:
            root = _checkout(path.resolve().parent)
            found[name] = git_state(root)[0] if root else None
    return found


def _checkout(folder: Path) -> Path | None:
    done = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--show-toplevel"], capture_output=True, text=True
    )
    return Path(done.stdout.strip()) if done.returncode == 0 else None


def _vocab_size(model: Path) -> int:
    try:
        return int(json.loads((model / "config.json").read_bytes())["vocab_size"])
    except (OSError, ValueError, KeyError) as exc:
        raise ConfigError(f"{model}: no config.json with a vocab_size") from exc


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("bench.peers", __doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="of tpirt")
    parser.add_argument("--store", type=Path, metavar="DIR", help="of tpirt's slices")
    parser.add_argument("--llama-bench", type=Path, metavar="FILE", help="llama.cpp's program")
    parser.add_argument(
        "--gguf", type=Path, metavar="DIR", help="of *q4_0.gguf, *q8_0.gguf, *f16.gguf"
    )
    parser.add_argument("--dllama", type=Path, metavar="FILE", help="distributed-llama's program")
    parser.add_argument("--dllama-model", type=Path, metavar="FILE", help="4-bit, *.m")
    parser.add_argument("--bits", type=values(int), default=[4, 8, 16], metavar="N,...")
    parser.add_argument("--threads", type=count, default=2, metavar="N", help="of one process")
    parser.add_argument("--prompts", type=values(count), default=[128, 512], metavar="N,...")
    parser.add_argument("--tokens", type=count, default=64, metavar="N", help="to decode")
    parser.add_argument("--rounds", type=count, default=6, metavar="N")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="bfloat16",
        help="of tpirt at 16 bits (default bfloat16)",
    )
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    if set(arguments.bits) - set(_FORMATS):
        parser.error(f"--bits: expected {', '.join(map(str, _FORMATS))}")
    for program, files in (("llama_bench", "gguf"), ("dllama", "dllama_model")):
        if (getattr(arguments, program) is None) != (getattr(arguments, files) is None):
            names = [f"--{name}".replace("_", "-") for name in (program, files)]
            parser.error(f"{' and '.join(names)} belong together")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Parse arguments, measure, print."""
    arguments = _parse(argv)
    formats = {**_FORMATS, 16: {**_FORMATS[16], "dtype": arguments.dtype}}
    tpirt = Tpirt(arguments.model.resolve(), arguments.store, formats)
    llama = dllama = None
    with ExitStack() as stack:
        if arguments.llama_bench:
            files = {bits: find_gguf(arguments.gguf, bits) for bits in arguments.bits}
            llama = LlamaBench(arguments.llama_bench.resolve(), files)
        if arguments.dllama:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tpirt-bench-"))
            tokenizer = Path(folder) / "tokenizer.t"
            write_dllama_tokenizer(tokenizer, _vocab_size(arguments.model))
            dllama = Dllama(arguments.dllama.resolve(), arguments.dllama_model, tokenizer)
        measured = cases(tpirt, llama, dllama, arguments.bits, arguments.threads)
        if not measured:
            raise ConfigError("nothing to compare with: --llama-bench or --dllama is missing")
        record = Record("peers", argv, arguments)
        results = run_rounds(measured, arguments.rounds, arguments.prompts, arguments.tokens)
    rows = [
        row
        for case, result in zip(measured, results, strict=True)
        for row in summarize(case, result)
    ]
    kernels = load().summary
    show(rows, record.environment, kernels)
    programs = {"llama.cpp": arguments.llama_bench, "distributed-llama": arguments.dllama}
    about = {"kernels": kernels, "programs": versions(programs)}
    record.finish({**about, "rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(end_like_a_command(lambda: main(sys.argv[1:])))
