"""``tpirt chat`` as a person and a script meet it: real processes, a real terminal.

The model answers ``!!!!...`` to everything, for as long as it may.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pexpect
import psutil
import pytest

from tests.support.models import make_exclaimer
from tests.support.terminal import Terminal
from tpirt.testing.processes import (
    PeerProcess,
    descendants,
    killed_at_exit,
    run_python,
    start_python,
)

pytestmark = pytest.mark.timeout(120)

ENDLESS = ("--max-tokens", "1000000")
ANSWER = "!!!!!!!!!!"
UP, CTRL_C, CTRL_D = "\x1b[A", "\x03", "\x04"
READY = r"\x1b\[\?2004h"  # the line editor asks for bracketed paste: it is reading


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_exclaimer(tmp_path_factory.mktemp("models") / "exclaimer")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slices")


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[str]:
    """The address of a worker; where its start and its end do not matter, it is no local one."""
    with PeerProcess(tmp_path / "peer") as process:
        yield process.address


Start = Callable[..., pexpect.spawn]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {
        name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ
    }
    return {
        **kept,
        "HOME": str(tmp_path),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "TERM": "xterm-256color",
        "PYTHONUTF8": "1",
    }


@pytest.fixture
def command(model: Path, store: Path) -> list[str]:
    """The arguments of Python."""
    start = ["-m", "tpirt", "chat", "--model", str(model), "--store", str(store)]
    return [*start, "--threads", "1"]


@pytest.fixture
def start(command: list[str], environment: dict[str, str]) -> Iterator[Start]:
    """Starts chats on terminals of their own; whatever a test leaves behind is ended."""
    chats: list[pexpect.spawn] = []

    def spawn(*options: str, term: str = "xterm-256color", shell: str = "") -> pexpect.spawn:
        terminal: dict[str, Any] = {
            "env": {**environment, "TERM": term},
            "encoding": "utf-8",
            "codec_errors": "replace",
            "dimensions": (40, 120),
            "timeout": 40,
        }
        if shell:
            argv = ["-c", f'exec "$@" {shell}', "sh", sys.executable, *command, *options]
            chats.append(pexpect.spawn("/bin/sh", argv, **terminal))
        else:
            chats.append(Terminal(*command, *options, **terminal))
        return chats[-1]

    yield spawn
    for chat in chats:
        chat.close(force=True)


def workers(master: int) -> list[psutil.Process]:
    """The worker processes that this master has started."""
    return descendants(master, lambda each: "peer" in each.cmdline())


def leave(chat: pexpect.spawn, keys: str = CTRL_D) -> None:
    """Leave, and see that it ends well and leaves no process behind."""
    left = workers(chat.pid)
    chat.send(keys)
    chat.expect(pexpect.EOF)
    chat.wait()
    assert (chat.exitstatus, chat.signalstatus) == (0, None)
    assert not psutil.wait_procs(left, timeout=10)[1]


def test_ctrl_c_stops_the_answer_not_the_session(start: Start, tmp_path: Path) -> None:
    chat = start("--local", "2", *ENDLESS)
    chat.expect("exclaimer, 2 ranks, float32, context 1048576 tokens")
    chat.expect("/help for commands")
    chat.expect(READY)
    chat.send("first question\r")
    chat.expect(ANSWER)
    chat.send(CTRL_C)
    chat.expect(r"\[stopped\]")
    chat.expect(r"TTFT [\d.]+ s, [\d.e+]+ tokens/s, context \d+/1048576")
    chat.expect(READY)
    chat.send("not sent" + CTRL_C)
    chat.expect("/exit or Ctrl-D leaves")
    chat.expect(READY)
    chat.send("/set max_tokens 7\r")
    chat.expect("max_tokens  7")
    chat.expect(READY)
    chat.send("second question\r")
    chat.expect("cut at 7 tokens")
    assert re.search(r"(?<!!)!{7}\r\n", chat.before)
    chat.expect(READY)
    chat.send(UP + UP + UP + "\r")
    chat.expect("cut at 7 tokens")
    chat.expect(READY)
    chat.send("/stats\r")
    chat.expect("last answer: 7 tokens, TTFT")
    chat.expect(READY)
    chat.send(f"/save {tmp_path / 'talk.json'}\r")
    chat.expect("6 messages saved")
    leave(chat)
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    asked = [message["content"] for message in messages[::2]]
    assert asked == ["first question", "second question", "first question"]
    assert set(messages[1]["content"]) == {"!"}
    history = tmp_path / "state" / "tpirt" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+second question" in history.read_text()


def test_what_is_pasted_stays_in_one_piece_and_is_written_only_where_wanted(
    start: Start, tmp_path: Path
) -> None:
    chat = start("--max-tokens", "7", "--no-journal")
    chat.expect(READY)
    chat.send("\x1b[200~one\r\ntwo\r\x1b[201~three\r")
    chat.expect("cut at 7 tokens")
    chat.send(f"/sa\t{tmp_path / 'talk.json'}\r")  # completed from what was typed
    chat.expect("2 messages saved")
    leave(chat)
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert messages[0]["content"] == "one\ntwo\nthree"
    state = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert not [path for path in state if b"three" in path.read_bytes()]


def test_ctrl_c_during_a_prefill(start: Start, peer: str, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "x" * 150_000}, {"role": "assistant", "content": "!"}]
    (tmp_path / "long.json").write_text(
        json.dumps({"version": 1, "system": None, "messages": turns})
    )
    chat = start("--peers", peer, "--max-tokens", "7")
    chat.expect(READY)
    chat.send(f"/load {tmp_path / 'long.json'}\r")
    chat.expect("2 messages loaded")
    chat.send("go on\r")
    chat.expect(r"prefill .* of 150\d\d\d tokens")
    chat.send(CTRL_C)
    chat.expect(r"\[stopped\] the message is not kept")
    chat.send("/reset\r")
    chat.expect("new conversation")
    chat.send("hello\r")
    chat.expect("cut at 7 tokens")
    leave(chat, "/exit\r")


def test_a_peer_dies_during_an_answer(start: Start) -> None:
    chat = start("--local", "2", *ENDLESS)
    chat.expect(READY)
    chat.send("go\r")
    chat.expect(ANSWER)
    (worker,) = workers(chat.pid)
    worker.kill()
    chat.expect(r"peer ([^\s:]+:\d+): connection lost")
    peer = chat.match[1]
    chat.expect(f"no peer is left; by another plan, without {peer}")
    chat.expect(r"going on after [\d.]+ s: [\d.]+ s to notice, [\d.]+ s to form")
    chat.expect(ANSWER)
    chat.send(CTRL_C)
    chat.expect(r"\[stopped\]")
    chat.send("/stats\r")
    chat.expect(f"lost peers:\\s+lost +since then.*{peer} ")
    leave(chat)


@pytest.mark.nightly
def test_a_peer_dies_and_there_is_no_other_plan(start: Start, tmp_path: Path) -> None:
    store = tmp_path / "store"
    chat = start("--local", "2", "--store", str(store), *ENDLESS)
    chat.expect(READY)
    chat.send("go\r")
    chat.expect(ANSWER)
    store.rename(tmp_path / "moved")
    store.touch()  # nothing can be written there
    (worker,) = workers(chat.pid)
    worker.kill()
    chat.expect("the answer so far is kept")
    chat.expect(r"error: peer ([^\s:]+:\d+): connection lost")
    peer = chat.match[1]
    chat.expect("No answers without this peer")
    chat.send("still there?\r")
    chat.expect(f"error: still without peer {peer}; start it again, or /exit")
    chat.send("/peers\r")
    chat.expect(rf"1 +{peer} +4 +2 +1 +lost")
    chat.send(f"/save {tmp_path / 'talk.json'}\r")
    chat.expect("2 messages saved")
    leave(chat)
    again = start("--max-tokens", "7", "--resume")
    again.expect("resuming conversation .*: 2 messages")
    again.expect(READY)
    again.send("and?\r")
    again.expect("cut at 7 tokens")
    leave(again)
    assert json.loads((tmp_path / "talk.json").read_text())["messages"][0]["content"] == "go"


def test_a_terminal_that_can_only_print(start: Start, peer: str) -> None:
    chat = start("--peers", peer, *ENDLESS, term="dumb")
    seen = []
    for send, expected in (
        (None, "Ctrl-D leaves\r\n> "),
        ("go\n", ANSWER),
        (CTRL_C, r"\[stopped\]\r\nTTFT [^\r]*\r\n> "),
        (CTRL_C, r"\(/exit or Ctrl-D leaves\)\r\n> "),
        ("/set max_tokens 7\n", r"max_tokens  7\r\n> "),
        ("again\n", r"\r\n!!!!!!!\r\n[^>]*> "),
    ):
        if send is not None:
            chat.send(send)
        chat.expect(expected)
        seen += [chat.before, chat.after]
    leave(chat)
    assert "\x1b" not in "".join([*seen, chat.before])


def test_answers_to_a_file(start: Start, tmp_path: Path) -> None:
    chat = start("--max-tokens", "7", shell=f"> {tmp_path / 'answers'}")
    chat.expect(READY)
    chat.send("hello\r")
    chat.expect("TTFT")
    chat.send("/set seed\r")
    chat.expect(READY)
    leave(chat)
    assert (tmp_path / "answers").read_text() == "!!!!!!!\nseed  none\n"


def test_a_base_model_says_so(start: Start, tmp_path: Path) -> None:
    chat = start("--model", str(make_exclaimer(tmp_path / "base", template=None)), *ENDLESS)
    chat.expect("base model")
    chat.expect(READY)
    chat.send("Once upon a time\r")
    chat.expect(ANSWER)
    chat.send(CTRL_C)
    chat.expect(r"\[stopped\]")
    leave(chat)


# -- without a terminal ----------------------------------------------------------------------


def run(
    command: list[str], environment: dict[str, str], *options: str, typed: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    done: subprocess.CompletedProcess[bytes] = run_python(
        *command, *options, input=typed, env=environment, timeout_s=90
    )
    return done


def test_piped_lines(command: list[str], environment: dict[str, str], peer: str) -> None:
    typed = b"hi\n\n\xff\xfe not UTF-8\r\n/set max_tokens 3\n//stats\n/stats"
    options = ("--peers", peer, "--max-tokens", "7", "--each-line")
    done = run(command, environment, *options, typed=b"\xef\xbb\xbf" + typed)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert lines[:4] == ["!!!!!!!", "!!!!!!!", "max_tokens  3", "!!!"]
    assert [line.split()[0] for line in lines[4:] if line] == [
        *("rank", "0", "1"),
        *("prefill", "rank", "0", "1"),
        *("a", "rank", "0", "1", "0-1", "longest", "last"),
        *("drafts:", "conversations:"),
    ]
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"> " not in done.stdout + done.stderr


def test_one_prompt(command: list[str], environment: dict[str, str]) -> None:
    options = ("--max-tokens", "7", "--quiet", "--prompt", "/hello")
    done = run(command, environment, *options)
    assert (done.returncode, done.stdout) == (0, b"!!!!!!!\n")


def test_no_input_at_all(command: list[str], environment: dict[str, str]) -> None:
    done = run(command, environment, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_scripts_fail_at_the_first_error(command: list[str], environment: dict[str, str]) -> None:
    done = run(command, environment, "--quiet", "--each-line", typed=b"/nope\nhi\n")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"tpirt: error: no command /nope")


@contextmanager
def chat_that_answers(
    command: list[str], environment: dict[str, str], *options: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A chat on pipes in the middle of an answer."""
    arguments = [*command, "--quiet", "--local", "2", "--each-line", *options]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with killed_at_exit(start_python(*arguments, env=environment, **pipes)) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
        assert process.stdout.read(10) == ANSWER.encode()
        yield process


@pytest.fixture
def answering(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A chat in the middle of an answer without end."""
    with chat_that_answers(command, environment, *ENDLESS) as process:
        yield process


@pytest.mark.nightly  # a chat in a terminal does the same above
def test_a_lost_peer_does_not_end_a_script(command: list[str], environment: dict[str, str]) -> None:
    with chat_that_answers(command, environment, "--max-tokens", "300") as process:
        (worker,) = workers(process.pid)
        worker.kill()
        rest, errors = process.communicate(timeout=60)
    assert (rest.strip(), process.returncode) == (b"!" * 290, 0), errors


def test_ctrl_c_ends_a_script(answering: subprocess.Popen[bytes]) -> None:
    left = workers(answering.pid)
    answering.send_signal(signal.SIGINT)
    out, _ = answering.communicate(timeout=60)
    assert answering.returncode == 130
    assert out.endswith(b"\n")
    assert not psutil.wait_procs(left, timeout=10)[1]
