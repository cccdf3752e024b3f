"""The scripts a user starts: real runs, and installations by a pretended pip.

``TPIRT_VENV`` points the real runs at the environment these tests run in: nothing is installed.
"""

from __future__ import annotations

import os
import re
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

from tests.support.nightly import nightly
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
    "name",
    [
        *("launch_local.sh", "launch_peer.sh", "launch_hosts.sh"),
        *("test.sh", "nightly.sh", "download_size.sh"),
    ],
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
    """A chat on a terminal of its own, just started: two peers, the master is the process."""
    spawned = pexpect.spawn(
        str(SCRIPTS / "launch_local.sh"),
        ["2", "--", "--threads", "1"],
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
    """The worker process, as soon as it exists; several are in test_lost_peer."""
    found: list[psutil.Process] = []

    def there() -> bool:
        found[:] = descendants(master, lambda each: "--until-stdin-closes" in each.cmdline())
        return len(found) == 1

    wait_for(there, "a worker")
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
        nightly("starting", "SIGTERM"),
        nightly("starting", "SIGKILL"),
        nightly("ready", "SIGTERM"),
        ("ready", "SIGKILL"),
        nightly("ready", "SIGHUP"),
        nightly("ready", "terminal closed"),
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
# Makes an environment of itself; installing takes as long as the file "slow" is there. Its indexes
# have the builds of torch in the files "own-index" and "cpu-index".
case "$*" in
  '-m venv --clear '*)
    echo "venv" >>"$PRETENDED/log"
    rm -rf "${!#}" && mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python"
    ;;
  '-m pip --version') [[ $0 == */bin/python ]] ;;
  '-m pip index versions torch '*)
    cat "$PRETENDED/own-index"
    [[ $* != *'--extra-index-url https://download.pytorch.org/whl/cpu'* ]] ||
      cat "$PRETENDED/cpu-index" 2>/dev/null
    ;;
  '-m pip install '*)
    echo "pip ${!#}" >>"$PRETENDED/log"
    printf '%s\\n' "$*" >"$PRETENDED/arguments"
    while [[ -e $PRETENDED/slow ]]; do sleep 0.05; done
    [[ ! -e $PRETENDED/broken ]] || { echo "no network" >&2; exit 1; }
    printf '#!/bin/sh\\necho "tpirt $*"\\n' >"${0%/*}/tpirt" && chmod +x "${0%/*}/tpirt"
    ;;
  *'import ensurepip'*) [[ ! -e $PRETENDED/no-venv ]] ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH = (ROOT / "constraints.txt").read_text().partition("\ntorch==")[2].split()[0]


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
        self.offer("own-index", "2.6.0", f"{TORCH}", f"{TORCH}+cpu")
        self.environment = {
            **environment,
            "TPIRT_PYTHON": str(python),
            "PRETENDED": str(self.pretended),
            "REAL_PYTHON": sys.executable,
        }
        del self.environment["TPIRT_VENV"]

    def offer(self, index: str, *versions: str) -> None:
        """Say which versions of torch an index has."""
        line = f"Available versions: {', '.join(versions)}\n"
        (self.pretended / index).write_text(line)

    def machine(self, name: str) -> None:
        """Pretend another kind of machine."""
        folder = self.pretended / "tools"
        folder.mkdir()
        uname = folder / "uname"
        uname.write_text(f"#!/bin/sh\necho {name}\n")
        uname.chmod(0o755)
        self.environment["PATH"] = f"{folder}:{self.environment['PATH']}"

    @property
    def torch_arguments(self) -> list[str]:
        """What the latest installation asked of pip about torch."""
        arguments = (self.pretended / "arguments").read_text().split()
        wanted = ("torch", "--extra-index-url", "https:")
        return [each for each in arguments if each.startswith(wanted)]

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


def test_the_users_own_index_is_enough_for_torchs_cpu_build(clone: Clone) -> None:
    clone.machine("Linux x86_64")
    clone.offer("cpu-index", f"{TORCH}+cpu")
    code, _, err = clone.run()
    assert (code, clone.torch_arguments) == (0, [f"torch=={TORCH}+cpu"]), err
    assert CPU_INDEX not in err


@pytest.mark.parametrize("machine", ["Linux x86_64", "Linux aarch64"])
def test_pytorchs_index_is_added_where_pip_would_install_cuda(clone: Clone, machine: str) -> None:
    clone.machine(machine)
    clone.offer("own-index", "2.6.0", TORCH)
    clone.offer("cpu-index", f"{TORCH}+cpu")
    code, _, err = clone.run()
    added = ["--extra-index-url", CPU_INDEX]
    assert (code, clone.torch_arguments) == (0, [f"torch=={TORCH}+cpu", *added]), err
    assert "downloads about 250 MB" in err


def test_cuda_is_not_installed_unasked(clone: Clone) -> None:
    clone.machine("Linux x86_64")
    clone.offer("own-index", "2.6.0", TORCH)
    code, _, err = clone.run()
    assert (code, clone.log) == (1, ["venv"])  # without asking pip for what it cannot find
    assert f"pip's own index, which has other builds of torch only; and {CPU_INDEX}" in err
    assert "set PIP_EXTRA_INDEX_URL to a mirror" in err
    assert "TPIRT_TORCH=cuda (2.8 GB to download)" in err
    (clone.pretended / "own-index").unlink()
    assert "pip's own index, which does not answer" in clone.run()[2]
    clone.offer("own-index", "2.6.0", TORCH)
    clone.environment["TPIRT_TORCH"] = "cuda"
    code, _, err = clone.run()
    assert (code, clone.torch_arguments) == (0, [f"torch!={TORCH}+cpu"]), err
    assert "downloads about 2.8 GB" in err


def test_elsewhere_pips_own_torch_is_the_cpu_build(clone: Clone) -> None:
    clone.machine("Darwin arm64")
    clone.offer("own-index", TORCH)
    code, _, err = clone.run()
    assert (code, clone.torch_arguments) == (0, []), err


def test_an_unknown_build_of_torch(clone: Clone) -> None:
    clone.machine("Linux x86_64")
    clone.environment["TPIRT_TORCH"] = "rocm"
    code, _, err = clone.run()
    assert code == 2
    assert "TPIRT_TORCH: expected cpu or cuda, got 'rocm'" in err


def test_the_command_is_shown_unless_the_shell_finds_one(clone: Clone) -> None:
    tools = clone.pretended / "bin"
    tools.mkdir()
    clone.environment["PATH"] = f"{tools}:/usr/bin:/bin"
    _, _, err = clone.run()
    shown = re.search(r"to type tpirt in this shell: (.*)\n", err)
    assert shown is not None, err
    script = f"{shown[1]} && command -v tpirt"
    (clone.root / ".venv" / "bin" / "activate").write_text('PATH="${BASH_SOURCE%/*}:$PATH"\n')
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout == f"{clone.root}/.venv/bin/tpirt\n"
    (tools / "tpirt").write_text("#!/bin/sh\n")
    (tools / "tpirt").chmod(0o755)
    (clone.root / ".venv" / "tpirt-installed").unlink()
    assert "to type tpirt" not in clone.run()[2]


def test_a_script_beside_a_clone_named_tpirt_finds_the_package(tmp_path: Path) -> None:
    """An editable installation, as pip makes one; nothing else is on the path."""
    clone, site = tmp_path / "tpirt", tmp_path / "site"
    (clone / "tpirt").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "tpirt/version.py"):
        shutil.copy(ROOT / name, clone / name)
    (clone / "tpirt" / "__init__.py").write_text("Engine = 'the package'\n")
    build = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    script = tmp_path / "script.py"
    script.write_text(
        f"import site; site.addsitedir({str(site)!r}); import tpirt; print(tpirt.Engine)"
    )
    done = run(sys.executable, "-S", str(script), env={"PATH": os.environ["PATH"]}, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "the package\n"), done.stderr


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
