#!/usr/bin/env bash
# Walks the GPU branch of speedrun.sh on a machine without a GPU: torch's CUDA build on a device that computes nothing.
#
#   bash scripts/gpu_walk.sh                            everything, at small size; ends in a table
#   bash scripts/gpu_walk.sh --only speedrun_1 decode   some parts of it: speedrun_1, chat, speedrun_2, resume, decode,
#                                                       options, peaks; chat needs speedrun_1
#   bash scripts/gpu_walk.sh --full                     memory measured at depth 20, not extrapolated from 2 and 4
#   bash scripts/gpu_walk.sh --out results/gpu_walk.md  also write the table to a file
#
# It proves host-side behaviour, code generation and memory, and neither numbers nor speed: see tests/nullgpu/README.md.
# Needs gcc, Python.h and uv (pip would take a CPU build of torch where one is at hand), and some 7 GB of disk for
# .venv-cuda. The exit code is 1 if a step has a fault.
set -eo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$PWD/build/gpu_walk python=$PWD/.venv-cuda/bin/python

for program in gcc nm uv; do
    command -v "$program" >/dev/null || { echo "gpu_walk: $program is not installed" >&2; exit 1; }
done
if ! cmp -s pyproject.toml .venv-cuda/installed; then
    echo "== installing torch's CUDA build into .venv-cuda"
    [ -x "$python" ] || uv venv --quiet --python "${PYTHON:-python3}" .venv-cuda
    uv pip install --quiet --python "$python" --editable ".[fp8]"
    cp pyproject.toml .venv-cuda/installed
fi
"$python" -c '
import os, sys, sysconfig, torch
header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
if not torch.version.cuda:
    sys.exit(f"gpu_walk: .venv-cuda has torch {torch.__version__}, expected a CUDA build")
if not os.path.exists(header):
    sys.exit(f"gpu_walk: {header} is missing, which Triton compiles against: install the headers of this Python")
'
library=$("$python" tests/nullgpu/build.py "$python" "$work/nullgpu")
export TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton  # a second walk compiles only what is new
exec "$python" tests/nullgpu/walk.py "$library" "$work" "$@"
