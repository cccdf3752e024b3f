"""Compile the C sources, and keep libraries in folders under names that say what they are.

A library is called ``kernels-KEY-DIGEST.native``; Python would take ``.so`` for a module. KEY is a
hash of the sources and flags, DIGEST one of the file itself. So a library of other sources is not
looked at, a damaged one is not loaded, and processes that write at once do not disturb each other.

A compiler runs under :mod:`guard`: it ends with this process, and Ctrl-C does not reach it.

Only Python's standard library is used: the build backend runs this where nothing is installed. Run
as a program, it compiles beside the sources, which the scripts do while pip downloads.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent
_FLAGS = (
    *("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing"),
    *("-pthread", "-fPIC"),
)
_MOST_AT_ONCE = 2  # compilers; each takes up to 500 MB
# What a folder of C headers must have; a compiler without them is of no use.
_PROBE = b"#include <math.h>\n#include <pthread.h>\n#include <string.h>\n"
COMPILE_S = 900.0  # a small device takes a minute
_PROBE_S = 10.0
_PATIENCE_S = 1.0  # longer waits are explained
_LOOK_S = 0.02
NEVER = threading.Event()  # the default for ``stop``

_log = logging.getLogger(__name__)


class CompileError(Exception):
    """A compiler that fails; the message is its first error."""


class CancelledCompileError(Exception):
    """The caller set ``stop``."""


@dataclass(frozen=True)
class Compiler:
    """A C compiler.

    Attributes:
        name: for messages.
        command: its command, with options for this CPU and system.
    """

    name: str
    command: tuple[str, ...]


@functools.cache
def source_key(folder: Path = SOURCES) -> str:
    """Hash the sources in ``folder`` and the flags that they are compiled with."""
    key = hashlib.sha256(repr(_FLAGS).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in (".c", ".h", ".inc"):
            key.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return key.hexdigest()[:16]


def compilers(stop: threading.Event = NEVER) -> Iterator[Compiler]:
    """The C compilers of this machine that find their headers, the preferred one first.

    Those that fail or hang are named in the log.
    """
    found = [(name, path) for name in ("cc", "gcc", "clang") if (path := shutil.which(name))]
    options: tuple[str, ...] = ()
    if sys.platform == "darwin":
        options = ("-mmacosx-version-min=11.0",)
        if not _succeeds(("xcode-select", "-p"), stop):
            found = []  # they are stubs, which open a window that offers Xcode
    for name, path in found:
        if _succeeds((path, "-fsyntax-only"), stop, _PROBE):
            yield Compiler(name, (path, *options))
    if importlib.util.find_spec("ziglang") is not None:
        yield zig("-mcpu=baseline")


def zig(*options: str) -> Compiler:
    """The compiler in the package ``ziglang``."""
    return Compiler("ziglang", (sys.executable, "-m", "ziglang", "cc", *options))


def compile_library(
    compiler: Compiler, folder: Path = SOURCES, stop: threading.Event = NEVER
) -> bytes:
    """Compile the sources in ``folder``; returns the library's content.

    Raises:
        CompileError: the compiler failed.
        CancelledCompileError: ``stop`` was set meanwhile.
        OSError: there is no temporary folder that can be written to.
    """
    build = f'-DTP_BUILD="{source_key(folder)}"'
    with _workplace() as workplace:
        target = workplace / "kernels.so"

        def compile_unit(source: Path) -> str:
            output = str(workplace / f"{source.stem}.o")
            command = [*compiler.command, *_FLAGS, build, "-c", str(source), "-o", output]
            _run(command, COMPILE_S, workplace, stop)
            return output

        try:
            with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_AT_ONCE)) as executor:
                units = sorted(folder.glob("*.c"), reverse=True)  # plain C, the longest, first
                objects = list(executor.map(compile_unit, units))
            link = [*compiler.command, "-pthread", "-shared", "-s", *objects, "-lm"]
            _run([*link, "-o", str(target)], COMPILE_S, workplace, stop)
        except CompileError as exc:
            raise CompileError(f"{compiler.name}: {exc}") from None
        content = target.read_bytes() if target.is_file() else b""
        if not content or not _is_whole(content):
            raise CompileError(f"{compiler.name}: no whole library was written")
        return content


def provide_library() -> bool:
    """Compile beside the sources, unless there is a library; returns whether there is one now."""
    if any(_loads(path) for path in kept_libraries(SOURCES)):
        return True
    drop_libraries(SOURCES)
    for compiler in compilers():
        try:
            keep_library(SOURCES, compile_library(compiler))
            return True
        except (CompileError, OSError) as exc:
            _log.warning("native kernels were not compiled: %s", exc)
    return False


def keep_library(folder: Path, content: bytes) -> Path:
    """Write a library into ``folder`` under its name; returns its path.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"kernels-{source_key()}-{_digest(content)}.native"
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".kernels-")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return target


def kept_libraries(folder: Path) -> Iterator[Path]:
    """The undamaged libraries in ``folder`` that were compiled from the present sources."""
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        return
    for path in paths:
        if path.name.startswith(f"kernels-{source_key()}-") and path.suffix == ".native":
            with contextlib.suppress(OSError):
                # A FIFO would be waited for.
                if path.is_file() and _is_undamaged(path.read_bytes(), path.stem):
                    yield path


def drop_libraries(folder: Path) -> None:
    """Remove all libraries in ``folder``, for another to take their place."""
    for path in folder.glob("kernels-*.native"):
        path.unlink(missing_ok=True)


def wait_until(
    done: Callable[[], bool], limit_s: float, stop: threading.Event, notice: str = ""
) -> bool:
    """Wait until ``done()``; returns False if it is not within ``limit_s``.

    ``notice`` is logged if it takes longer than a second.

    Raises:
        CancelledCompileError: ``stop`` was set.
    """
    begun, said = time.monotonic(), not notice
    while not done():
        waited = time.monotonic() - begun
        if waited >= limit_s:
            return False
        if waited >= _PATIENCE_S and not said:
            _log.info("%s", notice)
            said = True
        if stop.wait(_LOOK_S):
            raise CancelledCompileError
    return True


def _loads(path: Path) -> bool:
    """Whether this machine can load a library, which may have been compiled for another."""
    try:
        ctypes.CDLL(os.fspath(path))
    except OSError:
        return False
    return True


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _is_undamaged(content: bytes, stem: str) -> bool:
    return _digest(content) == stem.rpartition("-")[2] and _is_whole(content)


def _is_whole(content: bytes) -> bool:
    """Whether all segments of an ELF library lie within it.

    Linux maps a shorter file, and to read the rest kills the process. macOS refuses it by itself.
    """
    if not content.startswith(b"\x7fELF\2\1"):  # of 64 bits, little-endian
        return True  # the loader refuses what is no library
    try:
        (table,) = struct.unpack_from("<Q", content, 32)
        size, count = struct.unpack_from("<HH", content, 54)
        places = [
            struct.unpack_from("<QQQQ", content, table + size * each + 8) for each in range(count)
        ]
    except struct.error:
        return False
    return all(offset + nbytes <= len(content) for offset, _, _, nbytes in places)


def _succeeds(command: tuple[str, ...], stop: threading.Event, source: bytes | None = None) -> bool:
    """Whether a command succeeds; ``source`` is the C source that it gets as last argument."""
    try:
        with _workplace() as workplace:
            probe = workplace / "probe.c"
            if source is not None:
                probe.write_bytes(source)
                command = (*command, str(probe))
            notice = f"waiting for {command[0]}, for up to {_PROBE_S:g} s"
            _run(command, _PROBE_S, workplace, stop, notice)
            return True
    except (CompileError, OSError) as exc:
        _log.info("%s is not used: %s", command[0], exc)
        return False


@contextlib.contextmanager
def _workplace() -> Iterator[Path]:
    """A temporary folder, which the guard may have removed when it ends."""
    with tempfile.TemporaryDirectory(prefix="tpirt-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _run(
    command: Sequence[str], limit_s: float, workplace: Path, stop: threading.Event, notice: str = ""
) -> None:
    """Run a command, which has no input, and keeps its temporary files in ``workplace``.

    Raises:
        CompileError: it failed, or did not end within ``limit_s``; it is killed.
        CancelledCompileError: ``stop`` was set; it is killed.
    """
    guarded = [sys.executable, "-I", "-S", str(SOURCES / "guard.py"), str(workplace), *command]
    # zig keeps what it compiles, some 10 MB: in a home directory nobody would ever remove it.
    caches = dict.fromkeys(("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"), str(workplace))
    environment = {**caches, **os.environ, "LC_ALL": "C", "TMPDIR": str(workplace)}
    with (
        # Not a pipe, which a process left behind would keep open.
        tempfile.TemporaryFile(dir=workplace) as errors,
        subprocess.Popen(
            guarded,
            stdin=subprocess.PIPE,  # leaving the block closes it: what still runs is killed
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
            start_new_session=True,
        ) as guard,
    ):
        if not wait_until(lambda: guard.poll() is not None, limit_s, stop, notice):
            raise CompileError(f"no answer within {limit_s:g} s")
        if guard.returncode:
            errors.seek(0)
            raise CompileError(_first_error(errors.read(), guard.returncode))


def _first_error(output: bytes, code: int) -> str:
    lines = output.decode(errors="replace").splitlines()
    errors = [line.strip() for line in lines if "error" in line.lower()]
    return (errors or lines or [f"exit code {code}"])[0]


if __name__ == "__main__":
    provide_library()
