"""Processes that are forked warm are those that a cold start would have given."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import psutil
import pytest

from tests.support.terminal import Terminal
from tpirt.testing.processes import descendants, fork_server, killed_at_exit, start_python

Start = Callable[..., "Popen[str]"]
QUIET = {"stdin": DEVNULL, "stdout": PIPE, "stderr": PIPE, "text": True}


@pytest.fixture(params=["warm", "cold"])
def start(request: pytest.FixtureRequest) -> Start:
    if request.param == "warm":
        if fork_server() is None:
            pytest.skip("all starts are cold here")
        return start_python
    return lambda *arguments, **options: Popen([sys.executable, *arguments], **options)


ABOUT = """
import json, os, sys, threading
print(json.dumps({
    "argv": sys.argv, "cwd": os.getcwd(), "there": os.environ["THERE"], "path": sys.path[0],
    "home": "HOME" in os.environ, "parent": os.getppid(), "leads": os.getsid(0) == os.getpid(),
    "threads": threading.active_count(), "descriptors": sorted(os.listdir("/proc/self/fd")),
    "input": sys.stdin.read(),
}))
print("on stderr", file=sys.stderr)
sys.exit(7)
"""


@pytest.mark.parametrize("session", [False, True])
def test_arguments_environment_and_streams(start: Start, tmp_path: Path, session: bool) -> None:
    options: dict[str, Any] = {**QUIET, "stdin": PIPE, "cwd": tmp_path}
    environment = {"THERE": "yes", "PATH": os.environ["PATH"], "PYTHONUTF8": "1"}
    with start(
        *("-c", ABOUT, "a", "--b"), **options, env=environment, start_new_session=session
    ) as process:
        out, err = process.communicate("typed", timeout=30)
    assert (process.returncode, err) == (7, "on stderr\n")
    about = json.loads(out)
    descriptors = about.pop("descriptors")
    assert descriptors in (["0", "1", "2", each] for each in descriptors)  # and the listing's own
    assert about.pop("path") in ("", str(tmp_path))
    assert about == {
        "argv": ["-c", "a", "--b"],
        "cwd": str(tmp_path),
        "there": "yes",
        "home": False,
        "parent": os.getpid(),
        "leads": session,
        "threads": 1,
        "input": "typed",
    }


@pytest.mark.parametrize(
    ("code", "exit_code", "message"),
    [
        ("pass", 0, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit('why')", 1, "why\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        ("import os; os.abort()", -signal.SIGABRT, ""),
    ],
)
def test_how_it_ends(start: Start, code: str, exit_code: int, message: str) -> None:
    with start("-c", code, **QUIET) as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (exit_code, "")
    assert message in err
    assert not psutil.pid_exists(process.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_signals_reach_it(start: Start, number: signal.Signals) -> None:
    code = "import time; print('up', flush=True); time.sleep(60)"
    with killed_at_exit(start("-c", code, **QUIET)) as process:
        assert process.stdout.readline() == "up\n"
        assert process.pid in [each.pid for each in descendants()]
        process.send_signal(number)
        assert process.wait(30) == -number
    assert process.pid not in [each.pid for each in descendants()]


def test_modules_run_as_programs(start: Start) -> None:
    with start("-m", "tpirt", "--version", **QUIET) as process:
        out, _ = process.communicate(timeout=30)
    assert (process.returncode, out.split()[0]) == (0, "tpirt")


def test_a_terminal_is_its_controlling_one() -> None:
    code = (
        "import os, sys; print(os.isatty(0), os.get_terminal_size()); open('/dev/tty').readline()"
    )
    program = Terminal("-c", code, encoding="utf-8", dimensions=(33, 99), timeout=30)
    program.expect_exact("True os.terminal_size(columns=99, lines=33)")
    program.sendintr()
    program.wait()
    assert program.signalstatus == signal.SIGINT
    program.close()
