#!/usr/bin/env bash
# Usage: build_wheels.sh [FOLDER]
#
# Builds the wheels of a release into FOLDER (default: dist), all of them on this machine: with
# native kernels for Linux on x86-64 and aarch64 (glibc 2.17 or newer) and for macOS 11 or newer on
# arm64, and one for any other machine, which compiles its kernels at the first start. The compiler
# is zig's, which pip downloads (about 100 MB, once).
set -euo pipefail
# shellcheck source=scripts/_env.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/_env.sh"

case ${1-} in
  -h | --help)
    usage
    exit
    ;;
  -*) refuse "$1: unknown option" ;;
esac
(($# <= 1)) || refuse "$2: expected one FOLDER only"
target=${1-dist}
mkdir -p "$target"
target=$(cd "$target" && pwd -P)
need_tpirt run

# A copy: a build leaves its library beside the sources, and those of this checkout are in use.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cd "$tpirt_root"
cp -R pyproject.toml README.md LICENSE tpirt "$copy"

python=$tpirt_venv/bin/python
for platform in manylinux2014_x86_64 manylinux2014_aarch64 macosx_11_0_arm64 any; do
  note "building for $platform"
  "$python" -m pip wheel --quiet --no-input --disable-pip-version-check --no-deps \
    --config-settings "platform=$platform" --wheel-dir "$copy/built" "$copy"
done

"$python" - "$copy/built" <<'EOF'
"""Check that every wheel has a library for its platform, and only one."""

import sys
import zipfile
from pathlib import Path

ELF, MACH_O = b"\x7fELF\x02\x01", b"\xcf\xfa\xed\xfe"  # of 64 bits, little-endian
HEADERS = {  # what a library begins with; and where it says for which machine
    "manylinux2014_x86_64": (ELF, 18, b"\x3e\x00"),
    "manylinux2014_aarch64": (ELF, 18, b"\xb7\x00"),
    "macosx_11_0_arm64": (MACH_O, 4, b"\x0c\x00\x00\x01"),
    "any": None,
}
wheels = {path.stem.partition("-none-")[2]: path for path in Path(sys.argv[1]).glob("*.whl")}
if wheels.keys() != HEADERS.keys():
    sys.exit(f"built for {', '.join(wheels)}; expected {', '.join(HEADERS)}")
for platform, path in wheels.items():
    with zipfile.ZipFile(path) as wheel:
        libraries = [wheel.read(name) for name in wheel.namelist() if name.endswith(".native")]
    wanted = [HEADERS[platform]] if HEADERS[platform] else []
    if len(libraries) != len(wanted):
        sys.exit(f"{path.name}: {len(libraries)} libraries, expected {len(wanted)}")
    for content, (magic, place, machine) in zip(libraries, wanted, strict=True):
        if not content.startswith(magic) or content[place : place + len(machine)] != machine:
            sys.exit(f"{path.name}: its library is for another platform")
EOF
mv "$copy"/built/*.whl "$target"
note "the wheels are in $target"
