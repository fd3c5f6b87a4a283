"""Training steps that scripts.bench_step times against each other."""

from collections.abc import Callable

import torch

from gkachat.benchmark import Timing
from gkachat.config import Config, GPTConfig
from gkachat.model.gpt import GPT
from gkachat.model.stats import model_stats
from gkachat.train.optim import make_optimizers
from gkachat.train.schedule import resolve


def training_step(
    config: GPTConfig, batch: int, device: torch.device, dtype: torch.dtype, compiled: bool
) -> tuple[Callable[[], None], GPT]:
    """Return a step on random tokens, and its model. The learning rate is 0, so that every step does the same work."""
    torch.manual_seed(0)
    with device:
        model = GPT(config, dtype)
        idx = torch.randint(config.vocab_size, (batch, config.sequence_len))
    optimizers = make_optimizers(model, resolve(Config(model=config)).optim)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step() -> None:
        forward(idx, idx.roll(-1, 1)).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

    return step, model


def step_rows(timings: dict[str, Timing], models: dict[str, GPT], tokens: int, peak: float) -> list[dict]:
    """Return a row of the table for each model. `tokens` is those of a step; MFU is relative to `peak` FLOP/s."""
    return [
        {
            "name": name, "step_ms": 1e3 * timing.median, "low_ms": 1e3 * timing.low, "high_ms": 1e3 * timing.high,
            "tokens_per_second": tokens / timing.median,
            "speed_over_softmax": timings["softmax"].median / timing.median,
            "mfu": tokens / timing.median * model_stats(models[name].config).flops_per_token / peak,
            "peak_mib": timing.peak_mib, "backends": models[name].kernels(),
        }
        for name, timing in timings.items()
    ]  # fmt: skip


COLUMNS = {
    "": "{name}",
    "step ms (low to high)": "{step_ms:.1f} ({low_ms:.1f} to {high_ms:.1f})",
    "tokens/s": "{tokens_per_second:,.0f}",
    "speed over softmax": "{speed_over_softmax:.3f}",
    "MFU": "{mfu:.2f}",
    "peak MiB": "{peak_mib:,.0f}",
}
