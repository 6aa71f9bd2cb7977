#!/usr/bin/env bash
# Trains on this machine: bash launch/local.sh [--dry-run] [flags of src.main]
#
# Without --config and --workdir it trains on the digits. --dry-run prints the commands and runs nothing.
# Makes the Python environment first when there is none (see setup_env.sh for VENV and PYTHON).
set -euo pipefail
# shellcheck source=launch/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

parse_arguments train "$@" # no action to give: all that remains are flags
CONFIG=configs/digits.py
WORKDIR=runs/digits
add_main_flags
setup_env requirements.txt
[[ $DRY_RUN == true ]] || exec "$PYTHON" -m src.main "${FLAGS[@]}"
quoted "$PYTHON" -m src.main "${FLAGS[@]}"
