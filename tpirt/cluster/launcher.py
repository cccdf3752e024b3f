"""Worker peers as child processes on loopback, which end with this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from types import TracebackType

import psutil

from tpirt.errors import PeerUnreachableError
from tpirt.refusals import refusal
from tpirt.weights.store import SliceStore

_STANDSTILL_S = 60.0  # of a starting worker that takes no processor time
_STOP_TIMEOUT_S = 5.0
READY_PREFIX = "listening on "


class LocalPeers:
    """Starts ``count`` workers; an async context manager.

    Each worker has the read end of a pipe, and only this process has the write end: when this
    process ends, even by SIGKILL, the pipe closes and the worker ends too. Workers run in their
    own sessions, so that Ctrl-C at the terminal only reaches the master.
    """

    def __init__(self, count: int, threads: int, store: SliceStore):
        self.addresses: list[str] = []
        self._count = count
        self._options = ["--threads", str(threads), "--store", str(store.root)]
        if store.limit_bytes is not None:
            self._options += ["--store-limit", str(store.limit_bytes)]
        self._processes: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> LocalPeers:
        try:
            for _ in range(self._count):
                self._processes.append(await self._start())
            self.addresses += await asyncio.gather(*map(_address, self._processes))
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End all workers and wait for their exit."""
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
            with contextlib.suppress(ProcessLookupError):
                process.terminate()  # a starting worker does not read the pipe yet
        processes, self._processes = self._processes, []
        await asyncio.gather(*map(_ended, processes))

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        try:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # do not import from the current folder
                "-m",
                "tpirt",
                "peer",
                "--listen",
                "127.0.0.1:0",
                "--until-stdin-closes",
                "--quiet",
                *self._options,
                stdin=pipe,
                stdout=pipe,
                stderr=None,
                env=_environment(),
                start_new_session=True,
            )
        except OSError as exc:
            reason = refusal(exc) or f"{exc.strerror}; end other programs, or use fewer ranks"
            raise PeerUnreachableError(f"a local worker cannot be started: {reason}") from exc


def _environment() -> dict[str, str]:
    """This process's environment, with this tpirt first in the import path."""
    home = str(Path(__file__).parents[2])
    others = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (home, others)))}


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Wait for a worker's exit; kill it if it hangs."""
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _address(process: asyncio.subprocess.Process) -> str:
    """Wait for a worker's address for as long as its start makes progress, however slowly.

    Raises:
        PeerUnreachableError: it ended, or stands still.
    """
    reading = asyncio.ensure_future(_ready_line(process))
    used_s = -1.0
    try:
        while not reading.done():
            await asyncio.wait({reading}, timeout=_STANDSTILL_S)
            if not reading.done() and used_s == (used_s := _processor_s(process.pid)):
                raise PeerUnreachableError(
                    f"a local worker (process {process.pid}) has done nothing for "
                    f"{_STANDSTILL_S:g} s and has not started; is it stopped, or its disk stuck?"
                )
        return reading.result()
    finally:
        reading.cancel()


async def _ready_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    while line := (await process.stdout.readline()).decode(errors="replace"):
        if line.startswith(READY_PREFIX):
            return line.removeprefix(READY_PREFIX).split()[0]
    code = await process.wait()
    raise PeerUnreachableError(f"a local worker ended at its start with exit code {code}")


def _processor_s(pid: int) -> float:
    """The processor time that a process has taken, in seconds; 0 if it has ended."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
