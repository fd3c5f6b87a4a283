"""Train a model from scratch.

python -m scripts.base_train configs/laptop.toml --model.attention gka
torchrun --standalone --nproc_per_node=8 -m scripts.base_train configs/d20.toml --model.attention gka
"""

import sys

from scripts.cli import RUN_FLAGS, parse_config, run


def main() -> None:
    config, flags = parse_config(sys.argv[1:], __doc__, RUN_FLAGS)
    from gkachat.config import home
    from gkachat.data.shards import Split, check_source
    from gkachat.data.sources import source_options
    from gkachat.eval.bpb import bpb_sums
    from gkachat.machine import pick_device
    from gkachat.model.gpt import GPT
    from gkachat.tokenizer import Tokenizer
    from gkachat.train.distributed import destroy_process_group, init_process_group
    from gkachat.train.language import LanguageTask
    from gkachat.train.optim import make_optimizers
    from gkachat.train.schedule import resolve
    from gkachat.train.setup import build_model, keep_batch, open_run
    from gkachat.train.trainer import Trainer

    device = pick_device(config.run.device)
    world = init_process_group(device.type, config.run.timeout)
    config = resolve(keep_batch(config, "resume" in flags), world.size)
    run_dir = open_run(config, world, resume="resume" in flags, overwrite="overwrite" in flags)

    tokenizer = Tokenizer.load(home() / "tokenizer" / config.data_name)
    tokens_dir = home() / "tokens" / config.data_name
    check_source(tokens_dir, source_options(config.data))
    patience = config.run.timeout / 2  # for shards that are still being made; the watchdog waits longer
    train, val = (Split(tokens_dir, split, tokenizer, timeout=patience) for split in ("train", "val"))
    task = LanguageTask(config, tokenizer, train, val, bpb_sums=bpb_sums, device=device, world=world)

    model = build_model(GPT, config, device)
    optimizers = make_optimizers(model, config.optim, world)
    Trainer(config, model, optimizers, task, device, world).fit(run_dir)
    destroy_process_group()


if __name__ == "__main__":
    run(main)
