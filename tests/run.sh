#!/usr/bin/env bash
# Sets up .venv with the development tools and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pytest_args=("$@")
setup_extra=dev
source scripts/setup.sh
exec "$PYTHON" -m pytest ${pytest_args[@]+"${pytest_args[@]}"}
