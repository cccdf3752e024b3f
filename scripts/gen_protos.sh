#!/usr/bin/env bash
# Generates tpirt/protocol/pb/ from protos/. With --check, only tells whether it is current.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
target=tpirt/protocol/pb
out=$target
if [[ ${1:-} == --check ]]; then
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
fi
"$python" -m grpc_tools.protoc -I protos --python_out="$out" --pyi_out="$out" protos/tpirt.proto
if [[ $out != "$target" ]]; then
  for file in "$out"/*; do
    cmp "$file" "$target/$(basename "$file")" || {
      echo "generated code is not current: run scripts/gen_protos.sh" >&2
      exit 1
    }
  done
fi
