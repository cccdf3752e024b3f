"""A Python program on a terminal of its own, started warm where that is possible."""

from __future__ import annotations

import os
import pty
import sys
import termios
from typing import Any

import pexpect
from ptyprocess import PtyProcess

from tpirt.testing.processes import fork_server


class Terminal(pexpect.spawn):
    """``pexpect.spawn`` of ``python -m MODULE ...``."""

    def __init__(self, *arguments: str, **options: Any):
        super().__init__(sys.executable, list(arguments), **options)

    def _spawnpty(self, args: list[str], **options: Any) -> PtyProcess:
        """Open a terminal and put the program on it: the one step of ``spawn`` that differs."""
        server = fork_server()
        if server is None:
            return super()._spawnpty(args, **options)
        ours, theirs = pty.openpty()
        try:
            termios.tcsetwinsize(theirs, options["dimensions"])
            arguments = [os.fsdecode(each) for each in args[1:]]
            pid = server.fork(arguments, [theirs] * 3, env=options["env"], terminal=True)
        finally:
            os.close(theirs)
        return PtyProcess(pid, ours)
