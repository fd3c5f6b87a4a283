#!/usr/bin/env bash
# Sets up .venv with the development tools and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pytest_args=("$@")
setup_extra=dev
source scripts/setup.sh
# A second Triton, for which the kernels are compiled too: that of torch 2.11. Without a network its tests are skipped.
[ -d .venv/triton-3.6 ] || [ "$(uname -s)" != Linux ] ||
    "$PYTHON" -m pip install --quiet --no-deps --target .venv/triton-3.6 triton==3.6.0 ||
    { rm -rf .venv/triton-3.6; echo "tests: cannot install Triton 3.6; its tests are skipped" >&2; }
# timm, apart from the other packages: PyPI's torchvision does not fit a build of torch for CPUs, and breaks transformers.
[ -d .venv/timm ] || "$PYTHON" -m pip install --quiet --no-deps --target .venv/timm timm 'torchvision==0.28.*' ||
    { rm -rf .venv/timm; echo "tests: cannot install timm; its test is skipped" >&2; }
exec "$PYTHON" -m pytest ${pytest_args[@]+"${pytest_args[@]}"}
