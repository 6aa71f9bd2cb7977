#!/usr/bin/env bash
# Checks style and runs the tests: bash launch/test.sh [--dry-run] [flags of pytest]
#
# --dry-run prints the commands and runs nothing.
# Makes the Python environment first when there is none (see setup_env.sh for VENV and PYTHON).
set -euo pipefail
# shellcheck source=launch/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

parse_arguments test "$@" # no action to give: all that remains are flags
setup_env requirements-test.txt
execute "$PYTHON" -m ruff check .
execute "$PYTHON" -m ruff format --check .
# Two processes, each with eight emulated devices; the tests of one file stay together.
set -- "$PYTHON" -m pytest -n 2 --dist loadfile ${FLAGS[@]+"${FLAGS[@]}"}
[[ $DRY_RUN == true ]] || exec "$@"
quoted "$@"
