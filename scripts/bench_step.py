"""Time whole training steps (forward, backward, optimizers) of models that differ only in their attention.

python -m scripts.bench_step --depth 4 --tokens 512 --batch 4
python -m scripts.bench_step --depth 20 --tokens 2048 --batch 16 --compile --out results/h200_step
"""

from collections.abc import Callable

import torch

from gkachat.benchmark import (
    Timing,
    benchmark,
    benchmark_parser,
    measured_peaks,
    parse_benchmark,
    positive,
    publish,
    table,
)
from gkachat.config import Config, GKAConfig, GPTConfig
from gkachat.machine import device_name, peak_flops
from gkachat.model.gpt import GPT
from gkachat.model.stats import model_stats
from gkachat.train.optim import make_optimizers
from gkachat.train.schedule import resolve
from scripts.cli import run

VARIANTS = {
    "softmax": {},
    "softmax, short_conv": {"short_conv": True},
    "gka": {"attention": "gka"},
    "gka normalised": {"attention": "gka", "gka": GKAConfig(normalize=True)},
    "gka_plus": {"attention": "gka_plus"},
}


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


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--depth", type=positive, default=4, help="layers")
    parser.add_argument("--batch", type=positive, default=4, help="rows of a step")
    parser.add_argument("--tokens", type=positive, default=512, help="tokens of a row")
    parser.add_argument("--vocab-size", type=positive, default=32_768, help="tokens in the vocabulary")
    parser.add_argument("--window-pattern", default="SSSL", help="a letter per layer: S for short, L for all tokens")
    options, device, dtype = parse_benchmark(parser)
    steps, models = {}, {}
    for name, variant in VARIANTS.items():
        config = GPTConfig(
            depth=options.depth, sequence_len=options.tokens, vocab_size=options.vocab_size,
            window_pattern=options.window_pattern, **variant,
        )  # fmt: skip
        steps[name], models[name] = training_step(config, options.batch, device, dtype, options.compile)
        for line in models[name].kernel_lines():
            print(f"{name}, {line}")
    timings = benchmark(steps, device, options.rounds)
    peak = peak_flops(device_name(device)) or measured_peaks(device, dtype)[0]
    rows = step_rows(timings, models, options.batch * options.tokens, peak)
    print(f"MFU is relative to {peak / 1e12:.3g} TFLOP/s")
    result = {"dtype": str(dtype), "mfu_of_flops_per_second": peak, "rows": rows}
    publish("Training steps, timed", result, table(rows, COLUMNS), device, options.out)


if __name__ == "__main__":
    run(main)
