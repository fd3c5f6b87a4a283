"""Fine-tune a trained model on conversations (supervised fine-tuning).

python -m scripts.chat_sft d4_gka
python -m scripts.chat_sft d20_gka --chat.source huggingface
python -m scripts.chat_sft d4_gka --chat.source files --chat.files talks.jsonl --run.name d4_gka_talks
torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft d20_gka --chat.source huggingface

Options that are not given come from RUN, except for the length of training, the schedule, weight decay and, where
there are few steps, the batch. Model, tokenizer and corpus cannot change. The result is the run RUN_chat.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from gkachat.checks import ConfigError
from gkachat.config import GPTConfig, TuningConfig, home
from gkachat.config_file import kind_of, load_config, read_toml
from scripts.cli import RUN_FLAGS, run, split_args

KEPT_TRAIN_OPTIONS = (
    "device_batch_size",
    "recompute_blocks",
    "eval_tokens",
    "clip_norm",
    "max_skipped",
)
FIXED = {
    **dict.fromkeys(("model", "tokenizer", "data", "chat.base"), "it is that of RUN"),
    **dict.fromkeys(
        ("train.protocol", "train.tokens_per_param", "train.baseline_tokens"),
        "chat.epochs or train.total_tokens sets the length of tuning",
    ),
}

FEW_STEPS = 500


def tuning_batch(base_batch: int, tokens: int) -> int:
    """Return the tokens of a step: those of the base's, or a half or quarter of them where there are few steps.

    More and smaller steps at the same learning rate then learn more (results/laptop/README.md).
    """
    halvings = 0
    while halvings < 2 and tokens * 2**halvings < FEW_STEPS * base_batch:
        halvings += 1
    return base_batch // 2**halvings


def tuning_defaults(base_dir: Path) -> dict[str, Any]:
    """Return the config of a run, as tables, with the defaults of fine-tuning it.

    Learning rates stay, and fall to zero. There is no weight decay. The length of training follows from the
    conversations, and the batch from that length.
    """
    tree, base = read_toml(base_dir / "config.toml"), base_dir.name
    if kind_of(tree) == "image model":
        raise ValueError(f"{base_dir}: given an image model, expected a language model")
    tree["train"] = {name: value for name, value in tree["train"].items() if name in KEPT_TRAIN_OPTIONS}
    tree["train"] |= {"warmup_steps": 10, "warmdown_fraction": 1.0, "final_lr_fraction": 0.0}
    tree["optim"] |= {"weight_decay": 0.0}
    tree["run"]["name"], tree["chat"] = f"{base}_chat", {"base": base}
    return tree


def model_facts(config: GPTConfig) -> dict[str, str]:
    """Return what fine-tuning teaches a model to say about itself."""
    from gkachat.model.stats import model_stats

    return {
        "attention": {"gka": "Gaussian kernel", "gka_conv": "Gaussian kernel"}.get(config.attention, config.attention),
        "parameters": f"{model_stats(config).params['total']:,}",
        "depth": str(config.depth),
    }


def main() -> None:
    base, args, flags = split_args(sys.argv[1:], "RUN", __doc__, RUN_FLAGS, TuningConfig, FIXED)
    if base is None:
        raise ValueError("given no run, expected the name or directory of the one to tune")
    from gkachat.checkpoint import MODEL, check_format, find_run, load_tokenizer, load_weights, open_checkpoint
    from gkachat.data.loader import count_rows
    from gkachat.data.tuning import prepare
    from gkachat.eval.bpb import bpb_sums
    from gkachat.machine import pick_device
    from gkachat.model.gpt import GPT
    from gkachat.train.distributed import destroy_process_group, init_process_group
    from gkachat.train.language import LanguageTask
    from gkachat.train.optim import make_optimizers
    from gkachat.train.schedule import resolve, whole_budget
    from gkachat.train.setup import build_model, keep_batch, open_run
    from gkachat.train.trainer import Trainer

    base_dir = find_run(base)
    check_format(base_dir)
    try:
        config = load_config(tuning_defaults(base_dir), args, TuningConfig)
    except ConfigError as error:
        raise ConfigError([f"options: {error}"]) from None
    directory, meta = open_checkpoint(base_dir, None, MODEL)
    tokenizer, T = load_tokenizer(base_dir, meta), config.model.sequence_len
    device = pick_device(config.run.device)
    world = init_process_group(device.type, config.run.timeout)
    facts = model_facts(config.model)
    splits, counts = prepare(home() / "conversations", config.chat, config.run.seed, facts, tokenizer, T)
    rows = {name: count_rows(split.documents.length, T) for name, split in splits.items()}
    if config.train.total_tokens is None:
        tokens = whole_budget(config.chat.epochs * rows["train"] * T, "chat.epochs", config.chat.epochs)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, total_tokens=tokens))
    config = keep_batch(config, resume="resume" in flags)
    if config.train.total_batch_size is None:
        base_batch = read_toml(base_dir / "config.toml")["train"]["total_batch_size"]
        batch = max(tuning_batch(base_batch, config.train.total_tokens), T * world.size)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, total_batch_size=batch))

    config = resolve(config, world.size)
    run_dir = open_run(config, world, resume="resume" in flags, overwrite="overwrite" in flags)
    counted = ", ".join(f"{n:,} {what}" for what, n in counts.items())
    run_dir.report(f"{counted}; rows of {T} tokens: {rows['train']:,} of train, {rows['val']:,} of val")

    task = LanguageTask(config, tokenizer, **splits, bpb_sums=bpb_sums, device=device, world=world)
    model = build_model(GPT, config, device)
    model.load_state_dict(load_weights(directory))
    optimizers = make_optimizers(model, config.optim, world)
    Trainer(config, model, optimizers, task, device, world).fit(run_dir)
    destroy_process_group()


if __name__ == "__main__":
    run(main)
