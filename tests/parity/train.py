"""Train nanochat's own model with its own optimizer on our batches, or time its step beside ours: the outside witness.

git clone https://github.com/karpathy/nanochat && git -C nanochat checkout 92d63d4
python tests/parity/train.py nanochat configs/laptop.toml --run.seed 42
python tests/parity/train.py nanochat configs/laptop.toml --time eager

The corpus and its tokenizer must exist (scripts.tok_train, scripts.data_prep). Batches, schedules, learning rates and
the evaluation are those of scripts.base_train with the same config; weights, model, optimizer and the precision of each
are nanochat's. `--time` takes turns between whole steps of both. results/level.md has the figures.
"""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from gkachat.config import Config, home
from gkachat.config_file import load_config


def main() -> None:
    checkout, config_path, *options = sys.argv[1:]
    timed = options[options.index("--time") + 1] if "--time" in options else None
    if timed:
        at = options.index("--time")
        del options[at : at + 2]
    if timed == "eager":
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nanochat's optimizer compiles itself otherwise
    config = load_config(config_path, options)

    import torch

    from gkachat.machine import pick_device, pick_dtype
    from gkachat.train.schedule import resolve

    dtype = pick_dtype(config.run.dtype, pick_device(config.run.device))
    os.environ["NANOCHAT_DTYPE"] = str(dtype).removeprefix("torch.")
    sys.path.insert(0, str(Path(checkout).resolve()))
    config = resolve(config)
    torch.manual_seed(config.run.seed)
    if timed:
        time_steps(config, dtype, compiled=timed == "compiled")
    else:
        train(config)


def nanochat(config: Config):
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
    return model, optimizer


def train(config: Config) -> None:
    """Train, and print the loss, the time and bits per byte on all of val."""
    import torch

    from gkachat.data.loader import Loader, val_batches
    from gkachat.data.shards import Split
    from gkachat.eval.bpb import evaluate_bpb
    from gkachat.tokenizer import Tokenizer
    from gkachat.train.schedule import decay_multiplier, lr_multiplier, muon_momentum, n_steps

    tokenizer = Tokenizer.load(home() / "tokenizer" / config.data_name)
    splits = {name: Split(home() / "tokens" / config.data_name, name, tokenizer) for name in ("train", "val")}
    T, rows = config.model.sequence_len, config.train.device_batch_size
    loader = Loader(
        splits["train"], sequence_len=T, rows_per_step=config.train.total_batch_size // T, bos=tokenizer.bos,
        packing=config.data.loader, seed=config.run.seed,
    )  # fmt: skip
    model, optimizer = nanochat(config)
    steps, start = n_steps(config), time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier(step, config)
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum(step, config)
                group["weight_decay"] = config.optim.weight_decay * decay_multiplier(step, config)
        batch, n_targets, total = loader.batch(step), loader.n_targets(step), 0.0
        for inputs, targets in zip(*(t.split(rows) for t in batch), strict=True):
            loss = model(inputs, targets) * (int((targets >= 0).sum()) / n_targets)
            loss.backward()
            total += loss.item()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        if (step + 1) % config.run.log_every == 0:
            seconds = time.perf_counter() - start
            rate = (step + 1) * config.train.total_batch_size / seconds
            print(f"step {step + 1:6d}/{steps} | loss {total:.4f} | {rate:,.0f} tok/s", flush=True)
    batches = val_batches(splits["val"], sequence_len=T, batch_rows=4, bos=tokenizer.bos, packing=config.data.loader)
    with torch.no_grad():
        bpb = evaluate_bpb(model, batches, tokenizer.token_bytes())
    print(f"nanochat, seed {config.run.seed}, {os.environ['NANOCHAT_DTYPE']}: val BPB {bpb:.4f}")


def time_steps(config: Config, dtype, compiled: bool) -> None:
    """Print milliseconds of a step of both, in turns."""
    import torch

    from gkachat.benchmark import benchmark
    from gkachat.model.gpt import GPT
    from gkachat.train.optim import make_optimizers

    theirs, optimizer = nanochat(config)
    ours = GPT(config.model, dtype)
    contestants = {
        "nanochat": SimpleNamespace(model=theirs, optimizers=[optimizer]),
        "gkachat": SimpleNamespace(model=ours, optimizers=make_optimizers(ours, config.optim)),
    }
    T, rows = config.model.sequence_len, config.train.device_batch_size
    idx = torch.randint(config.model.vocab_size, (config.train.total_batch_size // T, T + 1))

    def stepper(c):
        forward = torch.compile(c.model, dynamic=False) if compiled else c.model
        for group in (group for optimizer in c.optimizers for group in optimizer.param_groups):
            group["lr"] = 0.0  # every step does the same work

        def step() -> None:
            for part in idx.split(rows):
                (forward(part[:, :-1].contiguous(), part[:, 1:].contiguous()) / len(idx)).backward()
            for optimizer in c.optimizers:
                optimizer.step()
            c.model.zero_grad(set_to_none=True)

        return step

    timings = benchmark({name: stepper(c) for name, c in contestants.items()}, torch.device("cpu"), rounds=20)
    for name, timing in timings.items():
        rate = config.train.total_batch_size / timing.median
        print(f"{name:10} {1e3 * timing.median:8.1f} ms a step, {rate:8,.0f} tokens/s")
    ratio = timings["nanochat"].median / timings["gkachat"].median
    how = "compiled" if compiled else "eager"
    print(f"gkachat is {ratio:.3f} times as fast ({how}, {dtype}, {torch.get_num_threads()} threads)")


if __name__ == "__main__":
    main()
