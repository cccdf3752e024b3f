"""The build backend: wheels with a library for their platform, or with none."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tpirt.ops.native import packaging
from tpirt.ops.native.compiling import SOURCES, source_key
from tpirt.ops.native.library import load
from tpirt.ops.native.packaging import local_platform

ROOT = Path(__file__).parents[2]
NATIVE = "tpirt/ops/native"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is packaged, without the bundled model."""
    root = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("demo", "*.native", "__pycache__")
    shutil.copytree(ROOT / "tpirt", root / "tpirt", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    return root


def build(checkout: Path, kind: str, *, compiler: bool = True, settings: str = "None") -> Path:
    """Run a hook of the backend. The compiler is a pretended one; without it there is none."""
    tools = checkout.parent / "tools"
    shutil.rmtree(tools, ignore_errors=True)
    tools.mkdir()
    library = load().path
    if compiler and library is not None:
        # `for output` leaves the last argument in the variable.
        script = 'case "$*" in *-fsyntax-only*) exit 0 ;; esac; for output; do :; done'
        (tools / "cc").write_text(f"#!/bin/sh\n{script}; /bin/cp '{library}' \"$output\"\n")
        (tools / "cc").chmod(0o755)
    out = checkout.parent / kind
    code = (
        "import sys; sys.modules['ziglang'] = None; from tpirt.ops.native import packaging\n"
        f"print('built', packaging.build_{kind}({str(out)!r}, {settings}))"
    )
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout,
        env={**os.environ, "PATH": str(tools), "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.rpartition("built ")[2].strip()


def libraries(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if name.endswith(".native")]


@pytest.fixture
def needs_library() -> None:
    if load().path is None:
        pytest.skip("needs native kernels")


@pytest.mark.usefixtures("needs_library")
def test_a_wheel_has_the_library_of_its_platform_and_no_older_one(checkout: Path) -> None:
    for folder in (checkout / NATIVE, checkout / "build/lib" / NATIVE):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernels-0-0.native").touch()
    wheel = build(checkout, "wheel")
    assert wheel.name.endswith(f"-py3-none-{local_platform()}.whl")
    (name,) = libraries(wheel)
    assert name.startswith(f"{NATIVE}/kernels-{source_key()}-")
    portable = build(checkout, "wheel", settings="{'platform': 'any'}")
    assert portable.name.endswith("-py3-none-any.whl")
    assert not libraries(portable)


def test_without_a_compiler_a_wheel_has_the_sources_only(checkout: Path) -> None:
    wheel = build(checkout, "wheel", compiler=False)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        packaged = {Path(name).name for name in archive.namelist() if name.startswith(NATIVE)}
    assert {path.name for path in SOURCES.glob("*.[chi]*")} <= packaged
    assert not libraries(wheel)


@pytest.mark.usefixtures("needs_library")
def test_an_editable_installation_has_its_library_beside_the_sources(checkout: Path) -> None:
    build(checkout, "editable")
    (path,) = (checkout / NATIVE).glob("*.native")
    build(checkout, "editable", compiler=False)  # is content with what is there
    with tarfile.open(build(checkout, "sdist")) as archive:
        names = archive.getnames()
    assert path.exists()
    assert not any(name.endswith(".native") for name in names)
    assert any(name.endswith("native.c") for name in names)


@pytest.mark.usefixtures("needs_library")
def test_a_library_for_another_machine_is_replaced(checkout: Path) -> None:
    other = b"for another machine"
    digest = hashlib.sha256(other).hexdigest()[:16]
    path = checkout / NATIVE / f"kernels-{source_key()}-{digest}.native"
    path.write_bytes(other)
    build(checkout, "editable")
    (replaced,) = (checkout / NATIVE).glob("*.native")
    assert replaced != path


@pytest.mark.parametrize(
    ("compiler", "available", "required"),
    [(True, True, []), (False, True, ["ziglang"]), (False, False, [])],
)
def test_a_compiler_is_required_only_if_there_is_none_and_pip_finds_one(
    monkeypatch: pytest.MonkeyPatch, compiler: bool, available: bool, required: list[str]
) -> None:
    monkeypatch.setattr(packaging, "compilers", lambda: iter(["cc"] if compiler else []))
    monkeypatch.setattr(packaging, "_pip_finds", lambda package: available)
    assert packaging.get_requires_for_build_wheel() == required
    assert packaging.get_requires_for_build_editable() == required


def test_wheels_for_other_machines_require_a_compiler_for_them() -> None:
    for platform in packaging.TARGETS:
        assert packaging.get_requires_for_build_wheel({"platform": platform}) == ["ziglang"]
    assert packaging.get_requires_for_build_wheel({"platform": "any"}) == []
    with pytest.raises(ValueError, match="platform 'amiga': expected one of manylinux2014_x86_64"):
        packaging.get_requires_for_build_wheel({"platform": "amiga"})


def test_platforms_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaging, "machine", lambda: "arm64")
    assert local_platform("linux-x86_64") == "linux_x86_64"
    assert local_platform("macosx-14.0-arm64") == "macosx_11_0_arm64"
    assert local_platform("macosx-10.9-universal2") == "macosx_11_0_arm64"
