# shellcheck shell=bash
# Sourced by the scripts beside it: where the repository is, and a Python environment in .venv.
#
#   TPIRT_PYTHON=COMMAND  the Python (3.11 or newer) to make .venv with
#   TPIRT_VENV=DIR        an environment that has tpirt already: used as it is, nothing is installed

tpirt_root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd -P)
tpirt_venv=${TPIRT_VENV:-$tpirt_root/.venv}
[[ $tpirt_venv == /* ]] || tpirt_venv=$PWD/$tpirt_venv
tpirt_stamp=$tpirt_venv/tpirt-installed # what this .venv was installed from; written last

note() {
  printf '%s\n' "${0##*/}: $*" >&2
}

# refuse TEXT: the command line (or a file it names) is wrong.
refuse() {
  note "$* (see --help)"
  exit 2
}

# Print the usage: the comment at the head of the calling script.
usage() {
  sed -n '2,/^[^#]/ { s/^# \{0,1\}//p; }' "${BASH_SOURCE[1]}"
}

# need_tpirt run|dev: return once $tpirt_venv has the package (dev: and what the tests need).
need_tpirt() {
  if [[ -n ${TPIRT_VENV:-} ]]; then
    [[ -x $tpirt_venv/bin/tpirt ]] && return
    note "TPIRT_VENV: there is no bin/tpirt in $tpirt_venv"
    exit 1
  fi
  _is_installed "$1" && return
  # The lock is this file's, not one of .venv's, which may be cleared. Children inherit it: if this
  # script is killed, the next one still waits for the pip it left behind.
  (
    if command -v flock >/dev/null && ! flock --nonblock 9; then
      note "waiting for another installation into $tpirt_venv"
      flock 9
    fi
    _is_installed "$1" || _install "$1"
  ) 9<"$tpirt_root/constraints.txt"
}

# What an installation is made from. Its place counts: an environment cannot be moved.
_installed_from() {
  printf '%s\n' "$tpirt_root"
  cat "$tpirt_root/pyproject.toml" "$tpirt_root/constraints.txt"
}

_is_installed() { # run|dev
  [[ -f $tpirt_stamp && -x $tpirt_venv/bin/python && -x $tpirt_venv/bin/tpirt ]] || return
  local stamp from
  stamp=$(<"$tpirt_stamp")
  from=$(_installed_from)
  [[ $stamp == "dev"$'\n'"$from" || $stamp == "$1"$'\n'"$from" ]]
}

_install() { # run|dev
  local target=$tpirt_root size=250 before=none code=0 options=(--prefer-binary)
  if [[ $1 == dev ]]; then
    target+='[dev]' size=300
    # Compiling all modules takes longer than importing those that the tests use.
    options+=(--no-compile)
  fi
  [[ ! -f $tpirt_stamp ]] || before=$(<"$tpirt_stamp")
  # What an interrupted pip leaves can pass for an installed package, so begin anew.
  if [[ $before == unfinished ]] || ! "$tpirt_venv/bin/python" -m pip --version &>/dev/null; then
    _make_venv
    before=none
  fi
  note "installing into $tpirt_venv (downloads about $size MB, once)"
  printf 'unfinished\n' >"$tpirt_stamp"
  [[ -t 2 ]] || options+=(--quiet --progress-bar off)
  "$tpirt_venv/bin/python" -m pip install --no-input --disable-pip-version-check \
    "${options[@]}" -c "$tpirt_root/constraints.txt" -e "$target" \
    </dev/null >&2 || code=$?
  if ((code)); then
    # A pip that failed (no network, say) put back what it found; one that was killed did not.
    if ((code < 128)); then
      if [[ $before == none ]]; then rm -f "$tpirt_stamp"; else printf '%s\n' "$before" >"$tpirt_stamp"; fi
    fi
    note "the installation failed (pip's exit code $code; its messages are above)"
    exit 1
  fi
  { printf '%s\n' "$1"; _installed_from; } >"$tpirt_stamp.new"
  mv "$tpirt_stamp.new" "$tpirt_stamp"
  note "installed"
}

_make_venv() {
  local python found='' name
  for name in ${TPIRT_PYTHON:+"$TPIRT_PYTHON"} python3.11 python3.12 python3.13 python3.14 python3; do
    "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' &>/dev/null || continue
    found=$name
    if "$name" -c 'import ensurepip, venv' &>/dev/null; then
      python=$name
      break
    fi
  done
  if [[ -z $found ]]; then
    note "Python 3.11 or newer is needed, and none was found as python3 or python3.11 to python3.14"
    note "on Debian and Ubuntu: apt install python3 python3-venv; or set TPIRT_PYTHON to one"
    exit 1
  fi
  if [[ -z ${python:-} ]]; then
    name=$("$found" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    note "$found cannot make an environment: its modules venv and ensurepip are missing"
    note "on Debian and Ubuntu: apt install $name"
    exit 1
  fi
  note "making $tpirt_venv with $python"
  "$python" -m venv --clear "$tpirt_venv"
}
