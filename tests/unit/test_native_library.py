"""Native kernels: found, compiled, checked, or done without.

A pretended compiler hands out the library that these tests run with; two tests compile for real.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.nightly import nightly
from tpirt.errors import ConfigError
from tpirt.locks import lock, try_lock
from tpirt.ops.native import compiling, library
from tpirt.ops.native.compiling import (
    SOURCES,
    CompileError,
    compile_library,
    compilers,
    keep_library,
    kept_libraries,
    source_key,
)
from tpirt.ops.native.library import NativeLibrary, find_library, load
from tpirt.testing.processes import (
    DEADLINE_S,
    killed_at_exit,
    run_cli,
    run_python,
    start_python,
    wait_for,
)
from tpirt.types import Progress

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def content() -> bytes:
    """A library of the present sources."""
    path = load().path
    if path is None:
        pytest.skip("needs native kernels")
    return path.read_bytes()


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """A folder that does not exist and cannot be made."""
    (tmp_path / "a file").touch()
    return tmp_path / "a file" / "folder"


class Tools:
    """The only commands on the path."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()

    def add(self, name: str, script: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def add_compiler(self, content: bytes, meanwhile: str = "") -> None:
        """A compiler that records how often it links, and does something ``meanwhile``."""
        (self.folder / "library").write_bytes(content)
        self.add(
            "cc",
            f"""for output; do :; done
            case "$*" in
            *-fsyntax-only*) exit 0 ;;
            *" -c "*) : > "$output"; exit 0 ;;
            esac
            echo run >> '{self.folder}/runs'
            {meanwhile}
            /bin/cp '{self.folder}/library' "$output" """,
        )

    @property
    def runs(self) -> int:
        """How often the compiler compiled."""
        file = self.folder / "runs"
        return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    tools = Tools(tmp_path / "tools")
    monkeypatch.setenv("PATH", str(tools.folder))
    monkeypatch.setitem(sys.modules, "ziglang", None)
    return tools


# -- where it comes from -----------------------------------------------------------------------


def test_the_one_of_pip_is_used_before_that_of_the_cache(
    tmp_path: Path, tools: Tools, content: bytes
) -> None:
    beside, cache = tmp_path / "beside", tmp_path / "cache"
    keep_library(cache, content)
    assert find_library("", [cache], beside).path == next(kept_libraries(cache))
    keep_library(beside, content)
    found = find_library("", [cache], beside)
    assert found.path == next(kept_libraries(beside))
    assert found.summary == f"kernels: {found.set_name}, compiled by pip"


def test_is_compiled_once_into_the_cache(
    tmp_path: Path, tools: Tools, content: bytes, nowhere: Path
) -> None:
    tools.add_compiler(content)
    caches = [nowhere, tmp_path / "cache"]  # the first is read-only
    told: list[Progress] = []
    first = find_library("", caches, tmp_path, progress=told.append)
    assert [(each.stage, each.total) for each in told] == [("compiling kernels", n) for n in (0, 1)]
    assert first.path is not None
    assert first.path.parent == caches[1]
    assert first.summary == f"kernels: {first.set_name}, compiled at the first start"
    assert find_library("", caches, tmp_path) == first
    assert tools.runs == 1


def test_processes_that_start_at_once_compile_once(
    tmp_path: Path, tools: Tools, content: bytes
) -> None:
    go, log, cache = (tmp_path / name for name in ("go", "log", "cache"))
    os.mkfifo(go)
    tools.add_compiler(content, meanwhile=f"read line < '{go}'")  # compiles until told to end
    code = (
        f"import logging; logging.basicConfig(filename={str(log)!r}, level=logging.INFO)\n"
        "import sys; sys.modules['ziglang'] = None\n"
        "from pathlib import Path; from tpirt.ops.native import compiling, library\n"
        "compiling._PATIENCE_S = 0\n"
        f"cache = Path({str(cache)!r}); print(library.find_library('', [cache], cache.parent).path)"
    )

    def start() -> subprocess.Popen[str]:
        return start_python("-c", code, stdout=subprocess.PIPE, text=True)

    with killed_at_exit(start()) as one, killed_at_exit(start()) as two:
        wait_for(lambda: tools.runs == 1 and "waiting for another process" in log.read_text())
        with open(go, "w") as file:
            file.write("go\n")
        found = {process.communicate(timeout=DEADLINE_S)[0].strip() for process in (one, two)}
    assert found == {str(path) for path in kept_libraries(cache)}
    assert tools.runs == 1


@pytest.mark.parametrize(
    "damage", ["half-written", "cut short", "of another program", "of other sources", "a pipe"]
)
def test_what_is_no_library_of_ours_is_made_again(
    tmp_path: Path, tools: Tools, content: bytes, damage: str
) -> None:
    path = keep_library(tmp_path, content)
    if damage == "half-written":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "cut short":  # under a name that fits: to load it would end the process
        path.unlink()
        keep_library(tmp_path, content[: len(content) // 2])
    elif damage == "a pipe":
        path.unlink()
        os.mkfifo(path.with_stem(f"kernels-{source_key()}-0123456789abcdef"))
    elif damage == "of another program":  # under a name that fits
        path.unlink()
        keep_library(tmp_path, b"\x7fELF, so they say")
    else:
        path.unlink()
        keep_library(tmp_path, content.replace(source_key().encode(), b"0123456789abcdef"))
    tools.add_compiler(content)
    found = find_library("", [tmp_path], tmp_path / "beside")
    assert found.path is not None
    assert found.path.read_bytes() == content
    assert tools.runs == 1


def test_a_compiler_whose_product_does_not_load(tmp_path: Path, tools: Tools) -> None:
    tools.add_compiler(b"nonsense")
    found = find_library("", [tmp_path / "cache"], tmp_path)
    assert found.path is None
    assert "cannot be loaded" in found.summary
    assert not list(kept_libraries(tmp_path / "cache"))  # each start would leave another one


def test_a_compiler_that_writes_half_a_library(
    tmp_path: Path, tools: Tools, content: bytes
) -> None:
    tools.add_compiler(content[: len(content) // 2])
    found = find_library("", [tmp_path / "cache"], tmp_path)
    assert "cc: no whole library was written" in found.note


@pytest.mark.parametrize("kind", ["writable by all", "of another user"])
def test_a_folder_of_others_is_not_used(
    tmp_path: Path, tools: Tools, content: bytes, kind: str
) -> None:
    others, own = tmp_path / "others", tmp_path / "own"
    keep_library(others, content)
    if kind == "writable by all":
        others.chmod(0o777)
    elif os.getuid() == 0:
        os.chown(others, 12345, -1)
    else:
        pytest.skip("needs root")
    tools.add_compiler(content)
    assert find_library("", [others, own], tmp_path).path == next(kept_libraries(own))
    assert "other users can write to it" in find_library("", [others], tmp_path).note


def test_float32_products_are_not_of_the_library() -> None:
    found = NativeLibrary(Path("x"), 2, "avx2", "compiled by pip")
    assert found.summary_of("bfloat16") == "kernels: avx2, compiled by pip"
    assert found.summary_of("float32").endswith("pip; products in float32 are torch's")
    assert NativeLibrary(note="none").summary_of("float32") == "kernels: torch's; none"


def test_a_changed_source_has_another_key(tmp_path: Path) -> None:
    same, other = (shutil.copytree(SOURCES, tmp_path / name) for name in ("same", "other"))
    with open(other / "set_scalar.c", "a") as file:
        file.write("\n")
    assert source_key(same) == source_key()
    assert source_key(other) != source_key()


# -- waiting, and an end of it -----------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tpirt")
    monkeypatch.setattr(compiling, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(compiling, "_PROBE_S", 0.2)
    monkeypatch.setattr(library, "COMPILE_S", 0.2)


@pytest.mark.usefixtures("impatient")
def test_a_process_that_compiles_for_too_long_is_not_waited_for(
    tmp_path: Path, tools: Tools, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    tools.add_compiler(content)
    held, free = tmp_path / "held", tmp_path / "free"
    held.mkdir()
    (held / "lock").touch()
    holder = lock(held / "lock")
    assert holder is not None
    found = find_library("", [held, free], tmp_path)
    holder.release()
    assert found.path == next(kept_libraries(free))
    waits = f"waiting for another process, which compiles kernels into {held}"
    assert caplog.messages.count(waits) == 1
    assert f"{held}: another process holds its lock" in caplog.text


@pytest.mark.usefixtures("impatient")
def test_a_compiler_that_hangs_is_named_and_the_next_one_is_tried(
    tmp_path: Path, tools: Tools, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    tools.add_compiler(content)
    (tools.folder / "cc").rename(tools.folder / "gcc")
    os.mkfifo(tmp_path / "never")
    tools.add("cc", f"read line < '{tmp_path / 'never'}'")
    assert find_library("", [tmp_path / "cache"], tmp_path).path is not None
    cc = tools.folder / "cc"
    assert caplog.messages[:2] == [
        f"waiting for {cc}, for up to 0.2 s",
        f"{cc} is not used: no answer within 0.2 s",
    ]


@pytest.mark.parametrize(
    ("command", "number", "group", "code", "said"),
    [
        (("peer", "--listen", "127.0.0.1:0"), signal.SIGINT, True, 0, ""),
        nightly(("peer", "--listen", "127.0.0.1:0"), signal.SIGTERM, False, 0, ""),
        (("generate", "--prompt", "hi"), signal.SIGINT, True, 130, "tpirt: interrupted\n"),
        nightly(("generate", "--prompt", "hi"), signal.SIGINT, False, 130, "tpirt: interrupted\n"),
        nightly(("generate", "--prompt", "hi"), signal.SIGTERM, False, -signal.SIGTERM, ""),
        (("info",), signal.SIGKILL, True, -signal.SIGKILL, ""),
    ],
)
def test_one_signal_ends_a_command_that_compiles(
    tmp_path: Path,
    tools: Tools,
    command: tuple[str, ...],
    number: signal.Signals,
    group: bool,
    code: int,
    said: str,
) -> None:
    """With the compiler and its children; nothing stays, and the lock is free."""
    pids, never, cache = tmp_path / "pids", tmp_path / "never", tmp_path / "cache"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    os.mkfifo(never)
    hang = f"read line < '{never}' & echo $$ $! > '{pids}'; wait"
    tools.add("cc", f'case "$*" in *-fsyntax-only*) exit 0 ;; esac; {hang}')
    start = (
        "import functools, sys; from pathlib import Path; from tpirt.__main__ import main\n"
        "from tpirt.ops.native import library; sys.modules['ziglang'] = None\n"
        f"nowhere = Path({str(tmp_path / 'nowhere')!r})\n"
        "library.find_library = functools.partial(library.find_library, beside=nowhere)\n"
        f"sys.argv = ['tpirt', *{command!r}]; sys.exit(main())"
    )
    process = start_python(
        *("-c", start),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "TMPDIR": str(temporary)},
    )
    with killed_at_exit(process):
        wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        (os.killpg if group else os.kill)(process.pid, number)
        err = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == code
    before, _, after = err.partition("compiling kernels for this machine with cc, once; slow ")
    assert before in ("", "tpirt: ", "tpirt peer: "), err
    assert after == f"machines take about a minute\n{said}"
    wait_for(lambda: not any(psutil.pid_exists(int(pid)) for pid in pids.read_text().split()))
    wait_for(lambda: not any(temporary.glob("tpirt-*/errors")))
    held = try_lock(cache / "tpirt" / "native" / "lock")
    assert held is not None
    held.release()


# -- without a compiler ------------------------------------------------------------------------


def test_without_a_compiler_it_says_what_is_lost(tmp_path: Path, tools: Tools) -> None:
    found = find_library("", [tmp_path], tmp_path)
    assert found.path is None
    assert found.summary.startswith("kernels: torch's; int8 and int4 weights take")
    assert "no C compiler was found" in found.summary
    assert "pip install ziglang" in found.summary
    assert "\n" not in found.summary


def test_a_compiler_without_headers_is_none(tmp_path: Path, tools: Tools) -> None:
    tools.add("cc", "echo 'fatal error: math.h: No such file or directory' >&2; exit 1")
    assert "no C compiler was found" in find_library("", [tmp_path], tmp_path).note


def test_after_a_compiler_that_fails_another_one_is_tried(
    tmp_path: Path, tools: Tools, content: bytes
) -> None:
    fails = 'case "$*" in *-fsyntax-only*) exit 0 ;; esac; echo "%s: error: too old" >&2; exit 1'
    tools.add_compiler(content)
    (tools.folder / "cc").rename(tools.folder / "clang")
    tools.add("cc", fails % "x.c")
    assert find_library("", [tmp_path / "cache"], tmp_path).path is not None
    tools.add("clang", fails % "y.c")
    note = find_library("", [tmp_path / "other"], tmp_path).note
    assert "cc: x.c: error: too old; clang: y.c: error: too old (" in note


def test_without_a_folder_for_it(
    tmp_path: Path, tools: Tools, content: bytes, nowhere: Path
) -> None:
    tools.add_compiler(content)
    assert f"{nowhere}: Not a directory" in find_library("", [nowhere], tmp_path).note
    assert "no folder" in find_library("", [], tmp_path).note


def test_the_cache_may_be_read_only(monkeypatch: pytest.MonkeyPatch, nowhere: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere))
    first, second = library.cache_folders()
    assert first == nowhere / "tpirt" / "native"
    assert second.parent.is_dir()


def test_the_command_says_what_it_uses(tmp_path: Path) -> None:
    used = load().summary
    assert f"\n{used}\n" in run_cli("info").stdout
    off = run_python(
        *("-m", "tpirt", "generate", "--prompt", "hi", "--max-tokens", "1", "--explain"),
        env={**os.environ, "TPIRT_NATIVE": "off", "XDG_CACHE_HOME": str(tmp_path)},
        text=True,
    )
    assert off.returncode == 0
    assert "\nkernels: torch's; TPIRT_NATIVE=off\n" in off.stderr


# -- which set of instructions -----------------------------------------------------------------


def sets(path: Path) -> list[str]:
    opened = ctypes.CDLL(str(path))
    opened.tp_set_name.restype = ctypes.c_char_p
    runs = filter(opened.tp_set_runs, range(opened.tp_sets()))
    return [opened.tp_set_name(index).decode() for index in runs]


def test_every_set_passes_its_check_and_can_be_asked_for(tmp_path: Path, content: bytes) -> None:
    path = keep_library(tmp_path, content)
    names = sets(path)
    assert names[0] == "scalar"
    for name in names:
        found = find_library(name, [], tmp_path)
        assert (found.set_name, found.note) == (name, "")
    assert find_library("", [], tmp_path).set_name == names[-1]


def test_off_and_unknown_names(tmp_path: Path, tools: Tools, content: bytes) -> None:
    assert find_library("off", [], tmp_path) == NativeLibrary(note="TPIRT_NATIVE=off")
    with pytest.raises(ConfigError, match="TPIRT_NATIVE=sse9: no C compiler was found"):
        find_library("sse9", [tmp_path], tmp_path)
    keep_library(tmp_path, content)
    with pytest.raises(ConfigError, match=r"expected one of off, .*scalar, got 'sse9'"):
        find_library("sse9", [], tmp_path)


BREAKABLE = r"""
#include "native.h"

const kernel_set *real_set(int set);
int functions = sizeof(kernel_set) / sizeof(char *) - 1, broken_set = -1, broken_function;

static void nothing(void) {}

/* A set of which one function does nothing. */
const kernel_set *native_set(int set)
{
    static kernel_set broken;
    if (set != broken_set) return real_set(set);
    broken = *real_set(set);
    ((void (**)(void)) & broken)[1 + broken_function] = nothing;
    return &broken;
}
"""


class Breakable:
    """A library of which one function of a set can be broken."""

    def __init__(self, path: Path):
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.tp_check.restype = ctypes.c_char_p
        self.functions = range(self.variable("functions").value)
        self.best = max(filter(self.library.tp_set_runs, range(self.library.tp_sets())))

    def variable(self, name: str) -> ctypes.c_int:
        return ctypes.c_int.in_dll(self.library, name)

    def break_function(self, index: int, function: int) -> None:
        self.variable("broken_set").value = index
        self.variable("broken_function").value = function


@pytest.fixture(scope="module")
def compiled_breakable(tmp_path_factory: pytest.TempPathFactory) -> Breakable:
    compiler = next(compilers(), None)
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("breakable")
    (folder / "breakable.c").write_text(BREAKABLE)
    options = ["-O0", "-shared", "-fPIC", "-pthread", "-Wno-all", f"-I{SOURCES}"]
    options += ["-o", "kernels.so", f'-DTP_BUILD="{source_key()}"']
    renamed = [*compiler.command, "-c", *options[:-3], "-Dnative_set=real_set"]
    subprocess.run([*renamed, SOURCES / "native.c", "-o", "native.o"], cwd=folder, check=True)
    rest = [path for path in SOURCES.glob("*.c") if path.name != "native.c"]
    command = [*compiler.command, *options, "native.o", "breakable.c", *rest, "-lm"]
    subprocess.run(command, cwd=folder, check=True)
    path = keep_library(folder / "kept", (folder / "kernels.so").read_bytes())
    return Breakable(path)


@pytest.fixture
def breakable(compiled_breakable: Breakable) -> Iterator[Breakable]:
    if compiled_breakable.best == 0:
        pytest.skip("this CPU runs plain C only")
    yield compiled_breakable
    compiled_breakable.break_function(-1, 0)


def test_the_check_names_every_function_that_is_broken(breakable: Breakable) -> None:
    assert breakable.library.tp_check(breakable.best) is None
    named = []
    for function in breakable.functions:
        breakable.break_function(breakable.best, function)
        named.append(breakable.library.tp_check(breakable.best))
    assert None not in named
    assert len(set(named)) == len(breakable.functions)


def test_a_set_that_fails_its_check_gives_way_by_name(breakable: Breakable) -> None:
    *_, second, best = sets(breakable.path)
    breakable.break_function(breakable.best, 1)
    found = find_library("", [], breakable.path.parent)
    assert found.set_name == second
    assert found.note == f"{best} is not used, because its q4 computes wrongly here"
    assert found.note in found.summary
    with pytest.raises(ConfigError, match=f"TPIRT_NATIVE: {best} is not used"):
        find_library(best, [], breakable.path.parent)


@pytest.mark.nightly  # pip does it where the tests are set up
def test_compiles_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = next(compilers(), None)
    if compiler is None:
        pytest.skip("needs a C compiler")
    monkeypatch.setattr(compiling, "_FLAGS", ("-O0", *compiling._FLAGS[1:]))
    path = keep_library(tmp_path / "kept", compile_library(compiler))
    assert find_library("", [], path.parent).path == path


def test_the_first_error_is_named(tmp_path: Path) -> None:
    compiler = next(compilers(), None)
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "native.c").write_text("int x = ;\n")
    (tmp_path / "good.c").write_text("int y;\n")
    with pytest.raises(CompileError, match=r"native\.c:1:.*error"):
        compile_library(compiler, tmp_path)


def test_what_is_lost_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TPIRT_NATIVE", raising=False)
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(library, "find_library", lambda *_, **__: NativeLibrary(note="slow"))
    library.load()
    library.load()
    assert caplog.messages == ["kernels: torch's; slow"]
