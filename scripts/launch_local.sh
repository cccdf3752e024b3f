#!/usr/bin/env bash
# Usage: launch_local.sh [N] [MODEL_DIR] [--prompt TEXT] [-- CHAT_OPTION...]
#
# Chats with a model that N peers on this machine compute together: this process is the master,
# N-1 more are its workers, on loopback. They end when the chat ends, however it ends.
# The first start makes .venv and installs what is needed; the next ones start at once.
#
#   N              how many peers, the master counted (default: 4)
#   MODEL_DIR      a checkpoint in Hugging Face layout (default: the bundled model)
#   --prompt TEXT  answer this one message, and exit
#   -- ...         everything after it goes to "tpirt chat" (see: launch_local.sh -- --help)
set -euo pipefail
# shellcheck source=scripts/_env.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/_env.sh"

positional=() options=()
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit
      ;;
    --prompt)
      (($# > 1)) || refuse "--prompt: a text is missing"
      options+=(--prompt "$2")
      shift
      ;;
    --prompt=*) options+=("$1") ;;
    --)
      shift
      options+=("$@")
      break
      ;;
    -*) refuse "$1: unknown option" ;;
    *) positional+=("$1") ;;
  esac
  shift
done
((${#positional[@]} <= 2)) || refuse "${positional[2]}: expected no more than N and MODEL_DIR"
count=${positional[0]-4}
[[ $count =~ ^[1-9][0-9]{0,3}$ ]] || refuse "N: expected a whole number from 1 on, got '$count'"
if ((${#positional[@]} == 2)); then
  [[ -f ${positional[1]}/config.json ]] || refuse "MODEL_DIR: there is no config.json in '${positional[1]}'"
  options=(--model "${positional[1]}" ${options[@]+"${options[@]}"})
fi

need_tpirt run
exec "$tpirt_venv/bin/tpirt" chat --fresh --local "$count" ${options[@]+"${options[@]}"}
