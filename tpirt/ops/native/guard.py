"""Run a command that does not outlive the process that started it, however that ends.

A script: ``python guard.py FOLDER COMMAND ...``. Its standard input is a pipe. When the other end
closes it, or is killed, the command is killed with its children, and FOLDER is removed.

Signals from a terminal do not arrive here: the guard is started in a session of its own.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys

_LOOK_S = 0.02


def main(folder: str, *command: str) -> int:
    """Run ``command``; returns its exit code, 128 + N after signal N."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    while process.poll() is None:
        if _abandoned(_LOOK_S):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if _abandoned(0):
        shutil.rmtree(folder, ignore_errors=True)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _abandoned(wait_s: float) -> bool:
    """Whether standard input ends within ``wait_s``; nothing is ever written to it."""
    return bool(select.select([0], [], [], wait_s)[0])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
