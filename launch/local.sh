#!/usr/bin/env bash
# Trains on this machine: bash launch/local.sh [flags of src.main]
# Makes the Python environment first when there is none (see setup_env.sh for VENV and PYTHON).
set -euo pipefail
# shellcheck source=launch/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

setup_env requirements.txt
# A default only where none is given: config flags do not take the same flag twice.
[[ " $* " == *" --config"[=\ ]* ]] || set -- --config=configs/digits.py "$@"
[[ " $* " == *" --workdir"[=\ ]* ]] || set -- --workdir=runs/digits "$@"
exec "$PYTHON" -m src.main "$@"
