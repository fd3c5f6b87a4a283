"""Hours that configs train on 1, 4 and 8 devices like this one, from 20 timed steps of each; leaves nothing behind.

python -m scripts.estimate configs/d20_softmax.toml configs/d20_gka.toml --train.protocol paper

A step is so many passes over a device's batch, shared out, and one of the optimizers: steps of one pass and of two tell
the two apart. What devices say to each other, evaluation and compiling are not counted.
"""

import statistics
import sys
import time
from typing import Any

from gkachat.benchmark import table
from gkachat.config import Config
from gkachat.config_file import load_config
from scripts.cli import print_help, run

WARM_UP, STEPS, DEVICES = 4, 20, (1, 4, 8)
COLUMNS = {
    "": "{name}", "parameters": "{params:,}", "steps": "{steps:,}", "FLOPs": "{flops:.3e}", "a pass": "{a_pass:.4g} s",
    "optimizers": "{optimizers:.4g} s", "tokens/s of one": "{rate:,.0f}",
    **{f"hours on {n}": f"{{hours[{n}]:.3g}}" for n in DEVICES},
}  # fmt: skip


class RandomTokens:
    """A training task of random tokens whose steps take one pass over a device's batch and two, by turns."""

    def __init__(self, idx: Any, rows: int):
        self.idx, self.rows = idx, rows

    def batch(self, step: int) -> tuple[tuple[Any, Any], int]:
        idx = self.idx[: (1 + step % 2) * self.rows]
        return (idx, idx.roll(-1, 1)), idx.numel()


def estimate(config: Config) -> dict:
    """Time steps on random tokens, with the run's model, optimizers and batch of a device."""
    import torch

    from gkachat.machine import pick_device
    from gkachat.model.gpt import GPT
    from gkachat.model.stats import model_stats
    from gkachat.train.distributed import World
    from gkachat.train.optim import make_optimizers
    from gkachat.train.schedule import n_steps, resolve
    from gkachat.train.setup import build_model
    from gkachat.train.trainer import Trainer

    config, device = resolve(config), pick_device(config.run.device)
    train, T, counted = config.train, config.model.sequence_len, model_stats(config.model)
    model, rows = build_model(GPT, config, device), train.total_batch_size // T
    trainer = Trainer(config, model, make_optimizers(model, config.optim), None, device, World())
    of_a_pass = min(trainer.device_batch_size, rows)
    trainer.task = RandomTokens(torch.randint(config.model.vocab_size, (2 * of_a_pass, T)), of_a_pass)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for step in range(WARM_UP + STEPS):  # the first compile kernels and allocate memory
        start = time.perf_counter()
        trainer.train_step()
        list(trainer.step_results(wait=True))
        if step >= WARM_UP:
            seconds[1 + step % 2].append(time.perf_counter() - start)
    one, two = (statistics.median(seconds[passes]) for passes in (1, 2))
    a_pass = max(two - one, one / 2)  # where steps are too short to tell, no more than half is the optimizers'
    optimizers = max(0.0, one - a_pass)
    steps, passes = n_steps(config), rows / of_a_pass
    tokens = steps * train.total_batch_size
    hours = {n: steps * (passes / n * a_pass + optimizers) / 3600 for n in DEVICES}
    return {
        "name": config.run_name, "params": counted.params["total"], "steps": steps, "a_pass": a_pass,
        "flops": tokens * counted.flops_per_token, "optimizers": optimizers, "rate": tokens / hours[1] / 3600,
        "hours": hours,
    }  # fmt: skip


def main() -> None:
    words = sys.argv[1:]
    n = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    paths, overrides = words[:n], words[n:]
    if {"-h", "--help"} & set(overrides):
        print_help("CONFIG.toml ...", Config(), __doc__, {})
    if not paths:
        raise ValueError("given no config, expected one or more, as in python -m scripts.estimate configs/laptop.toml")
    configs = [load_config(path, overrides) for path in paths]  # all are right before any is timed
    rows = [estimate(config) for config in configs]
    hours = {n: sum(row["hours"][n] for row in rows) for n in DEVICES}
    total = [dict.fromkeys(rows[0]) | {"name": "all", "steps": sum(row["steps"] for row in rows), "hours": hours}]
    print(table(rows + total[: len(rows) - 1], COLUMNS))
    for row in rows[1:]:
        params, flops = (row[key] / rows[0][key] for key in ("params", "flops"))
        print(
            f"{row['name']} over {rows[0]['name']}: {params:.4f} of the parameters, {flops:.4f} of the FLOPs, counted"
        )


if __name__ == "__main__":
    run(main)
