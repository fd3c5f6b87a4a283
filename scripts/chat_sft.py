"""Tune a trained model on conversations (supervised fine-tuning).

python -m scripts.chat_sft d4_gka
python -m scripts.chat_sft d20_gka --chat.source huggingface
python -m scripts.chat_sft d4_gka --chat.source files --chat.files talks.jsonl --run.name d4_gka_talks
torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft d20_gka --chat.source huggingface

What is not given is the RUN's own; the result is the run RUN_chat.
"""

import dataclasses
import os
import sys
from functools import partial

from gkachat.config import ConfigError, TuningConfig
from gkachat.config_file import load_config
from scripts.cli import RUN_FLAGS, check_flags, run, split_args


def main() -> None:
    base, args, flags = split_args(sys.argv[1:], "RUN", __doc__, RUN_FLAGS, TuningConfig)
    if base is None:
        raise ValueError("given no run, expected the name or directory of the one to tune")
    check_flags(flags)
    from gkachat.checkpoint import MODEL, find_run, load_tokenizer, load_weights, open_checkpoint  # torch takes seconds
    from gkachat.data.conversations import load_conversations, tokenize_conversations
    from gkachat.data.loader import count_rows
    from gkachat.train import schedule
    from gkachat.train.trainer import Start, Trainer

    base_dir = find_run(base)
    try:
        config = load_config(base_dir / "config.toml", args, TuningConfig, partial(schedule.tuning, base=base_dir.name))
    except ConfigError as error:
        raise ConfigError([f"options: {error}"]) from None
    directory, meta = open_checkpoint(base_dir, None, MODEL)
    tokenizer, T = load_tokenizer(base_dir, meta), config.model.sequence_len
    found = load_conversations(config.chat, config.run.seed, schedule.facts_of(config.model))
    splits, counts = tokenize_conversations(found, tokenizer, T, config.chat.val_fraction)
    rows = {name: count_rows(split.documents.length, T) for name, split in splits.items()}
    if config.train.total_tokens is None:
        tokens = max(1, round(config.chat.epochs * rows["train"] * T))
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, total_tokens=tokens))
    if int(os.environ.get("RANK", 0)) == 0:
        counted = ", ".join(f"{n:,} {what}" for what, n in counts.items())
        print(f"{counted}; rows of {T} tokens: {rows['train']:,} of train, {rows['val']:,} of val")
    start = Start(tokenizer, load_weights(directory), splits["train"], splits["val"])
    trainer = Trainer(config, resume="resume" in flags, overwrite="overwrite" in flags, start=start)
    trainer.run()


if __name__ == "__main__":
    run(main)
