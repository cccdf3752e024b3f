"""Compile the C sources, and keep libraries in folders under names that say what they are.

A library is called ``kernels-KEY-DIGEST.native``; Python would take ``.so`` for a module. KEY is a
hash of the sources and flags, DIGEST one of the file itself. So a library of other sources is not
looked at, a damaged one is not loaded, and processes that write at once do not disturb each other.

Only Python's standard library is used: the build backend runs this where nothing is installed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent
_UNITS = ("native.c", "pool.c", "selftest.c")
_FLAGS = (
    *("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing"),
    *("-pthread", "-fPIC", "-shared"),
)
# What a folder of C headers must have; a compiler without them is of no use.
_PROBE = b"#include <math.h>\n#include <pthread.h>\n#include <string.h>\n"
_COMPILE_S = 900.0  # a small device takes a minute
_PROBE_S = 60.0


class CompileError(Exception):
    """A compiler that fails; the message is its first error."""


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
    key = hashlib.sha256(repr((_UNITS, _FLAGS)).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in (".c", ".h", ".inc"):
            key.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return key.hexdigest()[:16]


def compilers() -> Iterator[Compiler]:
    """The C compilers of this machine that find their headers, the preferred one first."""
    found = [(name, path) for name in ("cc", "gcc", "clang") if (path := shutil.which(name))]
    options: tuple[str, ...] = ()
    if sys.platform == "darwin":
        options = ("-mmacosx-version-min=11.0",)
        if not _succeeds(("xcode-select", "-p")):
            found = []  # they are stubs, which open a window that offers Xcode
    for name, path in found:
        if _succeeds((path, "-fsyntax-only", "-x", "c", "-"), _PROBE):
            yield Compiler(name, (path, *options))
    if importlib.util.find_spec("ziglang") is not None:
        yield zig("-mcpu=baseline")


def zig(*options: str) -> Compiler:
    """The compiler in the package ``ziglang``."""
    return Compiler("ziglang", (sys.executable, "-m", "ziglang", "cc", *options))


def compile_library(compiler: Compiler, folder: Path = SOURCES) -> bytes:
    """Compile the sources in ``folder``; returns the library's content.

    Raises:
        CompileError: the compiler failed.
        OSError: there is no temporary folder that can be written to.
    """
    with tempfile.TemporaryDirectory(prefix="tpirt-") as temporary:
        target = Path(temporary) / "kernels.so"
        command = [*compiler.command, *_FLAGS, "-s", f'-DTP_BUILD="{source_key(folder)}"']
        command += [*(str(folder / unit) for unit in _UNITS), "-lm", "-o", str(target)]
        try:
            done = _run(command, _COMPILE_S, temporary)
        except (OSError, subprocess.SubprocessError) as exc:
            raise CompileError(f"{compiler.name}: {exc}") from exc
        if done.returncode or not target.is_file():
            raise CompileError(f"{compiler.name}: {_first_error(done)}")
        return target.read_bytes()


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
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        if name.startswith(f"kernels-{source_key()}-") and name.endswith(".native"):
            with contextlib.suppress(OSError):
                digest = name.removesuffix(".native").rpartition("-")[2]
                if _digest((folder / name).read_bytes()) == digest:
                    yield folder / name


def drop_libraries(folder: Path) -> None:
    """Remove all libraries in ``folder``, for another to take their place."""
    for path in folder.glob("kernels-*.native"):
        path.unlink(missing_ok=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _succeeds(command: tuple[str, ...], text: bytes = b"") -> bool:
    try:
        with tempfile.TemporaryDirectory(prefix="tpirt-") as temporary:
            return _run(command, _PROBE_S, temporary, text).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def _run(
    command: list[str] | tuple[str, ...], timeout_s: float, temporary: str, text: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    # zig keeps what it compiles, some 10 MB: in a home directory nobody would ever remove it.
    caches = dict.fromkeys(("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"), temporary)
    environment = {**caches, **os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command, input=text, capture_output=True, timeout=timeout_s, env=environment
    )


def _first_error(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode(errors="replace").splitlines()
    errors = [line.strip() for line in lines if "error" in line.lower()]
    return (errors or lines or [f"exit code {done.returncode}"])[0]
