"""Estimate the hours of training on 1, 4 and 8 devices like this one, from 20 timed steps. Writes no files.

python -m scripts.estimate configs/d20.toml --model.attention gka
python -m scripts.estimate configs/d20.toml --all --train.protocol paper

A step consists of passes over a device's batch, which devices share, and an optimizer step, which they do not. Steps
with one and with two passes tell the two times apart. Communication, evaluation and compilation are not counted.
"""

import dataclasses
import statistics
import sys
import time

from gkachat.config import ATTENTIONS, Config
from scripts.cli import parse_config, run

STEPS, WARMUP, DEVICES = 20, 4, (1, 4, 8)
COLUMNS = {
    "": "{name}", "parameters": "{params:,}", "steps": "{steps:,}", "FLOPs": "{flops:.3e}",
    "a pass": "{pass_seconds:.4g} s", "optimizers": "{optimizer_seconds:.4g} s", "tokens/s of one": "{rate:,.0f}",
    **{f"hours on {n}": f"{{hours[{n}]:.3g}}" for n in DEVICES},
}  # fmt: skip


def estimate(config: Config) -> dict:
    """Time steps on random tokens, with the run's model, optimizers and device batch. Return a row for COLUMNS."""
    import torch

    from gkachat.machine import pick_device
    from gkachat.model.gpt import GPT
    from gkachat.model.stats import model_stats
    from gkachat.train.distributed import World
    from gkachat.train.optim import make_optimizers
    from gkachat.train.schedule import n_steps, resolve
    from gkachat.train.setup import build_model
    from gkachat.train.trainer import Trainer

    class RandomTokens:
        """A task of random tokens whose even steps have one pass, and whose odd steps have two."""

        def batch(self, step: int) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
            idx, targets = (t[: (1 + step % 2) * pass_rows] for t in (tokens, next_tokens))
            return (idx, targets), idx.numel()

    config, device = resolve(config), pick_device(config.run.device)
    model = build_model(GPT, config, device)
    trainer = Trainer(config, model, make_optimizers(model, config.optim), RandomTokens(), device, World())
    rows = config.train.total_batch_size // config.model.sequence_len
    pass_rows = min(trainer.device_batch_size, rows)
    shape, pinned = (2 * pass_rows, model.config.sequence_len), device.type == "cuda"  # as the loader's batches are
    tokens, next_tokens = (torch.randint(model.config.vocab_size, shape, pin_memory=pinned) for _ in range(2))
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for step in range(WARMUP + STEPS):
        start = time.perf_counter()
        trainer.train_step()
        trainer.check_steps(wait=True)
        if step >= WARMUP:
            seconds[1 + step % 2].append(time.perf_counter() - start)
    one, two = (statistics.median(seconds[passes]) for passes in (1, 2))
    pass_seconds = max(two - one, one / 2)  # if steps are too short to tell, optimizers get no more than half
    optimizer_seconds = max(0.0, one - pass_seconds)
    steps, tokens = n_steps(config), n_steps(config) * config.train.total_batch_size
    hours = {n: steps * (rows / pass_rows / n * pass_seconds + optimizer_seconds) / 3600 for n in DEVICES}
    stats = model_stats(config.model)
    return {
        "name": config.run_name, "params": stats.params["total"], "steps": steps, "rate": tokens / hours[1] / 3600,
        "flops": tokens * stats.flops_per_token, "hours": hours,
        "pass_seconds": pass_seconds, "optimizer_seconds": optimizer_seconds,
    }  # fmt: skip


def main() -> None:
    config, flags = parse_config(sys.argv[1:], __doc__, {"all": "Estimate every attention, and their sum."})
    from gkachat.benchmark import show, table

    names = list(ATTENTIONS) if "all" in flags else [config.model.attention]
    models = [dataclasses.replace(config.model, attention=name) for name in names]
    rows = [estimate(dataclasses.replace(config, model=model)) for model in models]
    hours = {n: sum(row["hours"][n] for row in rows) for n in DEVICES}
    total = dict.fromkeys(rows[0]) | {"name": "all", "steps": sum(row["steps"] for row in rows), "hours": hours}
    show(table([*rows, total] if len(rows) > 1 else rows, COLUMNS))
    for row in rows[1:]:
        params, flops = (row[key] / rows[0][key] for key in ("params", "flops"))
        print(f"{row['name']} to {rows[0]['name']}: {params:.4f} of the parameters, {flops:.4f} of the FLOPs, counted")


if __name__ == "__main__":
    run(main)
