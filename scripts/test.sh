#!/usr/bin/env bash
# Usage: test.sh [PYTEST_ARGUMENT...]
#
# Installs what the tests need into .venv, then runs every check and every test of the project.
# Later checks run even if earlier ones fail. Arguments go to pytest: test.sh tests/unit -k config
set -euo pipefail
# shellcheck source=scripts/_env.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/_env.sh"

case ${1-} in
  -h | --help)
    usage
    exit
    ;;
esac

failed=()
stage() { # NAME COMMAND...
  local name=$1 start=$SECONDS verdict=ok
  shift
  printf -- '--- %s\n' "$name"
  "$@" || { verdict=FAILED; failed+=("$name"); }
  printf -- '--- %s: %s (%d s)\n' "$name" "$verdict" $((SECONDS - start))
}

start=$SECONDS
need_tpirt dev
printf -- '--- environment: ok (%d s)\n' $((SECONDS - start))
cd "$tpirt_root"
bin=$tpirt_venv/bin
stage "ruff check" "$bin/ruff" check .
stage "ruff format" "$bin/ruff" format --check .
stage "mypy" "$bin/mypy"
stage "import-linter" "$bin/lint-imports"
stage "generated code" env PYTHON="$bin/python" scripts/gen_protos.sh --check
# Not a stage: pytest's own summary is to be the last line when all is well.
printf -- '--- pytest\n'
"$bin/python" -m pytest -rs "$@" || failed+=("pytest")

if ((${#failed[@]})); then
  printf 'failed:'
  printf ' %s;' "${failed[@]}"
  printf '\n'
  exit 1
fi
