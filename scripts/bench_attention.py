"""Time the attention operator and the whole attention sublayer: softmax, GKA, GKA on normalised features, naive GKA.

python -m scripts.bench_attention
python -m scripts.bench_attention --batch 16 --tokens 2048 --heads 10 --windows 512 full --compile --out results/h200
"""

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gkachat.attention.backends import gka_backend, softmax_backend
from gkachat.attention.features import rms_norm, rope_table
from gkachat.attention.fused import visible
from gkachat.attention.layers import ATTENTION
from gkachat.benchmark import benchmark, measured_peaks, publish, table
from gkachat.config import GKAConfig, GPTConfig
from scripts.cli import benchmark_parser, parse_benchmark, positive, run

VARIANTS = {"gka": GKAConfig(), "gka normalised": GKAConfig(normalize=True)}
NAIVE_BYTES = 16 * 2**30  # the naive operator is left out where its T x T tensors would take more


def operators(shape: tuple[int, int, int, int], window: int | None, device, dtype) -> dict[str, tuple[Callable, list]]:
    """Name -> (function of the inputs, inputs); inputs and outputs (B, T, H, D)."""
    B, T, H, D = shape
    place = {"device": device, "dtype": dtype}
    q, k, v, x = (torch.randn(shape, **place).requires_grad_() for _ in range(4))
    sigma = torch.full((H,), math.sqrt(D / 2), device=device, requires_grad=True)
    softmax = softmax_backend(device, dtype, D, window, T)
    found = {f"softmax ({softmax.name})": (partial(softmax.attend, window=window, scale=D**-0.5), [q, k, v])}
    for name, options in VARIANTS.items():
        backend = gka_backend(device, dtype, D, window, T, options)
        found[f"{name} ({backend.name})"] = (partial(_without_rope, backend.attend), [x, sigma])
    if 8 * B * H * T * T * torch.finfo(torch.float32).bits // 8 <= NAIVE_BYTES:
        found["gka naive"] = (partial(naive, mask=visible(T, window, device=device)), [x, sigma])
    return found


def _without_rope(attend: Callable, x: Tensor, sigma: Tensor) -> Tensor:
    return attend(x, sigma, None)


def naive(x_BTHD: Tensor, sigma_H: Tensor, mask: Tensor) -> Tensor:
    """GKA as one writes it down: all squared distances, the kernel, the mask, the division by the row's sum."""
    x = x_BTHD.transpose(1, 2)
    norms = x.float().square().sum(-1, keepdim=True)
    distances = norms + norms.mT - 2 * x @ x.mT
    weights = torch.exp(-distances / (2 * sigma_H.square()[:, None, None])) * mask
    return ((weights / weights.sum(-1, keepdim=True)).to(x.dtype) @ x).transpose(1, 2)


def sublayers(shape: tuple[int, int, int, int], window: int | None, device, dtype) -> dict[str, tuple[Callable, list]]:
    """Whole attention layers with their norm and projections; inputs and outputs (B, T, C)."""
    B, T, H, D = shape
    found = {}
    for name, attention, options in (
        ("softmax", "softmax", GKAConfig()),
        *((name, "gka", options) for name, options in VARIANTS.items()),
    ):
        # Of two layers the first has no value embedding: the comparison is of attention alone.
        config = GPTConfig(
            depth=2, attention=attention, vocab_size=2, sequence_len=max(2, T), n_embd=H * D, head_dim=D, gka=options
        )
        with device:
            layer, idx = ATTENTION[attention](config, 0), torch.zeros(B, T, dtype=torch.long)
        layer.window = window
        layer.choose_backend(device, dtype)
        with torch.no_grad():
            layer.init_weights()
            layer.c_proj.weight.normal_(std=(H * D) ** -0.5)
        x = torch.randn(B, T, H * D, device=device, dtype=dtype).requires_grad_()
        function = partial(_sublayer, layer, idx, rope_table(T, D, device))
        found[f"{name} ({layer.backend.name})"] = (function, [x, *layer.parameters()])
    return found


def _sublayer(layer, idx, rope, x, *parameters) -> Tensor:
    return layer(rms_norm(x), idx, rope)


def passes(function: Callable, inputs: list[Tensor], compiled: bool) -> tuple[Callable, Callable]:
    """A forward, as in training, and a forward with its backward."""
    if compiled:
        function = torch.compile(function, dynamic=False)
    dy = torch.randn_like(function(*inputs).detach())
    return lambda: function(*inputs), lambda: torch.autograd.grad(function(*inputs), inputs, dy)


def bound(
    name: str, sublayer: bool, shape, window: int | None, dtype, peaks: tuple[float, float]
) -> tuple[float, float]:
    """(FLOPs, least seconds by count) of a forward with its backward, at the measured peaks.

    The operator: two products forward, five backward, over the pairs that are seen; softmax moves q, k, v, y and their
    gradients, GKA x, y and theirs. A projection: three products of B T C x C in all.
    """
    B, T, H, D = shape
    w = T if window is None else min(window, T)
    pairs = w * (w + 1) // 2 + (T - w) * w
    softmax, row = name.startswith("softmax"), B * T * H * D * torch.finfo(dtype).bits // 8
    stages = [(14 * B * H * D * pairs, (12 if softmax else 6) * row)]
    if sublayer:
        projections = 4 if softmax else 1
        stages.append((6 * projections * B * T * (H * D) ** 2, 6 * projections * row))
    return sum(f for f, _ in stages), sum(max(f / peaks[0], n / peaks[1]) for f, n in stages)


def measure(level: str, shape, window: int | None, device, dtype, peaks, compiled: bool, rounds: int) -> list[dict]:
    found = (operators if level == "operator" else sublayers)(shape, window, device, dtype)
    contestants = {}
    for name, (function, inputs) in found.items():
        forward, both = passes(function, inputs, compiled and "naive" not in name)
        contestants |= {(name, "forward"): forward, (name, "both"): both}
    timings = benchmark(contestants, device, rounds)
    baseline = next(iter(found))
    rows = []
    for name in found:
        forward, both = timings[name, "forward"], timings[name, "both"]
        flops, least = bound(name, level == "sublayer", shape, window, dtype, peaks)
        rows.append(
            {
                "level": level, "shape": list(shape), "window": window, "name": name,
                "forward_ms": 1e3 * forward.median, "backward_ms": 1e3 * (both.median - forward.median),
                "both_ms": 1e3 * both.median, "both_low_ms": 1e3 * both.low, "both_high_ms": 1e3 * both.high,
                "time_over_softmax": both.median / timings[baseline, "both"].median,
                "tflops": flops / both.median / 1e12, "of_matrix_peak": flops / both.median / peaks[0],
                "of_bound": least / both.median, "peak_mib": both.peak_bytes and both.peak_bytes / 2**20,
            }
        )  # fmt: skip
    return rows


COLUMNS = {
    "": "{name}",
    "forward ms": "{forward_ms:.2f}",
    "backward ms": "{backward_ms:.2f}",
    "both ms (low to high)": "{both_ms:.2f} ({both_low_ms:.2f} to {both_high_ms:.2f})",
    "over softmax": "{time_over_softmax:.3f}",
    "TFLOP/s": "{tflops:.3g}",
    "of peak": "{of_matrix_peak:.2f}",
    "of bound": "{of_bound:.2f}",
    "peak MiB": "{peak_mib:.0f}",
}


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--compile", action="store_true", help="torch.compile the contestants")
    parser.add_argument("--batch", type=positive, nargs="+", default=[2])
    parser.add_argument("--tokens", type=positive, nargs="+", default=[1024])
    parser.add_argument("--heads", type=positive, nargs="+", default=[4])
    parser.add_argument("--head-dim", type=positive, nargs="+", default=[128])
    seen = lambda text: None if text == "full" else positive(text)  # noqa: E731
    parser.add_argument("--windows", type=seen, nargs="+", default=[None], help="positions seen, or full")
    parser.add_argument("--levels", nargs="+", choices=["operator", "sublayer"], default=["operator", "sublayer"])
    options, device, dtype = parse_benchmark(parser)
    torch.manual_seed(0)
    peaks = measured_peaks(device, dtype)
    rows, blocks = [], []
    shapes = itertools.product(options.batch, options.tokens, options.heads, options.head_dim)
    for shape, window, level in itertools.product(shapes, options.windows, options.levels):
        found = measure(level, shape, window, device, dtype, peaks, options.compile, options.rounds)
        B, T, H, D = shape
        title = f"{level}, batch {B}, {T} tokens, {H} heads of {D}, window {window or 'full'}"
        blocks.append(f"{title}\n\n{table(found, COLUMNS)}")
        print(blocks[-1], flush=True)
        rows += found
    print(f"measured peaks: {peaks[0] / 1e12:.3g} TFLOP/s, {peaks[1] / 1e9:.3g} GB/s")
    result = {"dtype": str(dtype), "flops_per_second": peaks[0], "bytes_per_second": peaks[1], "rows": rows}
    publish("Attention, timed", result, "\n".join(blocks), device, options.out)


if __name__ == "__main__":
    run(main)
