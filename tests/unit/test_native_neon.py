"""The kernels of aarch64: compiled here, run by qemu, compared with plain C bit for bit."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "tpirt/ops/native"
SOURCES = [*NATIVE.glob("*.c"), ROOT / "tests/support/check_sets.c"]
ZIG = [sys.executable, "-m", "ziglang", "cc"] if importlib.util.find_spec("ziglang") else None
GCC = shutil.which("aarch64-linux-gnu-gcc")
QEMU = shutil.which("qemu-aarch64")


def compilers() -> dict[str, list[str]]:
    found = {}
    if GCC:
        found["gcc"] = [GCC]
    if ZIG:
        found["zig"] = [*ZIG, "-target", "aarch64-linux-musl"]
    return found


def compile_to(path: Path, compiler: list[str], *options: str) -> None:
    flags = ["-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{NATIVE}"]
    subprocess.run([*compiler, *flags, *SOURCES, *options, "-lm", "-o", path], check=True)


@pytest.fixture(scope="module", params=["gcc", "zig"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not QEMU or request.param not in compilers():
        pytest.skip(f"needs qemu-aarch64 (qemu-user) and {request.param} for aarch64")
    path = tmp_path_factory.mktemp("neon") / "check_sets"
    compile_to(path, compilers()[request.param], "-static")
    return path


@pytest.mark.parametrize(
    ("cpu", "sets"),
    [
        ("cortex-a72", ["neon"]),
        ("cortex-a76", ["neon", "neon-dotprod"]),
        ("max", ["neon", "neon-dotprod", "neon-i8mm"]),
    ],
)
def test_sets_equal_plain_c_bit_for_bit(program: Path, cpu: str, sets: list[str]) -> None:
    run = subprocess.run([QEMU, "-cpu", cpu, program], capture_output=True, text=True, check=False)
    assert run.stdout.split() == sets, run.stdout + run.stderr
    assert run.returncode == 0


@pytest.mark.skipif(not ZIG, reason="needs ziglang")
def test_compiles_for_macos(tmp_path: Path) -> None:
    compile_to(tmp_path / "check_sets", [*(ZIG or []), "-target", "aarch64-macos"])
