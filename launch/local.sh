#!/usr/bin/env bash
# Trains on this machine: bash launch/local.sh [flags of src.main, the last one of a kind wins]
# Makes the Python environment first when there is none (see setup_env.sh for VENV and PYTHON).
set -euo pipefail
# shellcheck source=launch/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

setup_env requirements.txt
exec "$PYTHON" -m src.main --config=configs/digits.py --workdir=runs/digits "$@"
