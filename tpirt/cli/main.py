"""Entry point of ``tpirt``: runs a command and turns errors into exit codes."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO, cast

from tpirt.errors import TpirtError
from tpirt.refusals import refusal
from tpirt.version import __version__

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 2 for bad input; 3 for a lost or unreachable peer; 130 after Ctrl-C.
    """
    try:
        code = _run(argv)
    finally:
        if argv is None:  # the process ends; Ctrl-C must not interrupt it
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    if argv is None:
        _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """End the process at once, after everything is closed.

    A normal exit destroys gRPC's objects while its threads run, which has caused aborts under
    load.
    """
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _run(argv: Sequence[str] | None) -> int:
    _open_standard_streams()
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()  # here, where errors are caught
    except TpirtError as exc:
        print(f"tpirt: error: {exc}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        print("tpirt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has closed it
        _drop_output()
    except (OSError, MemoryError, RuntimeError, ImportError) as exc:
        if (words := refusal(exc)) is None:
            if not isinstance(exc, OSError):
                raise  # a bug
            # Any OSError of another kind is already a TpirtError.
            words = f"cannot write the output: {exc.strerror}"
        _drop_output()
        print(f"tpirt: error: {words}", file=sys.stderr)
        return TpirtError.exit_code
    return 0


def _open_standard_streams() -> None:
    """Open the null device for closed standard streams, whose numbers other files would get."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if not isinstance(sys.stderr, _BestEffort):
        sys.stderr = cast(TextIO, _BestEffort(sys.stderr))


class _BestEffort:
    """Standard error that may be gone (closed pipe, full disk): commands go on without it."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _drop_output() -> None:
    """Discard buffered output, so that flushing it does not fail when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    """Create the parser with all commands."""
    from tpirt.cli import chat, evaluate, generate, info, peer, split, store, synth

    parser = argparse.ArgumentParser(
        prog="tpirt",
        description="Run a large language model over several small machines.",
        epilog="example: tpirt chat --local 4",
    )
    parser.add_argument("--version", action="version", version=f"tpirt {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (chat, generate, peer, split, synth, info, evaluate, store):
        module.add_command(commands)
    return parser
