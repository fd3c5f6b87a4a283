#!/usr/bin/env bash
# Trains softmax attention and Gaussian Kernel Attention side by side, and compares them.
#
#   bash speedrun.sh                 no GPU: the laptop pair, minutes; with GPUs: the depth-20 pair on all of them, hours
#   bash speedrun.sh --overwrite     start anew; without it, what is finished is kept and what was interrupted goes on
#   bash speedrun.sh --train.protocol equal-flops --overwrite      any field of the configs, for both trainings
#
# Everything is written under GKACHAT_HOME (default: ~/.cache/gkachat).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
overrides=("$@")
source scripts/setup.sh
export GKACHAT_HOME=${GKACHAT_HOME:-$HOME/.cache/gkachat}

trap 'echo "speedrun: interrupted; run it again to go on" >&2; exit 130' INT  # training itself ends well when asked to

step() {
    local name=$1 status=0
    shift
    echo "== $name"
    "$@" || status=$?
    if [ "$status" -ne 0 ]; then
        echo "speedrun: $name failed (exit code $status)" >&2
        exit "$status"
    fi
}

gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true)
if [ "$gpus" -gt 0 ]; then
    softmax_config=configs/d20_softmax.toml gka_config=configs/d20_gka.toml depth=20
    launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$gpus" -m scripts.base_train)
else
    softmax_config=configs/laptop.toml gka_config=configs/laptop.toml depth=4
    launch=("$PYTHON" -m scripts.base_train)
fi

train() {
    local attention=$1 config=$2 flags=()
    # A run with a checkpoint is gone on with (finished, it has nothing left to do); without one it begins.
    if [[ " ${overrides[*]-} " != *" --overwrite "* ]]; then flags=(--resume); fi
    "${launch[@]}" "$config" ${flags[@]+"${flags[@]}"} --model.attention "$attention" --run.name "d${depth}_$attention" \
        ${overrides[@]+"${overrides[@]}"}
}

step "train the tokenizer" "$PYTHON" -m scripts.tok_train "$softmax_config"
step "tokenize the corpus" "$PYTHON" -m scripts.data_prep "$softmax_config"
step "train softmax attention" train softmax "$softmax_config"
step "train Gaussian Kernel Attention" train gka "$gka_config"
step "evaluate softmax attention" "$PYTHON" -m scripts.base_eval "d${depth}_softmax"
step "evaluate Gaussian Kernel Attention" "$PYTHON" -m scripts.base_eval "d${depth}_gka"
step "compare" "$PYTHON" -m scripts.compare "d${depth}_softmax" "d${depth}_gka"

[ "$GKACHAT_HOME" = "$HOME/.cache/gkachat" ] && prefix= || prefix="GKACHAT_HOME=$GKACHAT_HOME "
echo
echo "Talk to them:"
for attention in softmax gka; do
    echo "  ${prefix}$PYTHON -m scripts.chat_cli d${depth}_$attention"
done
