"""Python processes that start in milliseconds: forks of a server that has imported tpirt.

A cold start of ``python -m tpirt`` needs a second of CPU time to import torch and gRPC; the server
does it once. Its forks are ordinary processes: children of the caller with their own signals, exit
codes, standard streams and environment.

Forking is safe because the server only imports: it runs one thread, and no event loop, thread pool
or gRPC core has been started in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import inspect
import json
import os
import pkgutil
import runpy
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, TextIO

import tpirt

_HEADER = struct.Struct("<I")  # length of a request; process id of a reply
_PR_SET_CHILD_SUBREAPER = 36
_EXECUTE = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]


class ForkServer:
    """A server that belongs to this process and ends with it.

    Attributes:
        pid: the server's process id.
    """

    def __init__(self) -> None:
        """Start the server; it accepts requests after its imports."""
        ours, theirs = socket.socketpair()
        root = str(Path(tpirt.__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # OpenBLAS would start its threads when numpy is imported.
                env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            )
        self.pid = self._process.pid
        self._socket = ours
        self._lock = threading.Lock()

    def fork(
        self,
        arguments: Sequence[str],
        streams: Sequence[int],
        *,
        env: dict[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        new_session: bool = False,
        terminal: bool = False,
    ) -> int:
        """Start a child of this process that runs ``python ARGUMENTS``.

        Args:
            arguments: ``-m MODULE ...`` or ``-c CODE ...``.
            streams: descriptors of its standard input, output and error.
            env: its environment; by default this process's.
            cwd: its folder; by default this process's.
            new_session: whether it starts a new session.
            terminal: whether its standard input becomes its controlling terminal.

        Returns:
            Its process id, after its signal handlers are set.
        """
        request = {
            "arguments": list(arguments),
            "env": dict(os.environ if env is None else env),
            "cwd": os.path.abspath(cwd or "."),
            "new_session": new_session or terminal,
            "terminal": terminal,
        }
        data = json.dumps(request).encode()
        with self._lock, _adopting_orphans():
            socket.send_fds(self._socket, [_HEADER.pack(len(data))], list(streams))
            self._socket.sendall(data)
            reply = self._socket.recv(_HEADER.size, socket.MSG_WAITALL)
        if len(reply) < _HEADER.size:
            raise RuntimeError(f"the fork server ended with exit code {self._process.wait()}")
        pid: int = _HEADER.unpack(reply)[0]
        return pid

    def close(self) -> None:
        """End the server; its forks keep running."""
        self._socket.close()
        self._process.wait()


class ForkedProcess(subprocess.Popen[Any]):
    """``subprocess.Popen`` whose child is forked by a server instead of executed."""

    def __init__(self, server: ForkServer, arguments: Sequence[str], **options: Any):
        self._server = server
        super().__init__([sys.executable, *arguments], **options)

    def _execute_child(self, *args: Any) -> None:
        # The only step of Popen that differs. It is not public; its parameters have not changed
        # since Python 3.11.
        given = _EXECUTE.bind(self, *args).arguments
        pipes = ("p2cread", "c2pwrite", "errwrite")
        streams = [fd if (fd := given[name]) != -1 else i for i, name in enumerate(pipes)]
        self.pid = self._server.fork(
            given["args"][1:],
            streams,
            env=given["env"],
            cwd=given["cwd"],
            new_session=given["start_new_session"],
        )
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in ends))  # type: ignore[attr-defined]


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Become the parent of orphaned descendants within the block: the server's forks."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


# -- the server ------------------------------------------------------------------------------


def _serve(connection: socket.socket) -> None:
    given = set(os.environ)
    for module in pkgutil.walk_packages(tpirt.__path__, "tpirt."):
        if not module.name.endswith("__main__") and ".testing" not in module.name:
            import_module(module.name)
    imported = {name: os.environ[name] for name in set(os.environ) - given}
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        sys.exit(f"fork server: importing tpirt started {threads - 1} threads: forks would break")
    gc.freeze()  # keeps pages of imported modules shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    while True:
        header, streams, _, _ = socket.recv_fds(connection, _HEADER.size, 3)
        if not header:
            return
        size = _HEADER.unpack(header)[0]
        request = json.loads(connection.recv(size, socket.MSG_WAITALL))
        request["env"] = {**imported, **request["env"]}
        connection.sendall(_HEADER.pack(_fork_orphan(request, streams)))
        for stream in streams:
            os.close(stream)


def _fork_orphan(request: dict[str, Any], streams: list[int]) -> int:
    """Fork twice and end the process in between, so that the caller becomes the parent."""
    reading, writing = os.pipe()
    between = os.fork()
    if not between:
        parent = os.getpid()
        if not os.fork():
            while os.getppid() == parent:
                time.sleep(1e-4)
            _become(request, streams, writing)
        os._exit(0)
    os.close(writing)
    os.waitpid(between, 0)
    with open(reading, "rb") as ready:
        return int(ready.read())


def _become(request: dict[str, Any], streams: list[int], ready: int) -> NoReturn:
    """Turn a fork of the server into the requested process."""
    gc.unfreeze()
    if request["new_session"]:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    if request["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    encoding = request["env"].get("PYTHONIOENCODING")
    sys.stdin, sys.stdout, sys.stderr = (
        _text_stream(number, old, encoding or old.encoding)
        for number, old in enumerate((sys.stdin, sys.stdout, sys.stderr))
    )
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path.insert(0, request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.write(ready, b"%d" % os.getpid())
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    code = _exit_code(request["arguments"])
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if code < 0:  # as the interpreter ends after a Ctrl-C
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _text_stream(number: int, old: TextIO, encoding: str) -> TextIO:
    """Reopen a standard stream, which can be a terminal or not."""
    raw = open(number, "wb" if number else "rb", closefd=False)  # noqa: SIM115
    buffered = number == 2 or raw.isatty()
    return TextIOWrapper(raw, encoding, old.errors, line_buffering=buffered)


def _exit_code(arguments: list[str]) -> int:
    """Run the request; returns the exit code, or the negative number of a signal."""
    try:
        _run(arguments)
    except SystemExit as exc:
        if exc.code is None or isinstance(exc.code, int):
            return exc.code or 0
        sys.stderr.write(f"{exc.code}\n")
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run(arguments: list[str]) -> None:
    """Run ``python ARGUMENTS``."""
    option, what, *rest = arguments
    sys.argv = [option, *rest]
    match option:
        case "-c":
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        case "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        case _:
            raise ValueError(f"expected -m MODULE or -c CODE, got {option!r}")


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
