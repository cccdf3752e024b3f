"""Terminals as people have them: narrow, dumb, not UTF-8, stopped with Ctrl-Z, closed."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from tests.support.models import make_exclaimer
from tests.support.screen import Screen
from tests.support.terminal import Terminal
from tpirt.cli.main import main
from tpirt.testing.identities import MadeCluster
from tpirt.testing.processes import PeerProcess, wait_for

CTRL_C, CTRL_D, CTRL_Z = "\x03", "\x04", "\x1a"
ANSWER = "!!!!!!!!!!"
READY = r"\x1b\[\?2004h"  # the line editor asks for bracketed paste: it is reading


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_exclaimer(tmp_path_factory.mktemp("models") / "exclaimer")


@pytest.fixture
def command(model: Path, tmp_path: Path) -> list[str]:
    """The arguments of Python for an answer without end."""
    start = ["-m", "tpirt", "chat", "--model", str(model), "--store", str(tmp_path / "store")]
    return [*start, "--threads", "1", "--max-tokens", "1000000"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    return {**kept, "HOME": str(tmp_path), "TERM": "xterm", "LANG": "C.UTF-8"}


@pytest.fixture
def opened() -> Iterator[list[pexpect.spawn]]:
    """Programs on terminals, which are ended after the test."""
    programs: list[pexpect.spawn] = []
    yield programs
    for program in programs:
        program.close(force=True)


def has_echo(chat: pexpect.spawn) -> bool:
    """Whether the terminal shows what is typed, line by line."""
    local: int = termios.tcgetattr(chat.child_fd)[3]
    return local & (termios.ECHO | termios.ICANON) == termios.ECHO | termios.ICANON


def test_a_walk_on_a_dumb_terminal_of_forty_columns_in_latin_1(
    command: list[str], environment: dict[str, str], opened: list[pexpect.spawn]
) -> None:
    environment |= {"TERM": "dumb", "PYTHONIOENCODING": "latin-1"}
    chat = Terminal(
        *(*command, "--explain", "--max-tokens", "7"),
        **{"env": environment, "encoding": "latin-1", "dimensions": (40, 40), "timeout": 40},
    )
    opened.append(chat)
    chat.logfile_read = io.StringIO()
    for line, answer in (
        ("/help", "this list"),
        ('/set stop ["\\u4e16\\u00e9"]', r'\["\?\xe9"\]'),
        ("go", "!!!!!!!\r\n"),
        ("/stats", "peak RSS"),
        ("/peers", "state ok"),
        ("/hepl", "did you mean"),
    ):
        chat.expect("\n> ")
        chat.sendline(line)
        chat.expect(answer)
    chat.expect("\n> ")
    chat.send(CTRL_D)
    chat.expect(pexpect.EOF)
    chat.wait()
    assert chat.exitstatus == 0
    seen = chat.logfile_read.getvalue()
    assert not re.search(r"[^\r\n -~\xe9]|Traceback", seen)
    lines = [line for line in seen.split("\r\n") if not line.startswith("> ")]
    assert max(len(line) for line in lines if " " in line.strip()) <= 40  # a path stays whole
    units = re.compile(r" *(?:[KMG]iB|B|s|ms|tokens(?:/s)?)\b")
    assert not list(filter(units.match, lines))


def test_generate_says_how_fast_it_was_on_a_terminal(
    model: Path, environment: dict[str, str], opened: list[pexpect.spawn], tmp_path: Path
) -> None:
    arguments = ["--model", str(model), "--store", str(tmp_path / "store"), "--max-tokens", "4"]
    for quiet in ([], ["--quiet"]):
        program = Terminal(
            *("-m", "tpirt", "generate", *arguments, "--prompt", "go", *quiet),
            **{"env": environment, "encoding": "utf-8", "dimensions": (40, 80), "timeout": 40},
        )
        opened.append(program)
        program.expect(pexpect.EOF)
        lines = re.sub(r"\x1b\[\d*[a-zA-Z]", "", program.before).splitlines()
        figures = [line for line in lines if line.startswith("TTFT ")]
        assert [line.endswith(" tokens/s") for line in figures] == [True] * (not quiet)
        assert "" not in lines  # no line is left between the answer and what follows
    program = Terminal(
        *("-m", "tpirt", "generate", *arguments, "--prompt", "go", "--quiet", "--json"),
        **{"env": environment, "encoding": "utf-8", "dimensions": (40, 80), "timeout": 40},
    )
    opened.append(program)
    program.expect(pexpect.EOF)
    assert json.loads(program.before)["text"] == "!!!!"
    assert program.before.count("\n") == 1


def test_tables_and_a_command_to_copy_on_forty_columns(
    model: Path, environment: dict[str, str], opened: list[pexpect.spawn], tmp_path: Path
) -> None:
    """Lines break between cells; the terminal itself breaks the command, so it is copied whole."""
    keys = tmp_path / "keys"
    device = MadeCluster(keys).peer(tmp_path / "peer", "kitchen").identity
    split = "split", "--model", str(model), "--world-size", "1", "--out", str(tmp_path), "--quiet"
    assert main(split) == 0

    def shown(*arguments: str, until: object = pexpect.EOF) -> Screen:
        program = Terminal(
            *("-m", "tpirt", *arguments),
            **{"env": environment, "encoding": "utf-8", "dimensions": (40, 40), "timeout": 40},
        )
        opened.append(program)
        program.expect(until)
        screen = Screen(40)
        screen.write(program.before.replace("\r\n", "\n"))
        return screen

    assert device is not None
    lines = shown("cluster", "list", "--identity", str(keys)).text()
    assert lines[:3] == [
        "cluster home",
        "device kitchen",
        f"  identity {device.certificate.subject.identity},",
    ]
    lines = shown("store", "ls", "--store", str(tmp_path / "rank0")).text()
    assert re.fullmatch("slice [0-9a-f]{12}", lines[0])
    assert lines[1] == "  model exclaimer, format float32,"
    where = ("--identity", str(keys), "--listen", "127.0.0.1:0")
    screen = shown("cluster", "invite", *where, until="instead")
    (at,) = screen.breaks
    assert re.fullmatch(
        r"  tpirt peer --join 127\.0\.0\.1:\d+/\d{4}-\d{4}", "".join(screen.text()[at - 1 : at + 1])
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=str)
@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_a_signal_leaves_the_terminal_as_it_was(
    where: str,
    number: signal.Signals,
    command: list[str],
    environment: dict[str, str],
    opened: list[pexpect.spawn],
) -> None:
    chat = Terminal(*command, env=environment, encoding="utf-8", dimensions=(40, 120), timeout=40)
    opened.append(chat)
    chat.expect(READY)
    if where == "answer":
        chat.send("go\r")
        chat.expect(ANSWER)
    assert not has_echo(chat)
    chat.kill(number)
    chat.expect(pexpect.EOF)
    chat.wait()
    assert chat.signalstatus == number
    assert "Traceback" not in chat.before
    assert chat.before.count("\x1b[?2004l") == (where == "prompt")
    assert has_echo(chat)


def test_ctrl_z_gives_the_terminal_to_the_shell_and_fg_takes_it_back(
    command: list[str], environment: dict[str, str], opened: list[pexpect.spawn]
) -> None:
    shell = pexpect.spawn(
        "/bin/sh",
        ["-i"],
        env={**environment, "PS1": "shell]", "ENV": ""},
        encoding="utf-8",
        dimensions=(40, 240),
        timeout=40,
    )
    opened.append(shell)
    shell.expect_exact("shell]")
    # Below a script, which the signal stops at once: the shell then has the terminal.
    wrapped = subprocess.list2cmdline([sys.executable, *command, "--quiet"])
    shell.sendline(f"sh -c '\"$@\"; :' sh {wrapped}")
    shell.expect(READY)
    for typed, shown in (("go\r", ANSWER), (CTRL_C, READY), ("half a line", "half a line")):
        shell.send(typed)
        shell.expect(shown)
        if typed == CTRL_C:
            continue
        shell.send(CTRL_Z)
        shell.expect_exact("shell]")
        shell.sendline("stty -a")
        shell.expect_exact("shell]")
        assert {"echo", "icanon", "isig"} <= set(shell.before.replace(";", "").split())
        shell.sendline("fg")
        shell.expect(shown)
        shell.expect(shown if typed == "go\r" else re.escape("\x1b[?25h"))
        assert not has_echo(shell)
    shell.send("\r")
    shell.expect(ANSWER)
    shell.send(CTRL_C)
    shell.expect(READY)
    shell.send(CTRL_D)
    shell.expect_exact("shell]")


def test_a_terminal_that_is_closed_ends_the_answer_and_frees_the_peer(
    command: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    with PeerProcess(tmp_path / "peer") as peer:
        chat = Terminal(
            *(*command, "--peers", peer.address),
            **{"env": environment, "encoding": "utf-8", "dimensions": (40, 120), "timeout": 40},
        )
        chat.expect(READY)
        chat.send("go\r")
        chat.expect(ANSWER)
        chat.ptyproc.fileobj.close()
        assert os.waitstatus_to_exitcode(os.waitpid(chat.pid, 0)[1]) == -signal.SIGHUP
        chat.closed = chat.terminated = chat.ptyproc.closed = chat.ptyproc.terminated = True
        wait_for(lambda: peer.log.rstrip().endswith("waiting for a master"))


def test_ctrl_c_within_an_import_ends_the_command(tmp_path: Path) -> None:
    """A module that takes long and loses KeyboardInterrupt, as torch's imports may."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import sys, time\n"
        "print('importing', flush=True)\n"
        "try:\n"
        "    time.sleep(60)\n"
        "except BaseException:\n"
        "    sys.exit('lost')\n"
    )
    paths = filter(
        None, (str(tmp_path), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "tpirt", "chat"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, b"tpirt: interrupted\n")
