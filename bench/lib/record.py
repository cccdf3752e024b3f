"""A benchmark's result: one JSON line at the end, and a file of it on request."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.lib.command import tell
from bench.lib.environment import Environment, current_environment

_BUSY = 0.25  # of the cores


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result there, too, as readable JSON"
    )


class Record:
    """One run of a benchmark. Made before anything is measured: it notes the machine's load."""

    def __init__(self, bench: str, argv: Sequence[str], arguments: argparse.Namespace):
        self._bench = bench
        self._file: Path | None = arguments.json
        # Names of folders say what was used; their place on this machine stays private.
        self._settings = {
            key: value.name if isinstance(value, Path) else value
            for key, value in vars(arguments).items()
            if value is not None and key != "json"
        }
        self._command = without_folders(["python", "-m", f"bench.{bench}", *argv])
        self.environment: Environment = current_environment()
        load, cores = self.environment.load_average, self.environment.cores
        if load is not None and load > _BUSY * cores:
            tell(f"load average {load:.1f} on {cores} cores: other work disturbs these figures")

    def finish(self, body: Mapping[str, Any]) -> None:
        """Print the result as one line, the last; write it to ``--json``'s file."""
        result = {
            "bench": self._bench,
            "environment": {"command": self._command, **asdict(self.environment)},
            "settings": self._settings,
            **body,
        }
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(result, indent=1, default=str) + "\n")
        print(json.dumps(result, default=str), flush=True)


def without_folders(words: Iterable[str]) -> str:
    """A command line whose absolute paths are reduced to their last part."""
    return shlex.join(map(_without_folder, words))


def _without_folder(word: str) -> str:
    if " " in word:  # a command line within a command line
        return " ".join(map(_without_folder, word.split(" ")))
    option, equals, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
    return f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else word
