"""Time decoding with a cache, softmax beside GKA, against the plain loop that runs the whole context for each token.

python -m scripts.bench_decode --depth 12 --tokens 1024
python -m scripts.bench_decode --depth 20 --tokens 128 1024 2048 --batch 1 8 64 --out results/h200_decode
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch

from gkachat.attention.cache import Cache
from gkachat.bench import contest, facts, markdown_table, measured_peaks, write_results
from gkachat.config import GKAConfig, GPTConfig
from gkachat.engine import BLOCK, Sampling, sample
from gkachat.gpt import GPT
from gkachat.machine import pick_device, pick_dtype
from scripts.cli import benchmark_parser, run

VARIANTS = {"softmax": ("softmax", GKAConfig()), "gka": ("gka", GKAConfig())}


def filled(model: GPT, idx: torch.Tensor, room: int) -> Cache:
    """A cache that has read these tokens, with room for more."""
    cache = model.make_cache(idx.size(0), idx.size(1) + room, block=BLOCK)
    for at in range(0, idx.size(1), BLOCK):
        model.decode(idx[:, at : at + BLOCK], cache, slice(0, idx.size(0)))
    return cache


def decode_step(model: GPT, idx: torch.Tensor) -> tuple[Callable[[], None], Cache]:
    """One token for each row, drawn and read; every repetition does so at the same length."""
    batch = idx.size(0)
    cache, settings, draws = filled(model, idx, 1), [Sampling(top_k=50)] * batch, [0.5] * batch
    lengths = list(cache.lengths)

    def step() -> None:
        cache.lengths[:] = lengths
        logits = model.decode(idx[:, -1:], cache, slice(0, batch))
        sample(logits, settings, draws).tolist()

    return step, cache


@torch.inference_mode()
def measure(
    models: dict[str, GPT], tokens: int, batch: int, options: argparse.Namespace, bandwidth: float
) -> list[dict]:
    device = next(iter(models.values())).wte.weight.device
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(next(iter(models.values())).config.vocab_size, (batch, tokens), generator=generator).to(device)
    contestants, caches = {}, {}
    for name, model in models.items():
        contestants[name, "step"], caches[name] = decode_step(model, idx)
        contestants[name, "prefill"] = partial(filled, model, idx[:1], 1)
        if batch == 1:
            contestants[name, "no cache"] = lambda model=model: model(idx)[:, -1].argmax(dim=-1).tolist()
    timings = contest(contestants, device, options.rounds)
    rows = []
    for name, model in models.items():
        step = timings[name, "step"]
        weights = sum(
            p.numel() for key, p in model.named_parameters() if "embedding" not in key and not key.startswith("wte")
        ) * (2 if model.compute_dtype == torch.bfloat16 else 4)
        rows.append(
            {
                "name": name, "tokens": tokens, "batch": batch, "step_ms": 1e3 * step.median,
                "low_ms": 1e3 * step.low, "high_ms": 1e3 * step.high, "tokens_per_second": batch / step.median,
                "first_token_ms": 1e3 * timings[name, "prefill"].median,
                "speed_over_softmax": timings["softmax", "step"].median / step.median,
                "speed_over_no_cache": timings[name, "no cache"].median / step.median if batch == 1 else None,
                "cache_bytes_a_row": caches[name].n_bytes // batch,
                "bandwidth_of_peak": (weights + caches[name].n_bytes) / step.median / bandwidth,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    options = parse(sys.argv[1:])
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    models = {}
    for name, (attention, gka) in VARIANTS.items():
        torch.manual_seed(0)
        config = GPTConfig(
            depth=options.depth, attention=attention, gka=gka, vocab_size=options.vocab_size, n_embd=options.n_embd,
            sequence_len=max(*options.tokens, 2) + 1,
        )  # fmt: skip
        with device:
            models[name] = GPT(config, dtype).eval()
    _, bandwidth = measured_peaks(device, dtype)
    rows = [
        row for tokens in options.tokens for batch in options.batch
        for row in measure(models, tokens, batch, options, bandwidth)
    ]  # fmt: skip
    result = {"facts": facts(device), "dtype": str(dtype), "bytes_per_second": bandwidth, "rows": rows}
    print("\n" + table(rows))
    print(f"Bandwidth is of {bandwidth / 1e9:,.1f} GB/s, a large copy's; {result['facts']}")
    if options.out:
        command = "python -m scripts.bench_decode " + " ".join(sys.argv[1:])
        write_results(options.out, "Decoding, timed", command, result, table(rows))


def table(rows: list[dict]) -> str:
    header = [
        "", "context", "batch", "step ms (low to high)", "tokens/s", "over softmax", "over no cache",
        "first token ms", "cache MB a row", "bandwidth",
    ]  # fmt: skip
    lines = [
        [
            r["name"], f"{r['tokens']:,}", str(r["batch"]),
            f"{r['step_ms']:.2f} ({r['low_ms']:.2f} to {r['high_ms']:.2f})", f"{r['tokens_per_second']:,.1f}",
            f"{r['speed_over_softmax']:.2f}", f"{r['speed_over_no_cache']:.1f}" if r["speed_over_no_cache"] else "",
            f"{r['first_token_ms']:.0f}", f"{r['cache_bytes_a_row'] / 1e6:.2f}", f"{r['bandwidth_of_peak']:.2f}",
        ]
        for r in rows
    ]  # fmt: skip
    return markdown_table(header, lines)


def parse(args: list[str]) -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--n-embd", type=int)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], help="of context")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    options = parser.parse_args(args)
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


if __name__ == "__main__":
    run(main)
