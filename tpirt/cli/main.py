"""Entry point of ``tpirt``: runs a command and turns errors into exit codes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from tpirt.cli.parser import build_parser
from tpirt.cli.sigint import INTERRUPTED
from tpirt.errors import ConfigError, TpirtError
from tpirt.printable import printable_line
from tpirt.refusals import refusal
from tpirt.terminal import clean_output


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 2 for bad input; 3 for a lost or unreachable peer; 130 after Ctrl-C.
    """
    _open_standard_streams()
    if logging.lastResort is not None:  # shows warnings of commands that show no other records
        logging.lastResort.setFormatter(logging.Formatter("tpirt: %(message)s"))
    try:
        with clean_output():
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
    try:
        with _flushed():
            arguments = build_parser().parse_args(argv)
            _check_current_folder()
            arguments.run(arguments)
    except TpirtError as exc:
        _complain(f"error: {exc}")
        return exc.exit_code
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has closed it
        _drop_output()
    except (OSError, MemoryError, RuntimeError, ImportError) as exc:
        if (words := refusal(exc)) is None:
            if not isinstance(exc, OSError):
                raise  # a bug
            # Of a file that was asked for, such as one with too long a name; others are already
            # a TpirtError.
            subject = "cannot write the output" if exc.filename is None else exc.filename
            words = f"{subject}: {exc.strerror}"
        _drop_output()
        _complain(f"error: {words}")
        return TpirtError.exit_code
    return 0


def _check_current_folder() -> None:
    """A removed folder is still current, but nothing is in it, and torch's MKL ends the process."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the current directory was removed; change to another one") from None


@contextlib.contextmanager
def _flushed() -> Iterator[None]:
    """Flush standard output here, where errors are caught; also where ``--help`` exits."""
    try:
        yield
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _complain(text: str) -> None:
    """Print one line on stderr."""
    print(printable_line(f"tpirt: {text}"), file=sys.stderr, flush=True)


def _open_standard_streams() -> None:
    """Open the null device for closed standard streams, whose numbers other files would get.

    Only for reading: a command whose output is lost must fail.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # takes the lowest free number
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _drop_output() -> None:
    """Discard buffered output, so that flushing it does not fail when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
