"""Entry point of ``tpirt``: picks the command, runs it, turns errors into exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tpirt.errors import TpirtError
from tpirt.version import __version__

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 2 for bad input; 3 for a lost or unreachable peer; 130 after Ctrl-C.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except TpirtError as exc:
        print(f"tpirt: error: {exc}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        print("tpirt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Make the parser; each command's module adds its own."""
    from tpirt.cli import chat, generate, info, peer, split

    parser = argparse.ArgumentParser(
        prog="tpirt",
        description="Run a large language model over several small machines.",
        epilog="example: tpirt chat --local 4",
    )
    parser.add_argument("--version", action="version", version=f"tpirt {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (chat, generate, peer, split, info):
        module.add_command(commands)
    return parser
