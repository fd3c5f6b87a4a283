"""Prefill and decode steps that scripts.bench_decode times against each other."""

from collections.abc import Callable
from functools import partial

import torch

from gkachat.attention.cache import Cache
from gkachat.benchmark import benchmark
from gkachat.inference.decoder import Decoder
from gkachat.inference.engine import BLOCK
from gkachat.inference.sampling import Sampling
from gkachat.model.gpt import GPT


def prefill(model: GPT, idx: torch.Tensor) -> Cache:
    """Return a cache that holds these tokens and has room for one more."""
    rows, T = idx.shape
    cache = model.make_cache(rows, T + 1, block=BLOCK)
    for part in idx.split(BLOCK, dim=1):
        model(part, cache=cache.step(slice(0, rows), part.size(1)), logits_to_keep=1)
    return cache


def decode_step(model: GPT, idx: torch.Tensor, compile: bool) -> tuple[Callable[[], object], Cache]:
    """Return a function that decodes one token for each row, and its cache. Every call starts from the same length."""
    cache = prefill(model, idx)
    decoder = Decoder(model, cache, model.config.vocab_size, compile)
    for row in range(idx.size(0)):
        decoder.set_row(row, Sampling(top_k=50), [])
    lengths, tokens, draws = list(cache.lengths), idx[:, -1].tolist(), [0.5] * idx.size(0)

    def step() -> None:
        cache.lengths[:] = lengths
        decoder.step(tokens, draws)

    return step, cache


@torch.inference_mode()
def measure(
    models: dict[str, GPT], tokens: int, batch: int, rounds: int, bandwidth: float, compile: bool
) -> list[dict]:
    """Time all models at one context and batch; return a row of the table for each."""
    softmax = models["softmax"]
    device, generator = softmax.wte.weight.device, torch.Generator().manual_seed(0)
    idx = torch.randint(softmax.config.vocab_size, (batch, tokens), generator=generator).to(device)
    contestants, caches = {}, {}
    for name, model in models.items():
        contestants[name, "step"], caches[name] = decode_step(model, idx, compile)
        contestants[name, "prefill"] = partial(prefill, model, idx[:1])
        if batch == 1:
            contestants[name, "no cache"] = lambda model=model: model(idx)[:, -1].argmax(dim=-1).tolist()
    timings = benchmark(contestants, device, rounds)
    rows = []
    for name, model in models.items():
        step = timings[name, "step"]
        read = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        read -= sum(module.weight.nbytes for module in model.modules() if isinstance(module, torch.nn.Embedding))
        rows.append(
            {
                "name": name, "tokens": tokens, "batch": batch, "step_ms": 1e3 * step.median,
                "low_ms": 1e3 * step.low, "high_ms": 1e3 * step.high, "tokens_per_second": batch / step.median,
                "first_token_ms": 1e3 * timings[name, "prefill"].median,
                "speed_over_softmax": timings["softmax", "step"].median / step.median,
                "speed_over_no_cache": timings[name, "no cache"].median / step.median if batch == 1 else None,
                "cache_mb_a_row": caches[name].n_bytes / batch / 1e6,
                "of_bandwidth": (read + caches[name].n_bytes) / step.median / bandwidth,
            }
        )  # fmt: skip
    return rows


COLUMNS = {
    "": "{name}",
    "context": "{tokens:,}",
    "batch": "{batch}",
    "step ms (low to high)": "{step_ms:.2f} ({low_ms:.2f} to {high_ms:.2f})",
    "tokens/s": "{tokens_per_second:,.1f}",
    "speed over softmax": "{speed_over_softmax:.2f}",
    "over no cache": "{speed_over_no_cache:.1f}",
    "first token ms": "{first_token_ms:.0f}",
    "cache MB a row": "{cache_mb_a_row:.2f}",
    "of bandwidth": "{of_bandwidth:.2f}",
}
