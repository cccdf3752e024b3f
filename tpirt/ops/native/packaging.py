"""The build backend (PEP 517): setuptools, which first compiles the native kernels.

Without a compiler the build asks for ``ziglang``, a C compiler in a wheel, if pip can get it. If
nothing compiles, the package is built without a library, which is then made at the first start.

The config setting ``platform`` builds a wheel for another machine, as
``scripts/build_wheels.sh`` does: ``pip wheel . --config-settings platform=manylinux2014_aarch64``,
or ``any`` for one without a library.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from platform import machine
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from tpirt.ops.native.compiling import (
    SOURCES,
    CompileError,
    Compiler,
    compile_library,
    compilers,
    drop_libraries,
    keep_library,
    kept_libraries,
    provide_library,
    zig,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

PORTABLE = "any"
TARGETS = {  # zig's names for platforms of wheels
    "manylinux2014_x86_64": "x86_64-linux-gnu.2.17",
    "manylinux2014_aarch64": "aarch64-linux-gnu.2.17",
    "macosx_11_0_arm64": "aarch64-macos.11.0",
}
_ZIG = "ziglang"
# setuptools copies what an earlier build left here into the wheel.
_BUILT = Path("build", "lib", *__name__.split(".")[:-1])

Settings = Mapping[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return _requirements(_platform(config_settings))


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return _requirements(None)


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    platform, settings = _platform(config_settings), dict(config_settings or {})
    settings.pop("platform", None)
    if _put_library(platform):
        settings["--build-option"] = f"--plat-name={platform or local_platform()}"
    built: str = build_meta.build_wheel(wheel_directory, settings, metadata_directory)
    return built


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    provide_library()
    built: str = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    return built


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    libraries = [path.read_bytes() for path in kept_libraries(SOURCES)]
    drop_libraries(SOURCES)
    try:
        built: str = build_meta.build_sdist(sdist_directory, config_settings)
        return built
    finally:
        for content in libraries:
            keep_library(SOURCES, content)


def local_platform(system: str = sysconfig.get_platform()) -> str:
    """The platform of a wheel whose library was compiled for this machine."""
    name, _, rest = system.partition("-")
    if name == "macosx":  # Python itself may be for an older system, and for two kinds of CPU
        cpu = rest.rpartition("-")[2]
        return f"macosx_11_0_{machine() if cpu == 'universal2' else cpu}"
    return system.replace("-", "_").replace(".", "_")


def _platform(config_settings: Settings) -> str | None:
    """The platform that is asked for; None for this machine's."""
    platform = (config_settings or {}).get("platform")
    known = [*TARGETS, PORTABLE]
    if platform is not None and platform not in known:
        raise ValueError(f"platform {platform!r}: expected one of {', '.join(known)}")
    return platform


def _requirements(platform: str | None) -> list[str]:
    if platform in TARGETS:
        return [_ZIG]
    if platform == PORTABLE or any(compilers()):
        return []
    return [_ZIG] if _pip_finds(_ZIG) else []


def _pip_finds(package: str) -> bool:
    """Whether pip can get a wheel for this machine. If not, asking for it would end the build."""
    pip = [sys.executable, "-I", "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet"]
    options = ["--ignore-installed", "--only-binary=:all:", "--retries=0", "--timeout=5"]
    done = subprocess.run([*pip, *options, package], capture_output=True, check=False)
    return done.returncode == 0


def _put_library(platform: str | None) -> bool:
    """Compile the library beside its sources; returns whether there is one now."""
    drop_libraries(SOURCES)
    drop_libraries(_BUILT)
    if platform == PORTABLE:
        return False
    found = [zig("-target", TARGETS[platform])] if platform else list(compilers())
    return any(_compiles(compiler, required=platform is not None) for compiler in found)


def _compiles(compiler: Compiler, *, required: bool) -> bool:
    try:
        keep_library(SOURCES, compile_library(compiler))
    except (CompileError, OSError) as exc:
        if required:
            raise
        print(f"native kernels were not compiled: {exc}", file=sys.stderr)
        return False
    return True
