# shellcheck shell=bash
# Sourced by the scripts beside it, which set -euo pipefail. `setup_env requirements.txt` leaves the shell in the
# repository's root, with PYTHON set to the interpreter of an environment that has what the file asks for.
#
#   VENV     where the environment lives (default: .venv in the repository's root)
#   PYTHON   the Python that makes it (default: python3 if it is at least 3.11, otherwise 3.13, 3.12 or 3.11)

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    is_new_enough "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11 or newer: unset it or set another path"
    command -v "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11; do
    if is_new_enough "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  die "there is no Python 3.11 or newer: install one, or set PYTHON to its path"
}

make_venv() {
  local venv=$1 python
  python=$(find_python) || exit 1
  # --clear empties the folder, so it must be an environment.
  if [[ -n $(ls -A "$venv" 2>/dev/null) && ! -f $venv/pyvenv.cfg ]]; then
    die "$venv is not a Python environment: set VENV to a new or empty folder"
  fi
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$python lacks the venv module: install it (on Debian: apt-get install python3-venv)"
  "$python" -m venv --clear "$venv" || die "the environment $venv cannot be made: set VENV to a writable place"
}

setup_env() {
  local requirements=$1 root venv wanted stamp
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  venv=${VENV:-$root/.venv}
  [[ $venv == /* ]] || venv=$PWD/$venv
  stamp=$venv/installed-$requirements.sum
  if [[ $DRY_RUN == true ]]; then
    cd "$root" || die "$root cannot be entered"
    [[ -x $venv/bin/python ]] || quoted "${PYTHON:-python3}" -m venv --clear "$venv"
    [[ -f $stamp ]] || quoted "$venv/bin/python" -m pip install -r "$requirements"
    PYTHON=$venv/bin/python
    return
  fi
  if ! is_new_enough "$venv/bin/python" || [[ ! -f $venv/bin/pip ]]; then
    make_venv "$venv"
  fi
  cd "$root" || die "$root cannot be entered"
  PYTHON=$venv/bin/python
  # One file may include another, so all count; so does the interpreter.
  wanted=$({ cat requirements*.txt && "$PYTHON" -VV; } | cksum)
  if [[ $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
    echo "installing $requirements into $venv (once; a minute or two)" >&2
    if ! "$PYTHON" -m pip install --disable-pip-version-check --quiet -r "$requirements" 2>&1 | tee "$venv/pip.log" >&2; then
      die "pip could not install $requirements: the reason is above and in $venv/pip.log"
    fi
    echo "$wanted" >"$stamp"
  fi
  export PYTHON
}
