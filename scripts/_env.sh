# shellcheck shell=bash
# Sourced by the scripts beside it: where the repository is, and a Python environment in .venv.
#
#   TPIRT_PYTHON=COMMAND  the Python (3.11 or newer) to make .venv with
#   TPIRT_TORCH=cuda      on Linux, when .venv is made: torch with CUDA, a download of 2.8 GB; the default
#                         is its CPU build
#   TPIRT_VENV=DIR        an environment that has tpirt already: used as it is, nothing is installed

tpirt_root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd -P)
tpirt_venv=${TPIRT_VENV:-$tpirt_root/.venv}
[[ $tpirt_venv == /* ]] || tpirt_venv=$PWD/$tpirt_venv
tpirt_stamp=$tpirt_venv/tpirt-installed # what this .venv was installed from; written last
cpu_index=https://download.pytorch.org/whl/cpu # PyTorch's; PyPI has no CPU build for Linux

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
  local before=none code=0
  [[ ! -f $tpirt_stamp ]] || before=$(<"$tpirt_stamp")
  # What an interrupted pip leaves can pass for an installed package, so begin anew.
  if [[ $before == unfinished ]] || ! "$tpirt_venv/bin/python" -m pip --version &>/dev/null; then
    _make_venv
    before=none
  fi
  _choose_packages "$1"
  # Compiling all modules takes longer than importing those that the tests use.
  [[ $1 == run ]] || packages=(--no-compile "${packages[@]}")
  note "installing into $tpirt_venv (downloads about $size, once)"
  printf 'unfinished\n' >"$tpirt_stamp"
  [[ -t 2 ]] || packages=(--quiet --progress-bar off "${packages[@]}")
  # Kernels are compiled while pip downloads; its build takes up what it finds.
  (cd "$tpirt_root" && exec "$tpirt_venv/bin/python" -m tpirt.ops.native.compiling) </dev/null &>/dev/null &
  trap 'kill $(jobs -pr) 2>/dev/null || :' EXIT # not $!: another process may have that number by then
  "$tpirt_venv/bin/python" -m pip install --no-input --disable-pip-version-check "${packages[@]}" \
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
  command -v tpirt >/dev/null ||
    note "to type tpirt in this shell: . $(printf '%q' "$tpirt_venv/bin/activate")"
}

# Set "packages" to pip's arguments, and "size" to about what it downloads (download_size.sh tells).
_choose_packages() { # run|dev
  packages=(--prefer-binary) size='250 MB'
  _choose_torch
  packages+=(-c "$tpirt_root/constraints.txt" -e)
  if [[ $1 == run ]]; then
    packages+=("$tpirt_root")
  else
    packages+=("$tpirt_root[dev]")
    [[ $size != '250 MB' ]] || size='330 MB'
  fi
}

# Ask for torch's CPU build on Linux, where PyPI's build brings gigabytes of CUDA libraries;
# elsewhere PyPI's is the CPU build. The user's own indexes come first: PyTorch's is added only if
# they lack the build.
_choose_torch() {
  local cpu own
  cpu=$(sed -n 's/^torch==//p' "$tpirt_root/constraints.txt")+cpu
  case $(uname -sm),${TPIRT_TORCH:-cpu} in
    'Linux x86_64,cuda' | 'Linux aarch64,cuda')
      packages+=("torch!=$cpu") size='2.8 GB'
      return
      ;;
    'Linux x86_64,cpu' | 'Linux aarch64,cpu') ;;
    *,cpu | *,cuda) return ;;
    *)
      note "TPIRT_TORCH: expected cpu or cuda, got '$TPIRT_TORCH'"
      exit 2
      ;;
  esac
  # An environment that was made with CUDA keeps it.
  ! compgen -G "$tpirt_venv/lib/python*/site-packages/nvidia" >/dev/null || return 0
  packages+=("torch==$cpu")
  own=$(_torch_versions)
  [[ $own != *" $cpu"* ]] || return 0
  if [[ $(_torch_versions --extra-index-url "$cpu_index") == *" $cpu"* ]]; then
    packages+=(--extra-index-url "$cpu_index")
  else
    _refuse_torch "$cpu" "$own"
  fi
}

# Say that no index has torch's CPU build, and what to do: pip would only take longer to find out.
_refuse_torch() { # VERSION VERSIONS_OF_PIPS_OWN_INDEX
  local tried="which has other builds of torch only"
  [[ -n $2 ]] || tried="which does not answer, or has no torch"
  note "cannot install torch's CPU build, torch $1; nothing was installed"
  note "tried pip's own index, $tried; and $cpu_index, which does not answer, or lacks this version"
  note "either make $cpu_index reachable (HTTPS_PROXY=..., say), or set PIP_EXTRA_INDEX_URL to a mirror of it"
  note "or take the build with CUDA from pip's own index: TPIRT_TORCH=cuda (2.8 GB to download)"
  exit 1
}

# The versions of torch that pip finds; nothing if it finds none. Fails soon: to install, pip would
# try each package for long.
_torch_versions() { # PIP_OPTION...
  "$tpirt_venv/bin/python" -m pip index versions torch \
    --no-input --disable-pip-version-check --retries 0 --timeout 5 "$@" 2>/dev/null || :
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
