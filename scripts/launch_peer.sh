#!/usr/bin/env bash
# Usage: launch_peer.sh [HOST:PORT] [PEER_OPTION...]
#
# Makes this device a peer: it waits at HOST:PORT for a master that gives it its part of a model.
# The first start makes .venv and installs what is needed. Ctrl-C ends it.
#
#   HOST:PORT   where to listen (default: 127.0.0.1:50051, which only this device reaches). Give this
#               device's own address, as 192.168.1.20:50051, on a network whose devices you trust:
#               whoever reaches the port can use the peer. PORT + 1000 is used as well.
#   ...         everything after it goes to "tpirt peer": --memory SIZE, --threads N, --store DIR
set -euo pipefail
# shellcheck source=scripts/_env.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/_env.sh"

case ${1-} in
  -h | --help)
    usage
    exit
    ;;
  --listen | --listen=*) refuse "$1: give HOST:PORT as the first argument instead" ;;
  '' | -*)
    listen=127.0.0.1:50051
    note "listening for this device only; for others: ${0##*/} ADDRESS_OF_THIS_DEVICE:50051"
    ;;
  *)
    [[ $1 =~ ^[^[:space:]]+:[0-9]{1,5}$ ]] || refuse "expected HOST:PORT, got '$1'"
    listen=$1
    shift
    ;;
esac

need_tpirt run
exec "$tpirt_venv/bin/tpirt" peer --listen "$listen" "$@"
