#!/usr/bin/env bash
# Trains softmax attention, Gaussian Kernel Attention as published (gka) and with its additions (gka_plus) side by side,
# and compares them.
#
#   bash speedrun.sh                 no GPU: at a laptop's size, minutes; with GPUs: at depth 20 on all of them, hours
#   bash speedrun.sh --overwrite     start anew; without it, what is finished is kept and what was interrupted goes on
#   bash speedrun.sh --protocol equal-flops     how long both train beside softmax: paper (with GPUs; 0.49 of its FLOPs),
#                                    equal-tokens (without), equal-ratio or equal-flops
#   bash speedrun.sh --run.seed 43   any field of the configs, for all trainings; those of --chat.* are for the tuning on
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

attentions=(softmax gka gka_plus)
gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true)
if [ "$gpus" -gt 0 ]; then
    depth=20 configs=("${attentions[@]/#/configs/d20_}") configs=("${configs[@]/%/.toml}")
    launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$gpus" -m)
    talks=(--chat.source huggingface) questions=()
    overrides=(--train.protocol paper ${overrides[@]+"${overrides[@]}"})  # what comes later wins
    step "count" "$PYTHON" -m scripts.cost --config "${configs[0]}"
    step "estimate the hours of training" "$PYTHON" -m scripts.estimate "${configs[@]}" "${overrides[@]}"
else
    depth=4 configs=(configs/laptop.toml configs/laptop.toml configs/laptop.toml)
    launch=("$PYTHON" -m)
    talks=(--chat.conversations 24000) questions=(--tasks addition counting)
fi
runs=("${attentions[@]/#/d${depth}_}")

step "train the tokenizer" "$PYTHON" -m scripts.tok_train "${configs[0]}"
step "tokenize the corpus" "$PYTHON" -m scripts.data_prep "${configs[0]}"
for i in "${!runs[@]}"; do
    step "train ${attentions[i]}" "${launch[@]}" scripts.base_train "${configs[i]}" "${go_on[@]}" \
        --model.attention "${attentions[i]}" --run.name "${runs[i]}" ${overrides[@]+"${overrides[@]}"}
done
for run in "${runs[@]}"; do
    step "evaluate $run" "$PYTHON" -m scripts.base_eval "$run"
    if [ "$gpus" -gt 0 ]; then step "score $run on CORE" "${launch[@]}" scripts.base_eval "$run" --eval core; fi
done
step "compare" "$PYTHON" -m scripts.compare "${runs[@]}"
for run in "${runs[@]}"; do
    step "tune $run on conversations" "${launch[@]}" scripts.chat_sft "$run" "${go_on[@]}" "${talks[@]}" \
        ${chat_overrides[@]+"${chat_overrides[@]}"}
done
for run in "${runs[@]}"; do
    step "ask the tuned $run" "$PYTHON" -m scripts.chat_eval "${run}_chat" ${questions[@]+"${questions[@]}"}
done

[ "$GKACHAT_HOME" = "$HOME/.cache/gkachat" ] && prefix= || prefix="GKACHAT_HOME=$GKACHAT_HOME "
chat="  ${prefix}$PYTHON -m scripts.chat_cli"
echo
echo "Talk to them, one by one or to two at once:"
printf "$chat %s_chat\n" "${runs[@]}"
echo "$chat ${runs[0]}_chat --compare ${runs[2]}_chat"
