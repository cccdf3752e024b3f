"""Find the library of native kernels, or compile it at the first start.

:func:`load` is what the rest uses::

    native = load()
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
import functools
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpirt.cache_folder import cache_folder, temporary_folder
from tpirt.errors import ConfigError, StoreError
from tpirt.locks import lock
from tpirt.ops.native.compiling import (
    SOURCES,
    CompileError,
    Compiler,
    compile_library,
    compilers,
    keep_library,
    kept_libraries,
    source_key,
)

VARIABLE = "TPIRT_NATIVE"

_BY_PIP, _BY_START = "compiled by pip", "compiled at the first start"
_ADVICE = (
    f"{'xcode-select --install' if sys.platform == 'darwin' else 'apt install gcc'}, "
    "or pip install ziglang"
)
_LOOK_S = 0.05  # between two looks at a lock

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


@functools.cache
def load() -> NativeLibrary:
    """Find the library; the first call may compile it, which takes seconds.

    It logs that, and what is lost without a library.

    Raises:
        ConfigError: ``TPIRT_NATIVE`` asks for what this machine does not have.
    """
    wish = os.environ.get(VARIABLE, "")
    found = find_library(wish, cache_folders())
    if found.note and wish != "off":
        _log.warning("%s", found.summary)
    return found


def cache_folders() -> list[Path]:
    """Where libraries are kept between runs: in the first of these that can be written to."""
    folders = []
    for find in (cache_folder, temporary_folder):
        with contextlib.suppress(StoreError):
            folders.append(find() / "native")
    return list(dict.fromkeys(folders))


def find_library(wish: str, caches: Sequence[Path], beside: Path = SOURCES) -> NativeLibrary:
    """Find a library and choose its best set of instructions.

    Args:
        wish: ``off``, the name of a set of instructions, or "" for the best.
        caches: folders for what is compiled here.
        beside: the folder of the library that pip compiled.

    Raises:
        ConfigError: ``wish`` cannot be fulfilled.
    """
    if wish == "off":
        return NativeLibrary(note=f"{VARIABLE}=off")
    places = [(beside, _BY_PIP), *((cache, _BY_START) for cache in caches)]
    for folder, origin in places:
        if (path := _usable_library(folder)) is not None:
            return _with_best_set(path, origin, wish)
    try:
        path = _compile(caches)
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


def _compile(caches: Sequence[Path]) -> Path:
    """Compile into the first folder that can be written to; another process may do it meanwhile.

    Raises:
        CompileError: it cannot be done; the message has the reason and what helps.
    """
    found = list(compilers())
    if not found:
        raise CompileError(f"no C compiler was found ({_ADVICE})")
    reasons = []
    for folder in caches:
        try:
            with _only_process(folder):
                if (path := _usable_library(folder)) is None:
                    path = keep_library(folder, _compiled(found))
        except OSError as exc:
            reasons.append(f"{folder}: {exc.strerror}")
        else:
            if _opens(path):
                return path
            reasons.append(f"{folder}: what was compiled there cannot be loaded")
    raise CompileError("; ".join(reasons) or "there is no folder to keep them in")


def _compiled(found: Sequence[Compiler]) -> bytes:
    reasons = []
    for compiler in found:
        _log.info("compiling kernels for this machine with %s, once", compiler.name)
        try:
            return compile_library(compiler)
        except CompileError as exc:
            reasons.append(str(exc))
    raise CompileError(f"{'; '.join(reasons)} ({_ADVICE})")


@contextlib.contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """Wait until no other process compiles into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    path.touch()
    while (held := lock(path)) is None:
        time.sleep(_LOOK_S)
    try:
        yield
    finally:
        held.release()
