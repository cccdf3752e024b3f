"""Compare two checkouts: the same benchmark, run from both by turns.

    python -m bench.compare --before ../base --after . -- generate --local 1 --store slices-{side}
    python -m bench.compare --before ../base --after . --figure median_ms \\
        --before-command "allreduce --collective direct --wire float32" \\
        --after-command "allreduce --collective one-shot --comm-dtype float32"

The order is before, after, after, before, and so on: a machine that slows down or speeds up costs
both sides the same. ``{side}`` in a command becomes ``before`` or ``after``, for folders that two
versions must not share. Commands run in their own checkout, so relative paths are relative to it.

Each round gives one ratio, after to before. The table shows the medians of both sides, the median
ratio, and the lowest and the highest. If rounds are independent and there are six of them or more,
the true median ratio lies between these two with a probability of 97 % or more. The same checkout
on both sides shows the noise of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.lib.command import end_like_a_command, new_parser, tell, values
from bench.lib.environment import git_state
from bench.lib.record import Record, add_json_option, without_folders
from tpirt.cli.options import count
from tpirt.errors import ConfigError

_ABOUT_THE_RUN = {"bench", "environment", "machine", "settings"}
_TIME_SUFFIXES = ("_ms", "_s")


@dataclass(frozen=True)
class Side:
    """A checkout and the benchmark to run in it: its name, then its options."""

    name: str
    folder: Path
    command: list[str]

    def run(self) -> dict[str, float]:
        """Run the benchmark once; returns the figures of its last line by name.

        Raises:
            ConfigError: it failed, or its last line is not a JSON object.
        """
        words = [word.replace("{side}", self.name) for word in self.command]
        with subprocess.Popen(
            [sys.executable, "-m", f"bench.{words[0]}", *words[1:]],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                printed, complaints = process.communicate()
            except BaseException:
                process.terminate()  # it removes its network and its cgroups
                raise
        if process.returncode:
            last = (complaints.strip().splitlines() or ["no message"])[-1]
            raise ConfigError(f"{self.name}: exit code {process.returncode}: {last}")
        try:
            result = json.loads(printed.splitlines()[-1])
            return dict(figures({k: v for k, v in result.items() if k not in _ABOUT_THE_RUN}))
        except (ValueError, IndexError, AttributeError) as exc:
            raise ConfigError(f"{self.name}: its last line is not a JSON object") from exc

    def about(self) -> dict[str, Any]:
        """What the record keeps of it."""
        commit, dirty = git_state(self.folder)
        command = without_folders(["python", "-m", f"bench.{self.command[0]}", *self.command[1:]])
        return {"commit": commit, "dirty": dirty, "command": command}


@dataclass(frozen=True)
class Comparison:
    """One figure: medians of both sides, and the ratio after to before over the rounds."""

    name: str
    before: float
    after: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float
    before_rounds: list[float]
    after_rounds: list[float]


def figures(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers inside a JSON value, by name, such as ``rows.0.tpot_ms``."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from figures(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from figures(inner, f"{name}.{number}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)


def run_rounds(before: Side, after: Side, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run both sides by turns; returns each side's figures, round by round."""
    runs: dict[str, list[dict[str, float]]] = {before.name: [], after.name: []}
    for number in range(rounds):
        for side in (after, before) if number % 2 else (before, after):
            tell(f"round {number + 1} of {rounds}: {side.name}")
            runs[side.name].append(side.run())
    return runs


def compare(
    before: Sequence[Mapping[str, float]],
    after: Sequence[Mapping[str, float]],
    wanted: Sequence[str],
) -> list[Comparison]:
    """Compare the figures that all runs have; those that never differ are settings.

    Args:
        before, after: figures of each round.
        wanted: last parts of names; times, when empty.

    Raises:
        ConfigError: there is no such figure on both sides.
    """
    common = [name for name in after[0] if all(name in run for run in (*before, *after))]
    chosen = [name for name in common if _is_wanted(name, wanted)]
    if not chosen:
        asked = ", ".join(wanted) or "times"
        raise ConfigError(f"no figures on both sides for {asked}; there are: {', '.join(common)}")
    compared = []
    for name in chosen:
        befores, afters = [run[name] for run in before], [run[name] for run in after]
        if 0 in befores:
            tell(f"{name}: left out, a figure of 0 has no ratio")
        elif len({*befores, *afters}) > 1:
            compared.append(_comparison(name, befores, afters))
    return compared


def _is_wanted(name: str, wanted: Sequence[str]) -> bool:
    last = name.rpartition(".")[2]
    return last in wanted if wanted else last.endswith(_TIME_SUFFIXES)


def _comparison(name: str, befores: list[float], afters: list[float]) -> Comparison:
    ratios = [after / before for before, after in zip(befores, afters, strict=True)]
    return Comparison(
        name=name,
        before=statistics.median(befores),
        after=statistics.median(afters),
        ratio=statistics.median(ratios),
        lowest_ratio=min(ratios),
        highest_ratio=max(ratios),
        before_rounds=befores,
        after_rounds=afters,
    )


def show(compared: Sequence[Comparison]) -> None:
    """Print the table for people."""
    width = max((len(each.name) for each in compared), default=0)
    print(f"{'figure':{width}}      before       after   ratio   lowest  highest")
    for each in compared:
        print(
            f"{each.name:{width}} {each.before:11.4g} {each.after:11.4g} {each.ratio:7.3f} "
            f"{each.lowest_ratio:8.3f} {each.highest_ratio:8.3f}"
        )


def main(argv: Sequence[str]) -> int:
    """Parse arguments, run, compare, print."""
    parser = new_parser("bench.compare", __doc__)
    for side in ("before", "after"):
        parser.add_argument(f"--{side}", type=Path, required=True, metavar="DIR", help="a checkout")
        parser.add_argument(
            f"--{side}-command",
            type=shlex.split,
            metavar="COMMAND",
            help="benchmark and options, where they differ from COMMAND",
        )
    parser.add_argument("--rounds", type=count, default=6, metavar="N")
    parser.add_argument(
        "--figure",
        type=values(str),
        default=[],
        metavar="NAME,...",
        help="figures to compare, such as tpot_ms (default: all times)",
    )
    add_json_option(parser)
    parser.add_argument(
        "command", nargs="*", metavar="COMMAND", help="benchmark and options of both, after --"
    )
    arguments = parser.parse_args(argv)
    before = _side("before", arguments.before, arguments.before_command or arguments.command)
    after = _side("after", arguments.after, arguments.after_command or arguments.command)
    settings = {"rounds": arguments.rounds, "figure": arguments.figure, "json": arguments.json}
    record = Record("compare", argv, argparse.Namespace(**settings))
    runs = run_rounds(before, after, arguments.rounds)
    compared = compare(runs["before"], runs["after"], arguments.figure)
    show(compared)
    sides = {side.name: side.about() for side in (before, after)}
    record.finish({"sides": sides, "rows": [asdict(each) for each in compared]})
    return 0


def _side(name: str, folder: Path, command: list[str]) -> Side:
    """Check what a side consists of.

    Raises:
        ConfigError: no command, or no such benchmark in the checkout.
    """
    if not command:
        raise ConfigError(f"{name}: no command; give one after --, or as --{name}-command")
    if not (folder / "bench" / f"{command[0]}.py").is_file():
        raise ConfigError(f"{name}: {folder} has no bench/{command[0]}.py")
    return Side(name, folder.resolve(), command)


if __name__ == "__main__":
    sys.exit(end_like_a_command(lambda: main(sys.argv[1:])))
