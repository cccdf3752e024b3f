"""The end of a benchmark: one JSON line, and a file of it for those worth keeping."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_out_option(parser: argparse.ArgumentParser) -> None:
    """``--out``."""
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="keep the JSON, such as bench/results/NAME.json"
    )


def finish(bench: str, arguments: argparse.Namespace, body: Mapping[str, Any]) -> None:
    """Print the JSON line, and write it where ``--out`` says."""
    record = {
        "bench": bench,
        "machine": {
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.release()}",
        },
        "settings": {
            # Names of folders say what was used; where they lay is nobody's business.
            key: value.name if isinstance(value, Path) else value
            for key, value in vars(arguments).items()
            if value is not None and key != "out"
        },
        **body,
    }
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1, default=str) + "\n")
    print(json.dumps(record, default=str), flush=True)
