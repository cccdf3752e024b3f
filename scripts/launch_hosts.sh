#!/usr/bin/env bash
# Usage: launch_hosts.sh [--ssh-config FILE] HOSTS_FILE
#
# Starts a peer on every host of HOSTS_FILE over ssh and shows what they print, each line after the
# name of its host. Once all of them listen it prints the --peers option for "tpirt chat" on the
# master. Ctrl-C stops them all; so does a peer that fails or ends. If this script is killed, or the
# network is gone for 20 s, the peers end by themselves.
#
# A line of HOSTS_FILE is one peer; "#" starts a comment:
#
#   [USER@]HOST[:SSH_PORT]  [LISTEN_HOST[:PORT]  [REMOTE_DIR]]  [PEER_OPTION...]
#
#   pi@kitchen
#   pi@attic          192.168.1.20
#   10.0.0.7:2222     10.0.0.7:50051      /opt/tpirt   --memory 2GB --threads 2
#
#   LISTEN_HOST:PORT  where the peer listens: the address by which the master reaches that host
#                     (default: all its addresses, and port 50051)
#   REMOTE_DIR        the copy of this repository there (default: tpirt, in the home directory);
#                     a space in it is written as "\ "
#   PEER_OPTION       goes to "tpirt peer": --memory SIZE, --threads N, --store DIR
#
# Each host has joined the master's cluster before (tpirt peer --join, see the README).
#
# ssh must get in without asking (a key, and a host key already known): try "ssh HOST true".
#   --ssh-config FILE  goes to ssh as -F FILE
# Exit code: 2 for a wrong command line or hosts file, 3 for a peer that failed or ended.
set -euo pipefail
# shellcheck source=scripts/_env.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/_env.sh"

# --- the command line and the hosts file -------------------------------------------------------

ssh=(ssh -T -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3
  -o ControlMaster=no -o ControlPath=none -o ClearAllForwardings=yes)
file=
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit
      ;;
    --ssh-config)
      (($# > 1)) || refuse "--ssh-config: a file is missing"
      [[ -r $2 ]] || refuse "--ssh-config: cannot read '$2'"
      ssh+=(-F "$2")
      shift
      ;;
    -*) refuse "$1: unknown option" ;;
    *)
      [[ -z $file ]] || refuse "$1: expected one HOSTS_FILE only"
      file=$1
      ;;
  esac
  shift
done
[[ -n $file ]] || refuse "HOSTS_FILE is missing"
[[ -f $file && -r $file ]] || refuse "HOSTS_FILE: cannot read '$file'"
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || refuse "bash 4.4 or newer is needed, this is $BASH_VERSION"
command -v ssh >/dev/null || refuse "ssh is not installed (on Debian: apt install openssh-client)"

name='(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_.][A-Za-z0-9_.-]*)' # of a host, or its address
targets=() ports=() listens=() commands=() names=()

quote() { # for a POSIX shell
  local word
  for word; do
    printf " '%s'" "${word//\'/\'\\\'\'}"
  done
}

is_port() {
  ((${#1} <= 5 && 10#$1 <= 65535))
}

read_host() { # LINE_NUMBER LINE
  local where="$file, line $1" fields=() user host port dir=tpirt
  # shellcheck disable=SC2162 # a backslash does escape a space here
  read -a fields <<<"$2"
  ((${#fields[@]})) && [[ ${fields[0]} != '#'* ]] || return 0
  for port in "${!fields[@]}"; do
    if [[ ${fields[port]} == '#'* ]]; then
      fields=("${fields[@]:0:port}")
      break
    fi
  done
  [[ ${fields[0]} =~ ^([A-Za-z0-9_.][A-Za-z0-9_.-]*@)?$name(:([0-9]+))?$ ]] ||
    refuse "$where: expected [USER@]HOST[:SSH_PORT], got '${fields[0]}'"
  user=${BASH_REMATCH[1]} host=${BASH_REMATCH[2]} port=${BASH_REMATCH[4]}
  [[ -z $port ]] || is_port "$port" || refuse "$where: '$port' is no port"
  fields=("${fields[@]:1}")
  if ((${#fields[@]})) && [[ ${fields[0]} != -* ]]; then
    { [[ ${fields[0]} =~ ^$name(:([0-9]+))?$ ]] && is_port "${BASH_REMATCH[3]:-0}"; } ||
      refuse "$where: expected LISTEN_HOST[:PORT], got '${fields[0]}'"
    listens+=("${fields[0]}")
    fields=("${fields[@]:1}")
  else
    listens+=(0.0.0.0)
  fi
  if ((${#fields[@]})) && [[ ${fields[0]} != -* ]]; then
    dir=${fields[0]#\~/}
    fields=("${fields[@]:1}")
  fi
  host=${host#[} host=${host%]}
  targets+=("$user$host")
  ports+=("$port")
  names+=("$host")
  # The peer ends when its input does. This side sends a line every 5 s: its input ends with the
  # connection, or when nothing has come for 20 s, though nobody closed the connection.
  # shellcheck disable=SC2016 # for the shell there
  local watch='exec 3<&0; exec "$0" "$@" < <(exec 2>/dev/null; while read -r -t 20 -u 3; do :; done) 3<&-'
  commands+=("exec bash -c$(quote "$watch" "$dir/scripts/launch_peer.sh" "${listens[-1]}" \
    --until-stdin-closes "${fields[@]}")")
}

number=0
while IFS= read -r line || [[ -n $line ]]; do
  number=$((number + 1))
  line=${line#$'\xef\xbb\xbf'} # a byte order mark
  read_host "$number" "${line%$'\r'}"
done <"$file"
count=${#targets[@]}
((count)) || refuse "$file: there is no host in it"

# Two peers on one host: tell them apart.
labels=()
for i in "${!names[@]}"; do
  same=0
  for other in "${names[@]}"; do
    [[ $other != "${names[i]}" ]] || same=$((same + 1))
  done
  if ((same > 1)); then labels+=("${names[i]}#$((i + 1))"); else labels+=("${names[i]}"); fi
done

# --- one connection per host -------------------------------------------------------------------

# Descriptors: 9 is the end of a pipe that only this script holds open for writing, and 8 its other
# end: when the script ends, however it ends, every reader of 8 sees it. 7 and 6 are the writing and
# the reading end of the events, which the connections report by lines:
#   pid I PID | up I HOST:PORT | last I TEXT | down I EXIT_CODE

beat() {
  local code
  while printf '\n' 2>/dev/null; do
    code=0
    read -r -t 5 -u 8 || code=$?
    ((code > 128)) || return 0 # more than 128: the 5 s are over. Else: the pipe is closed.
  done
}

show() { # I
  local line last=''
  while IFS= read -r line || [[ -n $line ]]; do
    printf '%s | %s\n' "${labels[$1]}" "$line"
    last=$line
    if [[ $line =~ ^'listening on '([^ ]+) ]]; then
      printf 'up %s %s\n' "$1" "${BASH_REMATCH[1]}" >&7
    fi
  done
  printf 'last %s %s\n' "$1" "${last:0:400}" >&7
}

connect() { # I
  local command=("${ssh[@]}" ${ports[$1]:+-p "${ports[$1]}"} -- "${targets[$1]}" "${commands[$1]}")
  {
    set +e
    trap '' INT HUP # a signal from the terminal is for the script, which then ends the connections
    exec 9>&- 6<&-
    # beat is no part of the pipe line: it may notice only 5 s later that nobody listens.
    {
      printf 'pid %s %s\n' "$1" "$BASHPID" >&7
      exec 7>&- 8<&-
      exec "${command[@]}" 2>&1
    } < <(beat) | show "$1"
    printf 'down %s %s\n' "$1" "${PIPESTATUS[0]}" >&7
  } &
}

# --- all of them together ----------------------------------------------------------------------

pids=() addresses=() texts=() down=()

# next_event [SECONDS]: handle one event; false if none came in time.
next_event() {
  local kind i rest
  read -r ${1:+-t "$1"} -u 6 kind i rest || return
  case $kind in
    pid) pids[i]=$rest ;;
    up) addresses[i]=$rest ;;
    last) texts[i]=$rest ;;
    down) down[i]=$rest ;;
  esac
}

# Let all peers end; after 10 s, or a second signal, end the connections.
# shellcheck disable=SC2317 # called by the trap
stop() {
  # shellcheck disable=SC2034 # began: the next line uses it
  local began=$SECONDS deadline=$((SECONDS + 10)) signal=TERM i
  trap '((SECONDS <= began)) || deadline=0' INT TERM HUP # one Ctrl-C may come as two signals
  exec 9>&-
  while ((${#down[@]} < count)); do
    next_event 0.2 || true
    ((SECONDS >= deadline)) || continue
    for i in "${!pids[@]}"; do
      [[ -n ${down[i]-} ]] || kill -"$signal" "${pids[i]}" 2>/dev/null || true
    done
    [[ $signal == TERM ]] || break
    deadline=$((SECONDS + 3)) signal=KILL
  done
}

reason() { # I: why this connection ended
  local text=${texts[$1]:+: ${texts[$1]}} code=${down[$1]}
  case ${addresses[$1]:+listened},$code in
    listened,255) printf 'the peer was killed, or the connection was lost' ;;
    listened,*) printf 'the peer ended, exit code %s' "$code" ;;
    ,255) printf 'ssh to %s failed%s' "${targets[$1]}" "$text" ;;
    *) printf 'the peer did not start, exit code %s%s' "$code" "$text" ;;
  esac
}

peers_option() {
  local i host list=''
  for i in "${!listens[@]}"; do
    host=${addresses[i]%:*}
    case $host in
      0.0.0.0 | '[::]')
        host=${names[i]}
        [[ $host != *:* ]] || host="[$host]"
        ;;
    esac
    list+=,$host:${addresses[i]##*:} # the port it has, if 0 was asked for
  done
  printf -- '--peers %s\n' "${list#,}"
}

dir=$(mktemp -d)
mkfifo "$dir/life" "$dir/events"
# shellcheck disable=SC2094 # two ends of one pipe; 5 is there so that opening one does not wait
exec 5<>"$dir/life" 8<"$dir/life" 9>"$dir/life" 5>&-
# shellcheck disable=SC2094
exec 5<>"$dir/events" 6<"$dir/events" 7>"$dir/events" 5>&-
rm -r "$dir"
trap stop EXIT
trap 'note "stopping"; exit 129' HUP
trap 'note "stopping"; exit 130' INT
trap 'note "stopping"; exit 143' TERM
for i in "${!targets[@]}"; do
  connect "$i"
done
exec 8<&-
announced=
while ((${#down[@]} == 0)); do
  next_event || true
  if [[ -z $announced ]] && ((${#addresses[@]} == count)); then
    announced=yes
    note "all $count listen; give this option to tpirt chat or generate on the master:"
    peers_option
  fi
done
failed=("${!down[@]}")
note "${labels[failed[0]]}: $(reason "${failed[0]}")"
note "stopping the others"
exit 3
