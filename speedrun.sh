#!/usr/bin/env bash
# Trains softmax attention and Gaussian Kernel Attention side by side, and compares them.
#
#   bash speedrun.sh                 no GPU: the laptop pair, minutes; with GPUs: the depth-20 pair on all of them, hours
#   bash speedrun.sh --overwrite     start anew; without it, what is finished is kept and what was interrupted goes on
#   bash speedrun.sh --protocol equal-flops     how long GKA trains beside softmax: paper (with GPUs; 0.49 of its FLOPs),
#                                    equal-tokens (without), equal-ratio or equal-flops
#   bash speedrun.sh --run.seed 43   any field of the configs, for both trainings; those of --chat.* are for the tuning on
#                                    conversations that follows them
#
# Everything is written under GKACHAT_HOME (default: ~/.cache/gkachat).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
overrides=() chat_overrides=() into=overrides
go_on=(--resume)  # with a run that has a checkpoint (finished, it has nothing left to do); without one it begins
for word in "$@"; do
    case $word in
        --overwrite) go_on=(--overwrite); continue ;;
        --chat.*) into=chat_overrides ;;
        --*) into=overrides ;;
    esac
    case $word in --protocol | --protocol=*) word=--train.${word#--} ;; esac
    if [ "$into" = overrides ]; then overrides+=("$word"); else chat_overrides+=("$word"); fi
done
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
    launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$gpus" -m)
    talks=(--chat.source huggingface) questions=()
    overrides=(--train.protocol paper ${overrides[@]+"${overrides[@]}"})  # what comes later wins
else
    softmax_config=configs/laptop.toml gka_config=configs/laptop.toml depth=4
    launch=("$PYTHON" -m)
    talks=(--chat.conversations 24000) questions=(--tasks addition counting)
fi

train() {
    local attention=$1 config=$2
    "${launch[@]}" scripts.base_train "$config" "${go_on[@]}" \
        --model.attention "$attention" --run.name "d${depth}_$attention" ${overrides[@]+"${overrides[@]}"}
}

tune() {
    "${launch[@]}" scripts.chat_sft "d${depth}_$1" "${go_on[@]}" "${talks[@]}" \
        ${chat_overrides[@]+"${chat_overrides[@]}"}
}

if [ "$gpus" -gt 0 ]; then
    step "count" "$PYTHON" -m scripts.cost --config "$softmax_config"
    step "estimate the hours of training" "$PYTHON" -m scripts.estimate "$softmax_config" "$gka_config" "${overrides[@]}"
fi
step "train the tokenizer" "$PYTHON" -m scripts.tok_train "$softmax_config"
step "tokenize the corpus" "$PYTHON" -m scripts.data_prep "$softmax_config"
step "train softmax attention" train softmax "$softmax_config"
step "train Gaussian Kernel Attention" train gka "$gka_config"
step "evaluate softmax attention" "$PYTHON" -m scripts.base_eval "d${depth}_softmax"
step "evaluate Gaussian Kernel Attention" "$PYTHON" -m scripts.base_eval "d${depth}_gka"
if [ "$gpus" -gt 0 ]; then
    for attention in softmax gka; do
        step "score $attention on CORE" "${launch[@]}" scripts.base_eval "d${depth}_$attention" --eval core
    done
fi
step "compare" "$PYTHON" -m scripts.compare "d${depth}_softmax" "d${depth}_gka"
step "tune softmax attention on conversations" tune softmax
step "tune Gaussian Kernel Attention on conversations" tune gka
for attention in softmax gka; do
    step "ask the tuned $attention model" "$PYTHON" -m scripts.chat_eval "d${depth}_${attention}_chat" ${questions[@]+"${questions[@]}"}
done

[ "$GKACHAT_HOME" = "$HOME/.cache/gkachat" ] && prefix= || prefix="GKACHAT_HOME=$GKACHAT_HOME "
chat="  ${prefix}$PYTHON -m scripts.chat_cli d${depth}"
echo
echo "Talk to them, one by one or to both at once:"
printf '%s\n' "${chat}_softmax_chat" "${chat}_gka_chat" "${chat}_softmax_chat --compare d${depth}_gka_chat"
