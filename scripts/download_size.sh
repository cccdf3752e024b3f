#!/usr/bin/env bash
# Usage: download_size.sh [run|dev]
#
# Prints what the first start of a script would download here, by pip's own report; nothing is
# installed. run: what the launch scripts need (default); dev: what the tests need.
set -euo pipefail
# shellcheck source=scripts/_env.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/_env.sh"

case ${1-run} in
  -h | --help)
    usage
    exit
    ;;
  run | dev) ;;
  *) refuse "expected run or dev, got '$1'" ;;
esac

tpirt_venv=$(mktemp -d)
trap 'rm -rf "$tpirt_venv"' EXIT
_make_venv
_choose_packages "${1-run}"
"$tpirt_venv/bin/python" -m pip install --quiet --dry-run --ignore-installed \
  --report "$tpirt_venv/report" "${packages[@]}" >&2
"$tpirt_venv/bin/python" - "$tpirt_venv/report" <<'PYTHON'
import json
import os
import sys
from urllib.request import Request, url2pathname, urlopen


def size(url: str) -> int:
    if url.startswith("file://"):
        return os.path.getsize(url2pathname(url.removeprefix("file://")))
    with urlopen(Request(url, method="HEAD")) as reply:
        return int(reply.headers["Content-Length"])


with open(sys.argv[1], encoding="utf-8") as file:
    items = json.load(file)["install"]
sizes = {
    f"{item['metadata']['name']} {item['metadata']['version']}": size(item["download_info"]["url"])
    for item in items
    if "dir_info" not in item["download_info"]  # this repository
}
for name, count in sorted(sizes.items(), key=lambda each: -each[1]):
    print(f"{count / 1e6:8.1f} MB  {name}")
cuda = sum(name.startswith(("nvidia-", "cuda-", "triton")) for name in sizes)
print(f"{sum(sizes.values()) / 1e6:8.1f} MB  {len(sizes)} packages, {cuda} of them CUDA libraries")
PYTHON
