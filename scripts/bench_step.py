"""Time a whole training step, forward, backward and optimizers, of the softmax and the GKA models of one shape.

python -m scripts.bench_step --depth 4 --tokens 512 --batch 4
python -m scripts.bench_step --depth 20 --tokens 2048 --batch 16 --compile --out results/h200_step
"""

import argparse
import sys
from collections.abc import Callable

import torch

from gkachat.bench import contest, facts, markdown_table, measured_peaks, write_results
from gkachat.config import Config, GKAConfig, GPTConfig
from gkachat.cost import account
from gkachat.gpt import GPT
from gkachat.machine import device_name, peak_flops, pick_device, pick_dtype
from gkachat.train.optim import Optimizers
from gkachat.train.recipe import resolve
from scripts.cli import benchmark_parser, run

VARIANTS = {
    "softmax": ("softmax", GKAConfig()),
    "gka": ("gka", GKAConfig()),
    "gka normalised": ("gka", GKAConfig(normalize=True)),
}


def training_step(config: GPTConfig, batch: int, device, dtype, compiled: bool) -> tuple[Callable[[], None], GPT]:
    """A step on random tokens, learning rate 0: every repetition does the same work."""
    torch.manual_seed(0)
    with device:
        model = GPT(config, dtype)
        idx = torch.randint(config.vocab_size, (batch, config.sequence_len))
    optimizers = Optimizers(model, resolve(Config(model=config)).optim)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step() -> None:
        forward(idx, idx.roll(-1, 1)).backward()
        optimizers.step(0.0, 0.95)

    return step, model


def main() -> None:
    options = parse(sys.argv[1:])
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    steps, models, configs = {}, {}, {}
    for name, (attention, gka) in VARIANTS.items():
        configs[name] = GPTConfig(
            depth=options.depth, attention=attention, sequence_len=options.tokens, vocab_size=options.vocab_size,
            window_pattern=options.window_pattern, gka=gka,
        )  # fmt: skip
        steps[name], models[name] = training_step(configs[name], options.batch, device, dtype, options.compile)
    for name, model in models.items():
        for why, layers in model.backends().items():
            print(f"{name}, layers {', '.join(map(str, layers))}: {why}")
    timings = contest(steps, device, options.rounds)
    flops_per_second, _ = measured_peaks(device, dtype)
    peak = peak_flops(device_name(device)) or flops_per_second
    rows = []
    for name, timing in timings.items():
        tokens = options.batch * options.tokens
        rows.append(
            {
                "name": name, "step_ms": 1e3 * timing.median, "low_ms": 1e3 * timing.low, "high_ms": 1e3 * timing.high,
                "tokens_per_second": tokens / timing.median,
                "speed_over_softmax": timings["softmax"].median / timing.median,
                "mfu": tokens / timing.median * account(configs[name]).flops_per_token / peak,
                "peak_bytes": timing.peak_bytes, "backends": models[name].backends(),
            }
        )  # fmt: skip
    result = {"facts": facts(device), "dtype": str(dtype), "mfu_of_flops_per_second": peak, "rows": rows}
    print("\n" + table(rows))
    print(f"MFU is of {peak / 1e12:.3g} TFLOP/s; {result['facts']}")
    if options.out:
        write_results(
            options.out, "Training steps, timed", "python -m scripts.bench_step " + " ".join(sys.argv[1:]), result,
            table(rows),
        )  # fmt: skip


def table(rows: list[dict]) -> str:
    header = ["", "step ms (low to high)", "tokens/s", "speed over softmax", "MFU"]
    lines = [
        [
            r["name"], f"{r['step_ms']:.1f} ({r['low_ms']:.1f} to {r['high_ms']:.1f})",
            f"{r['tokens_per_second']:,.0f}", f"{r['speed_over_softmax']:.3f}", f"{r['mfu']:.2f}",
            *([f"{r['peak_bytes'] / 2**20:,.0f}"] if r["peak_bytes"] is not None else []),
        ]
        for r in rows
    ]  # fmt: skip
    return markdown_table(header + ["peak MiB"] * (len(lines[0]) - len(header)), lines)


def parse(args: list[str]) -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--compile", action="store_true", help="torch.compile the contestants")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--tokens", type=int, default=512, help="of a row")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--window-pattern", default="SSSL")
    options = parser.parse_args(args)
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


if __name__ == "__main__":
    run(main)
