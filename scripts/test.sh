#!/usr/bin/env bash
# Usage: test.sh [PYTEST_ARGUMENT...]
#
# Installs what the tests need into .venv, then runs every check and every test of the project; the
# tests marked nightly are for nightly.sh. Arguments go to pytest: test.sh tests/unit -k config
# Tests run in three processes side by side; -n 0 runs them in one, as --pdb needs.
set -euo pipefail
# shellcheck source=scripts/_env.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/_env.sh"

case ${1-} in
  -h | --help)
    usage
    exit
    ;;
esac

stage() { # NAME COMMAND...
  local name=$1 start=$SECONDS verdict=ok
  shift
  printf -- '--- %s\n' "$name"
  "$@" || { verdict=FAILED; printf ' %s;' "$name" >>"$reports/failed"; }
  printf -- '--- %s: %s (%d s)\n' "$name" "$verdict" $((SECONDS - start))
}

checks() {
  stage "ruff check" "$bin/ruff" check .
  stage "ruff format" "$bin/ruff" format --check .
  stage "mypy" "$bin/mypy"
  stage "import-linter" "$bin/lint-imports"
  stage "generated code" env PYTHON="$bin/python" scripts/gen_protos.sh --check
}

start=$SECONDS
# Modules are compiled as they are imported, for the next process that imports them.
unset PYTHONDONTWRITEBYTECODE
need_tpirt dev
printf -- '--- environment: ok (%d s)\n' $((SECONDS - start))
cd "$tpirt_root"
bin=$tpirt_venv/bin
reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
: >"$reports/failed"

checks &>"$reports/checks" &
checks=$!
# pytest's summary is kept back: it is to be the last line when all is well.
printf -- '--- pytest\n'
"$bin/python" -m pytest -n 3 --dist loadfile --no-loadscope-reorder -rfEs --durations=25 "$@" |
  sed -u -e "\$w $reports/summary" -e '$d' || printf ' pytest;' >>"$reports/failed"
wait "$checks"
cat "$reports/checks" "$reports/summary"

if [[ -s $reports/failed ]]; then
  printf 'failed:%s\n' "$(<"$reports/failed")"
  exit 1
fi
