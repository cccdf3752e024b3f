#!/usr/bin/env bash
# Usage: launch_peer.sh [HOST[:PORT]] [PEER_OPTION...]
#
# Makes this device a peer: it waits at HOST:PORT for a master that gives it its part of a model.
# The first start makes .venv and installs what is needed. Ctrl-C ends it.
#
# Once, it has to join the master's cluster: run "tpirt cluster invite" there, and give here the --join
# option that it shows.
#
#   HOST:PORT   where to listen (default: port 50051 of all addresses of this device; 127.0.0.1 for this
#               device only, which needs no certificate). PORT + 1000 is used as well.
#   ...         everything after it goes to "tpirt peer": --join HOST:PORT/CODE, --memory SIZE,
#               --threads N, --store DIR
set -euo pipefail
# shellcheck source=scripts/_env.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/_env.sh"

case ${1-} in
  -h | --help)
    usage
    exit
    ;;
  --listen | --listen=*) refuse "$1: give HOST:PORT as the first argument instead" ;;
  '') set -- "${@:2}" ;;
  -*) ;;
  *)
    [[ ! $1 =~ ^[0-9]*$ ]] || refuse "expected HOST[:PORT], got '$1'"
    set -- --listen "$@"
    ;;
esac

need_tpirt run
exec "$tpirt_venv/bin/tpirt" peer "$@"
