#!/usr/bin/env bash
# Trains the same model with softmax attention, Gaussian Kernel Attention as published (gka) and gka with additions
# (gka_conv), evaluates and compares them, and tunes each on conversations.
#
#   bash speedrun.sh                 without a GPU: laptop size, minutes; with GPUs: depth 20 on all of them, hours
#   bash speedrun.sh --overwrite     start anew (default: keep finished runs and continue interrupted ones)
#   bash speedrun.sh --protocol equal-flops     token budgets: paper (default with GPUs), equal-tokens (default without),
#                                               equal-ratio, equal-flops
#   bash speedrun.sh --run.seed 43              options of all trainings; --data and --tokenizer: of the corpus, too
#   bash speedrun.sh --chat.epochs 2            options of all tunings
#   bash speedrun.sh --help                     this text
#
# Everything is written under GKACHAT_HOME (default: ~/.cache/gkachat).
set -eo pipefail  # not -u: macOS has bash 3.2, where it refuses empty arrays
cd "$(dirname "${BASH_SOURCE[0]}")"
resume=--resume train_options=() chat_options=() data_options=() section=train depth=
for word in "$@"; do
    case $word in -h | --help) sed -n '2,/^$/{/^#/!d; s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
done
for word in "$@"; do
    case $word in --protocol | --protocol=*) word=--train.${word#--} ;; esac
    case $word in
        --overwrite) resume=--overwrite; continue ;;
        --run.name | --run.name=* | --model.attention | --model.attention=* | --chat.base | --chat.base=*)
            echo "speedrun: given $word, which it sets itself for each run; leave it out" >&2
            exit 2 ;;
        --chat.*) section=chat ;;
        --data.* | --tokenizer.*) section=data ;;
        --model.depth) section=depth ;;
        --model.depth=*) section=train depth=${word#*=} ;;
        --*) section=train ;;
        *) [ "$section" != depth ] || depth=$word ;;
    esac
    [ "$section" = chat ] && chat_options+=("$word") || train_options+=("$word")
    [ "$section" != data ] || data_options+=("$word")
done
SECONDS=0 minutes=()
set -- "${train_options[@]}" "${chat_options[@]}"
setup_check='import sys; from gkachat.config import TuningConfig; from scripts.cli import check_names, run
run(lambda: check_names(sys.argv[1:], TuningConfig))'
source scripts/setup.sh
export GKACHAT_HOME=${GKACHAT_HOME:-$HOME/.cache/gkachat}
case $GKACHAT_HOME in "~/"*) GKACHAT_HOME=$HOME/${GKACHAT_HOME#"~/"} ;; esac
trap 'signal_jobs INT; [ "${gpus-}" != 0 ] || wait; echo "speedrun: interrupted; run it again to continue" >&2; exit 130' INT
trap '[ -z "$data_job" ] || kill "$data_job" 2>/dev/null || true; signal_jobs TERM' EXIT  # the exit code stays
data_job= data_log=$GKACHAT_HOME/data_prep.log data_step="tokenize the corpus"

# Note the duration of a step, for the table at the end.
took() {
    minutes+=("$(printf '%3d:%02d  %s' $(($2 / 60)) $(($2 % 60)) "$1")")
}

# Send a signal to what each_run has started and has not ended.
signal_jobs() {
    local group
    for group in $(jobs -p); do [ "$group" = "$data_job" ] || kill -s "$1" -- "-$group" 2>/dev/null || true; done
}

fail() {
    echo "speedrun: $1 failed (exit code $2)${3-}" >&2
    exit "$2"
}

# End the speedrun if the tokenization in the background has failed. With an argument, wait for it to finish first.
check_data() {
    [ -n "$data_job" ] || return 0
    if kill -0 "$data_job" 2>/dev/null; then
        [ -n "${1-}" ] || return 0
        echo "== $data_step, the rest"
    fi
    local job=$data_job status=0 began=$SECONDS
    wait "$job" || status=$?
    [ -z "${1-}" ] || took "$data_step, the rest" $((SECONDS - began))
    data_job=
    [ "$status" -eq 0 ] || fail "$data_step" "$status" "; its output is in $data_log"
}

step() {
    local name=$1 status=0
    shift
    check_data
    local began=$SECONDS
    echo "== $name"
    "$@" || status=$?
    took "$name" $((SECONDS - began))
    if [ "$status" -ne 0 ]; then
        check_data  # its failure may be the reason
        fail "$name" "$status"
    fi
}

# Do a step for every run: each_run NAME FUNCTION. On GPUs each run has all of them, one run after the other. Without, all
# run at the same time with a share of the cores: one small model cannot keep more than one or two of them busy.
each_run() {
    local name=$1 i run status=0 failed= began=$SECONDS pids=()
    if [ "$gpus" -gt 0 ]; then
        for i in "${!runs[@]}"; do step "$name ${runs[i]}" "$2" "${runs[i]}"; done
        return
    fi
    echo "== $name ${runs[*]}, at the same time"
    set -m  # gives each job a process group, whose processes Ctrl-C reaches; other jobs of a script ignore it
    for run in "${runs[@]}"; do
        (OMP_NUM_THREADS=$threads "$2" "$run" 2>&1 < /dev/null | prefixed "$run") &
        pids+=("$!")
    done
    set +m
    for i in "${!runs[@]}"; do wait "${pids[i]}" || { status=$?; failed+=" ${runs[i]}"; }; done
    took "$name all" $((SECONDS - began))
    [ -z "$failed" ] || fail "$name$failed" "$status"
}

prefixed() {
    trap '' INT  # until the last line has come
    while IFS= read -r line || [ -n "$line" ]; do printf '%s | %s\n' "$1" "$line"; done
}

train() {
    "${launch[@]}" scripts.base_train "$config" "$resume" --model.attention "${1#d*_}" --run.name "$1" "${train_options[@]}"
}
evaluate() { "${launch[@]}" scripts.base_eval "$1"; }
score() { "${launch[@]}" scripts.base_eval "$1" --eval core; }
tune() { "${launch[@]}" scripts.chat_sft "$1" "$resume" "${chat_options[@]}"; }
ask() { "$PYTHON" -m scripts.chat_eval "${1}_chat" --tasks addition counting; }

found=$("$PYTHON" -c 'import os; from gkachat.machine import count_gpus; from gkachat.config import ATTENTIONS
from scripts.cli import run; run(lambda: print(count_gpus(), os.cpu_count(), *ATTENTIONS))')
read -r gpus cores found <<< "$found"
attentions=($found) threads=$((${OMP_NUM_THREADS:-cores} / ${#attentions[@]}))
[ "$threads" -gt 0 ] || threads=1
took "set up" "$SECONDS"
if [ "$gpus" -gt 0 ]; then
    config=configs/d20.toml depth=${depth:-20}
    launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$gpus" -m)
    train_options=(--train.protocol paper "${train_options[@]}")  # an option of the user comes later and wins
    chat_options=(--chat.source huggingface "${chat_options[@]}")
else
    config=configs/laptop.toml depth=${depth:-4}
    launch=("$PYTHON" -m)
    chat_options=(--chat.conversations 16000 "${chat_options[@]}")
fi

runs=("${attentions[@]/#/d${depth}_}")

step "check options, GPUs and disk" "$PYTHON" -m scripts.preflight "$config" "${train_options[@]}" "${chat_options[@]}"
if [ "$gpus" -gt 0 ]; then
    step "count" "$PYTHON" -m scripts.cost --config "$config"
    step "estimate the hours of training" "$PYTHON" -m scripts.estimate "$config" --all "${train_options[@]}"
fi
step "train the tokenizer" "$PYTHON" -m scripts.tok_train "$config" "${data_options[@]}"
if [ "$gpus" -gt 0 ]; then
    # Training reads the first shards while the later ones are made. Without a GPU both would need the same few cores.
    echo "== $data_step, in the background: $data_log"
    mkdir -p "$GKACHAT_HOME"
    : > "$data_log"  # both streams append: neither overwrites what the other wrote
    nice "$PYTHON" -m scripts.data_prep "$config" "${data_options[@]}" >> "$data_log" 2> >(tee -a "$data_log" >&2) &
    data_job=$!
    until grep -qs '^train_00000 ' "$data_log"; do check_data; [ -n "$data_job" ] || break; sleep 0.2; done
else
    step "$data_step" "$PYTHON" -m scripts.data_prep "$config" "${data_options[@]}"
fi
each_run train train
check_data wait
each_run evaluate evaluate
[ "$gpus" = 0 ] || each_run "score on CORE" score
step "compare" "$PYTHON" -m scripts.compare "${runs[@]}"
each_run "tune on conversations" tune
each_run "ask sums and letter counts" ask

[ "$GKACHAT_HOME" = "$HOME/.cache/gkachat" ] && prefix= || prefix="GKACHAT_HOME=$(printf %q "$GKACHAT_HOME") "
chat="  $prefix$(printf %q "$PYTHON") -m scripts.chat_cli"
echo
echo "Minutes and seconds by step:"
took "in all" "$SECONDS"
printf '%s\n' "${minutes[@]}"
echo
echo "Talk to them, one at a time or two side by side:"
for run in "${runs[@]}"; do echo "$chat ${run}_chat"; done
echo "$chat ${runs[0]}_chat --compare ${runs[2]}_chat"
