"""What the commands share: progress on standard error, exit codes, lists as options."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tpirt.cli.options import count, size
from tpirt.errors import ConfigError, TpirtError

_INTERRUPTED = 130


def tell(text: str) -> None:
    """Report progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def end_like_a_command(main: Callable[[], int]) -> int:
    """Run a command's body; what a user can cause becomes one line and an exit code.

    A signal that would end the process at once unwinds it, so that what was made is removed.
    """

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    try:
        return main()
    except TpirtError as exc:
        tell(f"error: {exc}")
        return exc.exit_code
    except KeyboardInterrupt:
        tell("interrupted")
        return _INTERRUPTED


def new_parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark that is run as a module; ``about`` is its docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def values(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of an option that takes several values with commas between them."""

    def parse(text: str) -> list[Any]:
        return [convert(part) for part in text.split(",")]

    return parse


def percentile(figures: Iterable[float], percent: int) -> float:
    """The figure below which so many percent of them lie, or the largest."""
    ordered = sorted(figures)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add options of an engine; what is not given is tpirt's own default."""
    add_rank_options(parser)
    parser.add_argument("--window", type=count, metavar="N")
    parser.add_argument("--store", type=Path, metavar="DIR")


def add_rank_options(parser: argparse._ActionsContainer) -> None:
    """Add those of them that benchmarks have which vary or place the others themselves."""
    parser.add_argument("--memory", type=size, metavar="SIZE", help="of each rank")
    parser.add_argument("--threads", type=count, metavar="N", help="of each rank")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", default="none", metavar="HOW")


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of :func:`add_engine_options` that are given, as fields of ``EngineOptions``."""
    given = {"window": arguments.window, "store": arguments.store and str(arguments.store)}
    return rank_options(arguments) | _given(given)


def rank_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of :func:`add_rank_options` that are given, as fields of ``EngineOptions``."""
    return _given(
        {
            "memory_bytes": arguments.memory,
            "threads": arguments.threads,
            "dtype": arguments.dtype,
            "quantize": arguments.quantize,
        }
    )


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def run_tpirt(*arguments: str) -> str:
    """Run a command of this tpirt to its end; returns what it printed.

    Raises:
        ConfigError: it failed; the reason is on standard error already.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tpirt", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise ConfigError(f"tpirt {arguments[0]} ended with exit code {done.returncode}")
    return done.stdout
