#!/usr/bin/env bash
# Sets up .venv with the development tools and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pytest_args=("$@")
setup_extra=dev
source scripts/setup.sh
# What follows is fetched at the same time.
# A second Triton, for which the kernels are compiled too: that of torch 2.11. Without a network its tests are skipped.
[ -d .venv/triton-3.6 ] || [ "$(uname -s)" != Linux ] ||
    "$PYTHON" -m pip install --quiet --no-deps --target .venv/triton-3.6 triton==3.6.0 ||
    { rm -rf .venv/triton-3.6; echo "tests: cannot install Triton 3.6; its tests are skipped" >&2; } &
# timm, apart from the other packages: PyPI's torchvision does not fit a build of torch for CPUs, and breaks transformers.
[ -d .venv/timm ] || "$PYTHON" -m pip install --quiet --no-deps --target .venv/timm timm 'torchvision==0.28.*' ||
    { rm -rf .venv/timm; echo "tests: cannot install timm; its test is skipped" >&2; } &
# transformers' own tests of models, which only its source distribution has. Without a network they are skipped.
version=$("$PYTHON" -c 'import importlib.metadata; print(importlib.metadata.version("transformers"))')
fetched=.venv/transformers-tests-$version
[ -d "$fetched" ] || {
    mkdir -p "$fetched.tmp" &&
        "$PYTHON" -m pip download --quiet --no-deps --no-binary transformers --dest "$fetched.tmp" "transformers==$version" &&
        tar -xzf "$fetched.tmp/transformers-$version.tar.gz" -C "$fetched.tmp" &&
        mv "$fetched.tmp/transformers-$version/tests" "$fetched"
} || echo "tests: cannot fetch transformers' tests; they are skipped" >&2 &
wait
rm -rf "$fetched.tmp"
exec "$PYTHON" -m pytest ${pytest_args[@]+"${pytest_args[@]}"}
