"""Find the library of native kernels, or compile it at the first start.

:func:`load` is what the rest uses::

    native = load()  # or await load_async()
    if native.path is not None:
        kernels = ctypes.CDLL(os.fspath(native.path))
        kernels.tp_product(native.index, ...)  # of the best set that passed its check
    print(native.summary)  # "kernels: avx2, compiled by pip"

It is looked for beside the C sources, where pip puts it, then in the user's cache; else it is
compiled into the cache. The environment variable ``TPIRT_NATIVE`` overrules the choice, for tests
and benchmarks: ``off``, or the name of a set of instructions.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import logging
import os
import stat
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpirt.cache_folder import cache_folder, temporary_folder
from tpirt.cancellation import in_thread
from tpirt.errors import ConfigError, StoreError
from tpirt.locks import Lock, lock
from tpirt.ops.native.compiling import (
    COMPILE_S,
    NEVER,
    SOURCES,
    CompileError,
    Compiler,
    compile_library,
    compilers,
    keep_library,
    kept_libraries,
    source_key,
    wait_until,
)
from tpirt.types import Progress, ProgressCallback, ignore_progress

VARIABLE = "TPIRT_NATIVE"

_BY_PIP, _BY_START = "compiled by pip", "compiled at the first start"
_ADVICE = (
    f"{'xcode-select --install' if sys.platform == 'darwin' else 'apt install gcc'}, "
    "or pip install ziglang"
)

_STAGE = "compiling kernels"
_NOTICE = "compiling kernels for this machine with %s, once; slow machines take about a minute"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NativeLibrary:
    """The kernels that this process uses.

    Attributes:
        path: the shared library; None if there is none, so torch's kernels are used.
        index: of the chosen set of instructions, the first argument of the library's functions.
        set_name: its name, such as ``avx2``.
        origin: how the library was found.
        note: which better sets failed their check; or why there is no library, and how to get it.
    """

    path: Path | None = None
    index: int = 0
    set_name: str = ""
    origin: str = ""
    note: str = ""

    @property
    def summary(self) -> str:
        """A line for the user."""
        used = f"{self.set_name}, {self.origin}" if self.path else "torch's"
        return f"kernels: {used}" + (f"; {self.note}" if self.note else "")

    def summary_of(self, dtype: str) -> str:
        """A line for the user of a run in ``dtype``."""
        exact = self.path is not None and dtype == "float32"
        return self.summary + ("; products in float32 are torch's" if exact else "")


_loaded: NativeLibrary | None = None


def load(
    stop: threading.Event = NEVER, progress: ProgressCallback = ignore_progress
) -> NativeLibrary:
    """Find the library; the first call may compile it, which takes up to a minute.

    It logs that, and what is lost without a library.

    Args:
        stop: ends the compiler when it is set.
        progress: told that a compiler runs.

    Raises:
        ConfigError: ``TPIRT_NATIVE`` asks for what this machine does not have.
        CancelledCompileError: ``stop`` was set meanwhile.
    """
    global _loaded
    if _loaded is None:
        wish = os.environ.get(VARIABLE, "")
        found = find_library(wish, cache_folders(), stop=stop, progress=progress)
        if found.note and wish != "off":
            _log.warning("%s", found.summary)
        _loaded = found
    return _loaded


async def load_async(progress: ProgressCallback = ignore_progress) -> NativeLibrary:
    """Like :func:`load`, in a thread. If cancelled, it first ends the compiler, at once."""
    stop = threading.Event()
    return await in_thread(load, stop, progress, on_cancel=stop.set)


def cache_folders() -> list[Path]:
    """Where libraries are kept between runs: in the first of these that can be written to."""
    folders = []
    for find in (cache_folder, temporary_folder):
        with contextlib.suppress(StoreError):
            folders.append(find() / "native")
    return list(dict.fromkeys(folders))


def find_library(
    wish: str,
    caches: Sequence[Path],
    beside: Path = SOURCES,
    *,
    stop: threading.Event = NEVER,
    progress: ProgressCallback = ignore_progress,
) -> NativeLibrary:
    """Find a library and choose its best set of instructions.

    Args:
        wish: ``off``, the name of a set of instructions, or "" for the best.
        caches: folders for what is compiled here.
        beside: the folder of the library that pip compiled.
        stop: ends a compiler when it is set.
        progress: told that one runs.

    Raises:
        ConfigError: ``wish`` cannot be fulfilled.
        CancelledCompileError: ``stop`` was set meanwhile.
    """
    if wish == "off":
        return NativeLibrary(note=f"{VARIABLE}=off")
    places = [(beside, _BY_PIP), *((cache, _BY_START) for cache in caches if _is_own(cache))]
    for folder, origin in places:
        if (path := _usable_library(folder)) is not None:
            return _with_best_set(path, origin, wish)
    try:
        path = _compile(caches, stop, progress)
    except CompileError as exc:
        if wish:
            raise ConfigError(f"{VARIABLE}={wish}: {exc}") from exc
        return NativeLibrary(note=f"int8 and int4 weights take some 50 times as long: {exc}")
    return _with_best_set(path, _BY_START, wish)


def _usable_library(folder: Path) -> Path | None:
    return next((path for path in kept_libraries(folder) if _opens(path)), None)


def _opens(path: Path) -> bool:
    """Whether this is our library, for this system."""
    try:
        build = ctypes.CDLL(os.fspath(path)).tp_build
    except (OSError, AttributeError):
        return False
    build.restype = ctypes.c_char_p
    return bool(build() == source_key().encode())


def _with_best_set(path: Path, origin: str, wish: str) -> NativeLibrary:
    library = ctypes.CDLL(os.fspath(path))
    library.tp_set_name.restype = library.tp_check.restype = ctypes.c_char_p
    names = {
        index: library.tp_set_name(index).decode()
        for index in reversed(range(library.tp_sets()))  # the best first
        if library.tp_set_runs(index)
    }
    failed: list[str] = []
    for index, name in names.items():
        if wish not in ("", name):
            continue
        differing = library.tp_check(index)
        if differing is None:
            return NativeLibrary(path, index, name, origin, "; ".join(failed))
        failed.append(f"{name} is not used, because its {differing.decode()} computes wrongly here")
    expected = ", ".join(("off", *names.values()))
    reason = f"expected one of {expected}, got {wish!r}"
    raise ConfigError(f"{VARIABLE}: {'; '.join(failed) or reason}")


def _compile(caches: Sequence[Path], stop: threading.Event, progress: ProgressCallback) -> Path:
    """Compile into the first folder that can be written to; another process may do it meanwhile.

    Raises:
        CompileError: it cannot be done; the message has the reason and what helps.
        CancelledCompileError: ``stop`` was set meanwhile.
    """
    found = compilers(stop)
    if (first := next(found, None)) is None:  # looked for without the lock: one may hang
        raise CompileError(f"no C compiler was found ({_ADVICE})")
    found = itertools.chain([first], found)
    content: bytes | None = None
    reasons = []
    for folder in caches:
        try:
            with _only_process(folder, stop):
                if (path := _usable_library(folder)) is None:
                    content = content or _compiled(found, stop, progress)
                    path = _kept(folder, content)
                return path
        except OSError as exc:
            reasons.append(f"{folder}: {exc.strerror}")
            _log.info("kernels are not kept in %s", reasons[-1])
    raise CompileError("; ".join(reasons) or "there is no folder to keep them in")


def _compiled(
    found: Iterable[Compiler], stop: threading.Event, progress: ProgressCallback
) -> bytes:
    reasons = []
    for compiler in found:
        _log.info(_NOTICE, compiler.name)
        progress(Progress(_STAGE, 0, 0, "seconds"))
        try:
            return compile_library(compiler, stop=stop)
        except CompileError as exc:
            reasons.append(str(exc))
        finally:
            progress(Progress(_STAGE, 1, 1, "seconds"))
    raise CompileError(f"{'; '.join(reasons)} ({_ADVICE})")


def _kept(folder: Path, content: bytes) -> Path:
    """Write a library that can be loaded.

    Raises:
        OSError: it cannot be written, or not be loaded: no code may run from some file systems.
    """
    path = keep_library(folder, content)
    if not _opens(path):
        path.unlink()  # else each start would leave another one
        raise OSError(errno.ENOEXEC, "what was compiled there cannot be loaded")
    return path


def _is_own(folder: Path) -> bool:
    """Whether what is in a folder is by this user or root: its code runs in this process."""
    try:
        found = folder.stat()
    except OSError:
        return False
    return not hasattr(os, "getuid") or (
        found.st_uid in (0, os.getuid()) and not found.st_mode & stat.S_IWOTH
    )


@contextlib.contextmanager
def _only_process(folder: Path, stop: threading.Event) -> Iterator[None]:
    """Wait until no other process compiles into the folder.

    Raises:
        OSError: the folder cannot be used, or the other process takes too long.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not _is_own(folder):
        raise PermissionError(errno.EPERM, "other users can write to it")
    path = folder / "lock"
    path.touch()
    held: list[Lock] = []

    def locks() -> bool:
        held.extend(filter(None, [lock(path)]))
        return bool(held)

    notice = f"waiting for another process, which compiles kernels into {folder}"
    if not wait_until(locks, COMPILE_S, stop, notice):
        raise TimeoutError(errno.ETIMEDOUT, f"another process holds its lock for {COMPILE_S:g} s")
    try:
        yield
    finally:
        held[0].release()
