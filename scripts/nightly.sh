#!/usr/bin/env bash
# Usage: nightly.sh [PYTEST_ARGUMENT...]
#
# test.sh at length: the tests marked nightly too, more of hypothesis' examples, async tests on both
# event loops, and every process started as a user starts it. Arguments go to pytest.
set -euo pipefail
# shellcheck source=scripts/_env.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/_env.sh"

case ${1-} in
  -h | --help)
    usage
    exit
    ;;
esac

export TPIRT_COLD_STARTS=1
exec "$tpirt_root/scripts/test.sh" --nightly --loop both "$@"
