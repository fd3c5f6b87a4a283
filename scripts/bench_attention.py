"""Time the attention operator and the attention layer: softmax, GKA, GKA on normalised features, naive GKA.

On a GPU, the operator runs on other kernels too: FlexAttention with the bias per key in its score function, and
softmax kernels with the bias as channels. Those that cannot run are left out, with the reason.

python -m scripts.bench_attention
python -m scripts.bench_attention --batch 16 --tokens 2048 --heads 10 --windows 512 full --compile --out results/h200
"""

import itertools

from scripts.cli import benchmark_parser, parse_benchmark, positive, run

LEVELS = ("operator", "sublayer")


def _window(text: str) -> int | None:
    return None if text == "full" else positive(text)


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--batch", type=positive, nargs="+", default=[2], help="rows")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[1024], help="tokens of a row")
    parser.add_argument("--heads", type=positive, nargs="+", default=[4], help="heads")
    parser.add_argument("--head-dim", type=positive, nargs="+", default=[128], help="channels of a head")
    parser.add_argument("--windows", type=_window, nargs="+", default=[None], help="visible positions, or full")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=LEVELS, help="what is timed")
    options, device, dtype = parse_benchmark(parser)
    import torch

    from gkachat.benchmark import measured_peaks, publish, show, table
    from scripts.bench.attention import COLUMNS, measure

    torch.manual_seed(0)
    peaks = measured_peaks(device, dtype)
    rows, blocks = [], []
    shapes = itertools.product(options.batch, options.tokens, options.heads, options.head_dim)
    for shape, window, level in itertools.product(shapes, options.windows, options.levels):
        found = measure(level, shape, window, device, dtype, peaks, options.compile, options.rounds)
        B, T, H, D = shape
        title = f"{level}, batch {B}, {T} tokens, {H} heads of {D}, window {window or 'full'}"
        blocks.append(f"{title}\n\n{table(found, COLUMNS)}")
        show(blocks[-1])
        rows += found
    print(f"measured peaks: {peaks[0] / 1e12:.3g} TFLOP/s, {peaks[1] / 1e9:.3g} GB/s")
    result = {"dtype": str(dtype), "flops_per_second": peaks[0], "bytes_per_second": peaks[1], "rows": rows}
    publish("Attention, timed", result, "\n".join(blocks), device, options.out)


if __name__ == "__main__":
    run(main)
