"""Real processes: worker peers and command lines, and checks that all of them have ended."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tpirt.cluster.launcher import READY_PREFIX
from tpirt.testing.forkserver import ForkedProcess, ForkServer

DEADLINE_S = 30.0
COLD_STARTS = "TPIRT_COLD_STARTS"  # if set, every process is a cold start, as for users


@functools.cache
def fork_server() -> ForkServer | None:
    """This process's fork server, started on first use; None for cold starts."""
    if sys.platform != "linux" or os.environ.get(COLD_STARTS):
        return None
    server = ForkServer()
    atexit.register(server.close)
    return server


def start_python(*arguments: str, **options: Any) -> subprocess.Popen[Any]:
    """Start ``python -m MODULE ...`` or ``python -c CODE ...``, by a fork server if possible.

    Args:
        options: ``stdin``, ``stdout``, ``stderr``, ``text``, ``env``, ``cwd`` and
            ``start_new_session`` of ``subprocess.Popen``; with ``preexec_fn`` the start is cold.
    """
    server = None if "preexec_fn" in options else fork_server()
    if server is None:
        return subprocess.Popen([sys.executable, *arguments], **options)
    return ForkedProcess(server, arguments, **options)


class ForkedWorker:
    """A forked process with what ``LocalPeers`` uses of ``asyncio.subprocess.Process``.

    Attributes:
        pid: its process id.
        stdin: the pipe to it.
        stdout: itself, for :meth:`readline`.
    """

    def __init__(self, process: subprocess.Popen[bytes]):
        self._process = process
        self.pid = process.pid
        self.stdin = process.stdin
        self.stdout = self
        self.terminate = process.terminate
        self.kill = process.kill

    async def readline(self) -> bytes:
        """Read a line of its output."""
        assert self._process.stdout is not None
        return await asyncio.to_thread(self._process.stdout.readline)

    async def wait(self) -> int:
        """Wait for its exit; returns its exit code."""
        code = await asyncio.to_thread(self._process.wait)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code


async def fork_worker(executable: str, flag: str, *arguments: str, **options: Any) -> ForkedWorker:
    """Stand in for ``asyncio.create_subprocess_exec`` where ``LocalPeers`` starts a worker."""
    assert (executable, flag) == (sys.executable, "-P")
    return ForkedWorker(start_python(*arguments, **options))


def run_python(*arguments: str, timeout_s: float = DEADLINE_S, **options: Any) -> Any:
    """Run Python and capture its output, like ``subprocess.run``.

    Args:
        options: of :func:`start_python`, and ``input``.
    """
    data = options.pop("input", None)
    stdin = subprocess.DEVNULL if data is None else subprocess.PIPE
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with killed_at_exit(start_python(*arguments, **{**pipes, **options})) as process:
        out, err = process.communicate(data, timeout=timeout_s)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


class PeerProcess:
    """A ``tpirt peer`` process on loopback; a context manager.

    Attributes:
        pid: its process id.
        store: its slice store.
    """

    def __init__(self, store: Path, *options: str):
        """Start it; it listens after :attr:`address` has returned."""
        self.store = store
        store.mkdir(parents=True, exist_ok=True)
        self._log = store.parent / f"{store.name}.log"
        with open(self._log, "w", encoding="utf-8") as log:
            self._process = start_python(
                *("-m", "tpirt", "peer", "--listen", "127.0.0.1:0"),
                *("--threads", "1", "--store", str(store), *options),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.pid = self._process.pid
        self._address = ""

    @property
    def address(self) -> str:
        """Its address, ``host:port``."""
        if not self._address:
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            assert line.startswith(READY_PREFIX), f"{line!r} {self.log}"
            self._address = line.removeprefix(READY_PREFIX).split()[0]
        return self._address

    @property
    def peer_port(self) -> str:
        """The end of its peer id."""
        return ":" + self.address.rpartition(":")[2]

    @property
    def log(self) -> str:
        """Its output on standard error."""
        return self._log.read_text(encoding="utf-8")

    @property
    def alive(self) -> bool:
        """Whether it is running."""
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def end(self) -> int:
        """Kill it if it is running; returns its exit code."""
        if self.alive:
            self._process.kill()
        code = self._process.wait(DEADLINE_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.end()


def start_cli(
    *arguments: str, env: dict[str, str] | None = None, stdin: int | None = subprocess.DEVNULL
) -> subprocess.Popen[str]:
    """Start the ``tpirt`` command; use the result as a context manager."""
    return start_python(
        "-m",
        "tpirt",
        *arguments,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the ``tpirt`` command to its end."""
    done: subprocess.CompletedProcess[str] = run_python("-m", "tpirt", *arguments, text=True)
    return done


@contextlib.contextmanager
def killed_at_exit(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """Kill the process on exit."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def descendants(
    pid: int | None = None, where: Callable[[psutil.Process], bool] = lambda _: True
) -> list[psutil.Process]:
    """The running descendants of ``pid`` (by default of this process) that satisfy ``where``.

    Without processes that end meanwhile, and without this process's fork server.
    """
    server = fork_server.cache_info().currsize and fork_server()
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if not (server and process.pid == server.pid) and where(process):
                    found.append(process)
    return found


def survivors(processes: Sequence[psutil.Process], timeout_s: float = 10.0) -> list[psutil.Process]:
    """Wait for processes to end; returns those still running."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return list(alive)


def wait_for(
    condition: Callable[[], object], what: str = "", timeout_s: float = DEADLINE_S
) -> None:
    """Poll until ``condition`` holds.

    Raises:
        AssertionError: it does not within ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what or condition}"
        time.sleep(0.01)
