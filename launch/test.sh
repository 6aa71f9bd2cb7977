#!/usr/bin/env bash
# Checks style and runs the tests: bash launch/test.sh [flags of pytest]
# Makes the Python environment first when there is none (see setup_env.sh for VENV and PYTHON).
set -euo pipefail
# shellcheck source=launch/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

setup_env requirements-test.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest "$@"
