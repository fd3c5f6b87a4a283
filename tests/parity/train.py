"""Train nanochat's own model and optimizer on our batches, or ours from nanochat's weights: the level's witness.

git clone https://github.com/karpathy/nanochat && git -C nanochat checkout 92d63d4
python tests/parity/train.py nanochat configs/laptop.toml --run.seed 42
python tests/parity/train.py nanochat configs/laptop.toml --run.seed 42 --ours
python tests/parity/train.py nanochat configs/level_d4.toml --run.compile true --train.baseline_tokens 2000000
python tests/parity/train.py nanochat configs/laptop.toml --time eager

The corpus and its tokenizer must exist (scripts.tok_train, scripts.data_prep). Batches, schedules, learning rates and
the evaluation are those of scripts.base_train with the same config. The initial weights are nanochat's in both cases,
since the luck of initial weights moves the result more than anything else does. Model, optimizer and the precision of
each are nanochat's, or ours. `--time` takes turns between whole steps of both. results/level.md has the figures.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from gkachat.benchmark import benchmark
from gkachat.config import Config, home
from gkachat.config_file import load_config
from gkachat.data.loader import Loader, val_batches
from gkachat.data.shards import Split
from gkachat.eval.bpb import evaluate_bpb
from gkachat.machine import pick_device, pick_dtype
from gkachat.model.gpt import GPT
from gkachat.tokenizer import Tokenizer
from gkachat.train.optim import make_optimizers
from gkachat.train.schedule import n_steps, resolve, set_hyperparameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanochat", type=Path, help="a checkout of nanochat")
    parser.add_argument("config", help="a config file; options of scripts.base_train may follow")
    parser.add_argument("--ours", action="store_true", help="train our model, with our optimizers, instead")
    parser.add_argument("--time", choices=["eager", "compiled"], help="only time steps of both, in turns")
    args, options = parser.parse_known_args()
    config = load_config(args.config, options)
    if args.time != "compiled" and not config.run.compile:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nanochat's optimizer compiles itself otherwise

    dtype = pick_dtype(config.run.dtype, pick_device(config.run.device))
    os.environ["NANOCHAT_DTYPE"] = str(dtype).removeprefix("torch.")  # read when nanochat is imported
    sys.path.insert(0, str(args.nanochat.resolve()))
    config = resolve(config)
    torch.manual_seed(config.run.seed)
    theirs = nanochat(config)
    ours = gkachat(config, dtype, theirs)
    if args.time:
        time_steps(config, {"nanochat": theirs, "gkachat": ours}, args.time)
    else:
        bpb = train(config, ours if args.ours else theirs)
        print(f"{'gkachat' if args.ours else 'nanochat'}, seed {config.run.seed}, {dtype}: val BPB {bpb:.4f}")


@dataclass
class Trained:
    """A model and its optimizers, whose parameter groups have their highest learning rate in "initial_lr"."""

    model: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]


def nanochat(config: Config) -> Trained:
    """Return nanochat's model and optimizer of a resolved config."""
    from nanochat.gpt import GPT, GPTConfig

    shape, optim = config.model, config.optim
    model = GPT(
        GPTConfig(
            sequence_len=shape.sequence_len, vocab_size=shape.vocab_size, n_layer=shape.depth, n_head=shape.n_head,
            n_kv_head=shape.n_head, n_embd=shape.n_embd, window_pattern=shape.window_pattern,
        )
    )  # fmt: skip
    model.init_weights()
    scale = optim.lr_scale
    width = optim.width_scale / (shape.n_embd / 768) ** -0.5  # setup_optimizer multiplies by nanochat's own
    optimizer = model.setup_optimizer(
        unembedding_lr=optim.lm_head_lr * scale * width, embedding_lr=optim.embedding_lr * scale * width,
        matrix_lr=optim.matrix_lr * scale, scalar_lr=optim.x0_lr * scale,
        weight_decay=optim.weight_decay,
    )  # fmt: skip
    return Trained(model, [optimizer])


def gkachat(config: Config, dtype: torch.dtype, theirs: Trained) -> Trained:
    """Return our model, with the weights of nanochat's, and our optimizers."""
    from tests.parity.test_parity import our_name

    model = GPT(config.model, dtype)
    model.load_state_dict({our_name(name): p.detach().float() for name, p in theirs.model.named_parameters()})
    return Trained(model, make_optimizers(model, config.optim))


def train(config: Config, trained: Trained) -> float:
    """Train, print the loss and the speed, and return bits per byte on all of val."""
    tokenizer = Tokenizer.load(home() / "tokenizer" / config.data_name)
    splits = {name: Split(home() / "tokens" / config.data_name, name, tokenizer) for name in ("train", "val")}
    T, rows = config.model.sequence_len, config.train.device_batch_size
    packing = config.data.loader
    loader = Loader(
        splits["train"], sequence_len=T, rows_per_step=config.train.total_batch_size // T, bos=tokenizer.bos,
        packing=packing, seed=config.run.seed,
    )  # fmt: skip
    model, steps, start = trained.model, n_steps(config), time.perf_counter()
    forward = torch.compile(model, dynamic=False) if config.run.compile else model
    for step in range(steps):
        # AdamW's groups of nanochat have no momentum, so that this sets what nanochat's trainer sets.
        set_hyperparameters(trained.optimizers, step, config)
        batch, n_targets, total = loader.batch(step), loader.n_targets(step), 0.0
        for inputs, targets in zip(*(t.split(rows) for t in batch), strict=True):
            loss = forward(inputs, targets) * (int((targets >= 0).sum()) / n_targets)
            loss.backward()
            total += loss.item()
        for optimizer in trained.optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if (step + 1) % config.run.log_every == 0:
            rate = (step + 1) * config.train.total_batch_size / (time.perf_counter() - start)
            print(f"step {step + 1:6d}/{steps} | loss {total:.4f} | {rate:,.0f} tok/s", flush=True)
    batches = val_batches(splits["val"], sequence_len=T, batch_rows=4, bos=tokenizer.bos, packing=packing)
    return evaluate_bpb(model, batches, tokenizer.token_bytes())


def time_steps(config: Config, contestants: dict[str, Trained], how: str) -> None:
    """Print milliseconds of a step of both, in turns."""
    T, rows = config.model.sequence_len, config.train.device_batch_size
    idx = torch.randint(config.model.vocab_size, (config.train.total_batch_size // T, T + 1))

    def stepper(trained: Trained):
        forward = torch.compile(trained.model, dynamic=False) if how == "compiled" else trained.model
        for group in (group for optimizer in trained.optimizers for group in optimizer.param_groups):
            group["lr"] = 0.0  # every step does the same work

        def step() -> None:
            for part in idx.split(rows):
                loss = forward(part[:, :-1].contiguous(), part[:, 1:].contiguous())
                (loss * (len(part) / len(idx))).backward()
            for optimizer in trained.optimizers:
                optimizer.step()
            trained.model.zero_grad(set_to_none=True)

        return step

    timings = benchmark({name: stepper(c) for name, c in contestants.items()}, torch.device("cpu"), rounds=20)
    for name, timing in timings.items():
        rate = config.train.total_batch_size / timing.median
        print(f"{name:10} {1e3 * timing.median:8.1f} ms a step, {rate:8,.0f} tokens/s")
    ratio, dtype = timings["nanochat"].median / timings["gkachat"].median, os.environ["NANOCHAT_DTYPE"]
    print(f"gkachat is {ratio:.3f} times as fast ({how}, {dtype}, {torch.get_num_threads()} threads)")


if __name__ == "__main__":
    main()
