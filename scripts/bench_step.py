"""Time whole training steps (forward, backward, optimizers) of models that differ only in their attention.

python -m scripts.bench_step --depth 4 --tokens 512 --batch 4
python -m scripts.bench_step --depth 20 --tokens 2048 --batch 16 --compile --out results/h200_step
"""

from gkachat.config import GKAConfig, GPTConfig
from scripts.cli import benchmark_parser, parse_benchmark, positive, run

VARIANTS = {
    "softmax": {},
    "softmax, short_conv": {"short_conv": True, "attention_x0": True},
    "gka": {"attention": "gka"},
    "gka normalised": {"attention": "gka", "gka": GKAConfig(normalize=True)},
    "gka_conv": {"attention": "gka_conv"},
}


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--depth", type=positive, default=4, help="layers")
    parser.add_argument("--batch", type=positive, default=4, help="rows of a step")
    parser.add_argument("--tokens", type=positive, default=512, help="tokens of a row")
    parser.add_argument("--vocab-size", type=positive, default=32_768, help="tokens in the vocabulary")
    parser.add_argument("--window-pattern", default="SSSL", help="a letter per layer: S for short, L for all tokens")
    options, device, dtype = parse_benchmark(parser)
    from gkachat.benchmark import benchmark, measured_peaks, publish, table
    from gkachat.machine import device_name, peak_flops
    from scripts.bench.step import COLUMNS, step_rows, training_step

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
