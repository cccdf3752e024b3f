"""The scripts a user starts: real runs, and installations by a pretended pip.

``TPIRT_VENV`` points the real runs at the environment these tests run in: nothing is installed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import psutil
import pytest

from tpirt.testing.processes import DEADLINE_S, descendants, survivors, wait_for

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
READY = r"\x1b\[\?2004h"  # the line editor asks for bracketed paste: it is reading


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    home = tmp_path / "home"
    home.mkdir()
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TPIRT_", "XDG_", "PYTHON"))
    }
    return {**kept, "TPIRT_VENV": sys.prefix, "HOME": str(home), "TERM": "xterm-256color"}


def run(
    script: Path | str, *arguments: str, env: dict[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(script), *arguments],
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
    )


# -- the command lines -----------------------------------------------------------------------


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize(
    "name", ["launch_local.sh", "launch_peer.sh", "launch_hosts.sh", "test.sh", "nightly.sh"]
)
def test_help(name: str, option: str, environment: dict[str, str]) -> None:
    done = run(SCRIPTS / name, option, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: {name} [")
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("launch_local.sh", ["--nonsense"], "--nonsense: unknown option"),
        ("launch_local.sh", ["0"], "N: expected a whole number from 1 on, got '0'"),
        ("launch_local.sh", ["two"], "N: expected a whole number from 1 on, got 'two'"),
        ("launch_local.sh", [""], "N: expected a whole number from 1 on, got ''"),
        ("launch_local.sh", ["2", "/nowhere"], "there is no config.json in '/nowhere'"),
        ("launch_local.sh", ["2", ".", "more"], "more: expected no more than N and MODEL_DIR"),
        ("launch_local.sh", ["--prompt"], "--prompt: a text is missing"),
        ("launch_peer.sh", ["50051"], "expected HOST[:PORT], got '50051'"),
        ("launch_peer.sh", ["--listen", "a:1"], "--listen: give HOST:PORT as the first argument"),
        ("launch_peer.sh", ["127.0.0.1:0", "--nonsense"], "--nonsense"),
        ("launch_hosts.sh", [], "HOSTS_FILE is missing"),
        ("launch_hosts.sh", ["--nonsense"], "--nonsense: unknown option"),
        ("launch_hosts.sh", ["/nowhere"], "HOSTS_FILE: cannot read '/nowhere'"),
    ],
)
def test_wrong_command_lines(
    name: str, arguments: list[str], message: str, environment: dict[str, str]
) -> None:
    done = run(SCRIPTS / name, *arguments, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_an_environment_without_tpirt(tmp_path: Path, environment: dict[str, str]) -> None:
    done = run(SCRIPTS / "launch_peer.sh", env={**environment, "TPIRT_VENV": str(tmp_path)})
    assert done.returncode == 1
    assert f"there is no bin/tpirt in {tmp_path}" in done.stderr


# -- real runs -------------------------------------------------------------------------------


def test_one_prompt_from_anywhere(tmp_path: Path, environment: dict[str, str]) -> None:
    """Through a link, from a folder whose modules have the names of those tpirt imports."""
    for name in ("random", "torch", "tpirt"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    link = tmp_path / "a link"
    link.symlink_to(SCRIPTS / "launch_local.sh")
    arguments = ["2", "--prompt", "Hello!", "--", "--max-tokens", "8", "--threads", "1"]
    done = run(link, *arguments, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stdout.count("\n") == 1
    assert "Warning" not in done.stderr


@pytest.fixture
def chat(environment: dict[str, str]) -> Iterator[pexpect.spawn]:
    """A chat on a terminal of its own, just started: three peers, the master is the process."""
    spawned = pexpect.spawn(
        str(SCRIPTS / "launch_local.sh"),
        ["3", "--", "--threads", "1"],
        env=environment,  # type: ignore[arg-type]
        encoding="utf-8",
        dimensions=(40, 120),
        timeout=DEADLINE_S,
    )
    yield spawned
    for process in descendants(spawned.pid):
        process.kill()
    spawned.close(force=True)


def until_ready(chat: pexpect.spawn) -> None:
    """Wait for the prompt; a chat that ended before it fails with how it ended."""
    if chat.expect([READY, pexpect.EOF]):
        before = chat.before
        chat.wait()
        pytest.fail(f"exit {chat.exitstatus}, signal {chat.signalstatus}: {before}")


def workers_of(master: int) -> list[psutil.Process]:
    """Both worker processes, as soon as they exist."""
    found: list[psutil.Process] = []

    def both() -> bool:
        found[:] = descendants(master, lambda each: "--until-stdin-closes" in each.cmdline())
        return len(found) == 2

    wait_for(both, "two workers")
    return found


def test_leaving_ends_the_workers(chat: pexpect.spawn) -> None:
    until_ready(chat)
    left = workers_of(chat.pid)
    chat.send("/exit\r")
    chat.expect(pexpect.EOF)
    chat.wait()
    assert (chat.exitstatus, chat.signalstatus) == (0, None)
    assert survivors(left) == []


def test_ctrl_c_twice_during_the_start(chat: pexpect.spawn) -> None:
    left = workers_of(chat.pid)
    chat.send("\x03")
    chat.send("\x03")
    chat.expect(pexpect.EOF)
    chat.wait()
    assert survivors(left) == []


@pytest.mark.parametrize(
    ("when", "how"),
    [
        ("starting", "SIGTERM"),
        pytest.param("starting", "SIGKILL", marks=pytest.mark.nightly),
        pytest.param("ready", "SIGTERM", marks=pytest.mark.nightly),
        ("ready", "SIGKILL"),
        pytest.param("ready", "SIGHUP", marks=pytest.mark.nightly),
        ("ready", "terminal closed"),
    ],
)
def test_no_end_leaves_a_worker(chat: pexpect.spawn, when: str, how: str) -> None:
    if when == "ready":
        until_ready(chat)
    left = workers_of(chat.pid)
    if how == "terminal closed":
        chat.ptyproc.fileobj.close()
        chat.ptyproc.closed = chat.closed = True
    else:
        chat.kill(signal.Signals[how])
    assert survivors(left, DEADLINE_S) == []
    wait_for(lambda: not chat.isalive(), "the end of the master")


def test_a_peer_alone(environment: dict[str, str]) -> None:
    peer = pexpect.spawn(
        str(SCRIPTS / "launch_peer.sh"),
        ["127.0.0.1:0", "--threads", "1"],
        env=environment,  # type: ignore[arg-type]
        encoding="utf-8",
        timeout=DEADLINE_S,
    )
    peer.expect(r"listening on 127\.0\.0\.1:\d+")
    peer.send("\x03")
    peer.expect(pexpect.EOF)
    peer.wait()
    assert peer.signalstatus is None
    peer.close()


# -- installation, without pip and without a network -----------------------------------------

PYTHON = """#!/usr/bin/env bash
# Makes an environment of itself; installing takes as long as the file "slow" is there.
case "$*" in
  '-m venv --clear '*)
    echo "venv" >>"$PRETENDED/log"
    rm -rf "${!#}" && mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python"
    ;;
  '-m pip --version') [[ $0 == */bin/python ]] ;;
  '-m pip install '*)
    echo "pip ${!#}" >>"$PRETENDED/log"
    while [[ -e $PRETENDED/slow ]]; do sleep 0.05; done
    [[ ! -e $PRETENDED/broken ]] || { echo "no network" >&2; exit 1; }
    printf '#!/bin/sh\\necho "tpirt $*"\\n' >"${0%/*}/tpirt" && chmod +x "${0%/*}/tpirt"
    ;;
  *'import ensurepip'*) [[ ! -e $PRETENDED/no-venv ]] ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


class Clone:
    """A copy of the scripts in a folder with a space in its name, and a pretended Python."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.root = folder / "a clone"
        self.pretended = folder / "pretended"
        self.pretended.mkdir()
        shutil.copytree(SCRIPTS, self.root / "scripts", ignore=shutil.ignore_patterns("*.py"))
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root)
        python = self.pretended / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        self.environment = {
            **environment,
            "TPIRT_PYTHON": str(python),
            "PRETENDED": str(self.pretended),
            "REAL_PYTHON": sys.executable,
        }
        del self.environment["TPIRT_VENV"]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.root / "scripts" / "launch_peer.sh"), "localhost:1"],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self) -> tuple[int, str, str]:
        with self.start() as process:
            out, err = process.communicate(timeout=DEADLINE_S)
            return process.returncode, out, err

    @property
    def log(self) -> list[str]:
        """What was asked of Python, and forgotten with this."""
        file = self.pretended / "log"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines

    @property
    def installs(self) -> str:
        return f"pip {self.root}"


@pytest.fixture
def clone(tmp_path: Path, environment: dict[str, str]) -> Clone:
    return Clone(tmp_path, environment)


STARTED = "tpirt peer --listen localhost:1\n"


def test_installs_once_and_again_after_a_change(clone: Clone) -> None:
    code, out, err = clone.run()
    assert (code, out) == (0, STARTED), err
    assert "installing into" in err
    assert clone.log == ["venv", clone.installs]
    assert clone.run() == (0, STARTED, "")
    assert clone.log == []
    with (clone.root / "constraints.txt").open("a") as file:
        file.write("# a change\n")
    assert clone.run()[:2] == (0, STARTED)
    assert clone.log == [clone.installs]
    moved = clone.root.with_name("moved")
    clone.root = clone.root.rename(moved)
    assert clone.run()[:2] == (0, STARTED)
    assert clone.log == [clone.installs]


def test_a_failed_installation_shows_why_and_keeps_what_was(clone: Clone) -> None:
    broken = clone.pretended / "broken"
    broken.touch()
    code, out, err = clone.run()
    assert (code, out) == (1, "")
    assert "no network\n" in err
    assert "the installation failed" in err
    assert clone.log == ["venv", clone.installs]
    broken.unlink()
    assert clone.run()[:2] == (0, STARTED)
    assert clone.log == [clone.installs]
    constraints = clone.root / "constraints.txt"
    before = constraints.read_text()
    constraints.write_text(before + "# a change\n")
    broken.touch()
    assert clone.run()[0] == 1
    constraints.write_text(before)
    assert clone.run() == (0, STARTED, "")


def test_an_interrupted_installation_begins_anew(clone: Clone) -> None:
    slow = clone.pretended / "slow"
    slow.touch()
    with clone.start() as process:
        log = clone.pretended / "log"
        wait_for(lambda: log.exists() and clone.installs in log.read_text(), "pip")
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=DEADLINE_S)
    slow.unlink()
    assert clone.log == ["venv", clone.installs]
    assert clone.run()[:2] == (0, STARTED)
    assert clone.log == ["venv", clone.installs]


@pytest.mark.skipif(shutil.which("flock") is None, reason="there is no flock")
def test_two_at_once_install_once(clone: Clone) -> None:
    slow = clone.pretended / "slow"
    slow.touch()
    with clone.start() as first, clone.start() as second:
        time.sleep(0.2)  # the second one finds the first at work, or waits for its lock
        slow.unlink()
        for process in (first, second):
            out, err = process.communicate(timeout=DEADLINE_S)
            assert (process.returncode, out) == (0, STARTED), err
    assert clone.log == ["venv", clone.installs]


def test_what_a_python_lacks_is_named(clone: Clone) -> None:
    (clone.pretended / "no-venv").touch()
    tools = clone.pretended / "tools"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "readlink", "cat", "sed", "flock"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    clone.environment["PATH"] = str(tools)
    code, _, err = clone.run()
    assert code == 1
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"apt install python{version}-venv" in err
    del clone.environment["TPIRT_PYTHON"]
    code, _, err = clone.run()
    assert code == 1
    assert "Python 3.11 or newer is needed" in err
