"""All devices sleep, as laptops in one bag do: the chat goes on with the next message.

By default they sleep for some seconds; ``TPIRT_TEST_FROZEN_S=600 TPIRT_TEST_TIMEOUT_S=20`` makes it
ten minutes, with the timeout that users have.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import psutil
import pytest

from tests.support.models import make_exclaimer
from tests.support.nightly import nightly
from tests.support.terminal import Terminal
from tpirt.testing.processes import PeerProcess

FROZEN_S = float(os.environ.get("TPIRT_TEST_FROZEN_S", "8"))
TIMEOUT_S = os.environ.get("TPIRT_TEST_TIMEOUT_S", "3")
SLACK_S = 10.0
ANSWER, READY, CTRL_D = "!!!!!!!!!!", r"\x1b\[\?2004h", "\x04"


@pytest.mark.timeout(FROZEN_S + 120)
@pytest.mark.parametrize("phase", [nightly("idle"), nightly("answer")])
def test_all_processes_are_frozen_and_go_on(
    peers: Callable[[int], list[PeerProcess]], tmp_path: Path, phase: str
) -> None:
    model = make_exclaimer(tmp_path / "exclaimer")
    two = peers(2)
    arguments = ["-m", "tpirt", "chat", "--model", str(model), "--store", str(tmp_path / "store")]
    arguments += ["--threads", "1", "--timeout", TIMEOUT_S, "--max-tokens", "40", "--fresh"]
    arguments += ["--peers", ",".join(peer.address for peer in two)]
    chat = Terminal(
        *arguments,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "xterm-256color"},
        encoding="utf-8",
        codec_errors="replace",
        dimensions=(40, 120),
        timeout=60,
    )
    try:
        chat.expect(READY)
        chat.send("hello\r")
        chat.expect(ANSWER)
        if phase == "idle":
            chat.expect(READY)
        everyone = [psutil.Process(pid) for pid in (chat.pid, *(peer.pid for peer in two))]
        for process in everyone:
            process.send_signal(signal.SIGSTOP)
        time.sleep(FROZEN_S)
        for process in everyone:
            process.send_signal(signal.SIGCONT)
        if phase == "answer":
            chat.expect(READY, timeout=float(TIMEOUT_S) + SLACK_S)
        chat.send("and now?\r")
        chat.expect(ANSWER, timeout=float(TIMEOUT_S) + SLACK_S)
        chat.expect(READY)
        chat.send(CTRL_D)
        chat.expect(pexpect.EOF)
        chat.wait()
        assert chat.exitstatus == 0
        assert all(peer.alive and "Traceback" not in peer.log for peer in two)
    finally:
        chat.close(force=True)
