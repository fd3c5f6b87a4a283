"""Take two training steps of configs/d20.toml with one attention: python tests/nullgpu/peak.py gka [--option ...]

Each step is one pass over the configured rows, compiled as in training. The second step holds weights, optimizer state,
gradients and activations at once. On the null GPU, the peak is in the process's report.
"""

import sys

import torch

from gkachat.config_file import load_config
from gkachat.machine import pick_device
from gkachat.model.gpt import GPT
from gkachat.train.distributed import World
from gkachat.train.optim import make_optimizers
from gkachat.train.schedule import resolve
from gkachat.train.setup import build_model
from gkachat.train.trainer import Trainer


class OnePass:
    """A task whose every step is one pass over the configured rows, of random tokens."""

    def __init__(self, rows: int, sequence_len: int):
        self.idx = torch.randint(1000, (rows, sequence_len)).pin_memory()

    def batch(self, step: int) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
        return (self.idx, self.idx), self.idx.numel()


def main() -> None:
    attention, *options = sys.argv[1:]
    config = resolve(load_config("configs/d20.toml", [f"--model.attention={attention}", *options]))
    device = pick_device("cuda")
    model = build_model(GPT, config, device)
    task = OnePass(config.train.device_batch_size, config.model.sequence_len)
    trainer = Trainer(config, model, make_optimizers(model, config.optim), task, device, World())
    for _ in range(2):
        trainer.train_step()
        trainer.check_steps(wait=True)
    print(f"{attention}, depth {config.model.depth}, {config.train.device_batch_size} rows")


if __name__ == "__main__":
    main()
