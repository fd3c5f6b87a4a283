"""Decoding and scoring: tokens and scores of the carried models against the CPU's, and speed at depth 20."""

import json

import torch

from gkachat.benchmark import benchmark, measured_peaks, table
from gkachat.checkpoint import load_model
from gkachat.config import ATTENTIONS, GPTConfig
from gkachat.eval.scoring import Group, score_texts
from gkachat.inference.engine import Engine
from gkachat.inference.quantize import for_inference
from gkachat.model.gpt import GPT
from scripts.bench import decode as bench_decode
from scripts.gpu_steps import Check, Save, Sizes, carried
from scripts.gpu_steps.numbers import Comparisons

MIN_MARGIN = 1e-3  # a lead in logits below this may be rounding: from such a token on, texts may differ
LOSS_TOLERANCE = 2e-4  # nats per token
SCORED_ROWS = 16


def tokens(check: Check, attention: str, save: Save) -> None:
    """Compare greedy tokens and scores of a carried model with the CPU's, in float32; decode recorded and compiled."""
    device, _ = check.start(save)
    sizes, comparisons, run_dir = check.sizes, Comparisons(save), check.carried / "runs" / attention
    model, tokenizer, _ = load_model(run_dir, device)
    exact = json.loads((run_dir / "reference.json").read_text("utf-8"))

    def compare_tokens(name: str, compile: bool, rows: int, n: int) -> None:
        prompts = exact["prompts"][-n:]  # the longest
        got = carried.greedy(Engine(model, tokenizer, compile), prompts, sizes.new_tokens, rows)
        wrong = sum(
            differs(*texts) for texts in zip(got, exact["continuations"][-n:], exact["margins"][-n:], strict=True)
        )
        comparisons.add(name, wrong, 0)

    def compare_scores(name: str) -> None:
        texts = [tuple(text) for text in exact["texts"]]
        groups = [
            Group.alone(i, text, start) for i, (text, start) in enumerate(zip(texts, exact["starts"], strict=True))
        ]
        with torch.inference_mode():
            scores = {number: score.mean_loss for (number, _), score in score_texts(model, groups)}
        comparisons.add(name, max(abs(scores[i] - loss) for i, loss in enumerate(exact["losses"])), LOSS_TOLERANCE)

    name = f"{attention}: scores of {len(exact['texts'])} texts"
    comparisons.attempt(name, compare_scores, name)
    modes = [(rows, False) for rows in sizes.decode_rows] + ([(sizes.decode_rows[-1], True)] if sizes.compile else [])
    for rows, compile in modes:
        name = f"{attention}: texts that differ, {rows} rows{', compiled' if compile else ''}"
        comparisons.attempt(name, compare_tokens, name, compile, rows, min(sizes.prompts, max(2, rows)))


def differs(got: list[int], exact: list[int], margins: list[float]) -> bool:
    """Return whether two continuations differ before the first token whose lead may be rounding."""
    certain = next((i for i, margin in enumerate(margins) if margin < MIN_MARGIN), len(margins))
    return got[:certain] != exact[:certain]


def model_for_decoding(sizes: Sizes, attention: str, device: torch.device, dtype: torch.dtype) -> GPT:
    """Return a model of depth 20 with room for one token after the context."""
    config = GPTConfig(
        depth=sizes.depth, attention=attention, n_embd=sizes.n_embd, vocab_size=sizes.vocab_size,
        sequence_len=sizes.tokens + 1,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        return for_inference(GPT(config, dtype), dtype)


@torch.inference_mode()
def warm_decode(check: Check, attention: str, save: Save) -> None:
    """Compile the decode step of the largest batch, which leaves its kernels in the caches on disk."""
    device, dtype = check.start(save)
    sizes = check.sizes
    model = model_for_decoding(sizes, attention, device, dtype)
    idx = torch.randint(sizes.vocab_size, (sizes.decode_rows[-1], sizes.tokens), device=device)
    step, _ = bench_decode.decode_step(model, idx, sizes.compile)
    step()
    save(compiled=True)


def decode(check: Check, _: str, save: Save) -> None:
    """Time decoding at depth 20: all batches recorded as graphs, then the largest compiled too."""
    device, dtype = check.start(save)
    sizes, rows = check.sizes, []
    models = {attention: model_for_decoding(sizes, attention, device, dtype) for attention in ATTENTIONS}
    _, bandwidth = measured_peaks(device, dtype)
    modes = [(batch, False) for batch in sizes.decode_rows]
    for batch, compile in [*reversed(modes), (sizes.decode_rows[-1], True)]:
        if compile and not sizes.compile:
            continue
        timed = {name: models[name] for name in (("softmax", "gka") if compile else models)}
        for row in bench_decode.measure(timed, sizes.tokens, batch, sizes.rounds, bandwidth, compile):
            rows.append(row | {"compiled": compile, "mode": "compiled" if compile else "recorded"})
        save(rows=rows, page=table(rows, {"": "{name}", "mode": "{mode}", **bench_decode.COLUMNS}))
        if device.type == "cuda":
            torch.cuda.empty_cache()


@torch.inference_mode()
def prefill(check: Check, _: str, save: Save) -> None:
    """Time the scoring of texts of many lengths, as CORE does it, at depth 20."""
    device, dtype = check.start(save)
    sizes = check.sizes
    generator = torch.Generator().manual_seed(0)
    lengths = [
        sizes.tokens * (i + SCORED_ROWS // 3) // (SCORED_ROWS + SCORED_ROWS // 3) for i in range(1, SCORED_ROWS + 1)
    ]
    texts = [tuple(torch.randint(sizes.vocab_size, (n,), generator=generator).tolist()) for n in lengths]
    contestants = {}
    for attention in ATTENTIONS:
        model = model_for_decoding(sizes, attention, device, dtype)

        def score(model: GPT = model) -> None:
            groups = [Group.alone(i, text, len(text) - 4) for i, text in enumerate(texts)]
            list(score_texts(model, groups))

        contestants[attention] = score
    timings = benchmark(contestants, device, sizes.rounds)
    softmax = timings["softmax"].median
    rows = [
        {
            "name": name, "ms": 1e3 * timing.median, "tokens_per_second": sum(lengths) / timing.median,
            "speed_over_softmax": softmax / timing.median, "peak_mib": timing.peak_mib,
        }
        for name, timing in timings.items()
    ]  # fmt: skip
    columns = {
        "": "{name}", "ms": "{ms:.1f}", "tokens/s": "{tokens_per_second:,.0f}",
        "speed over softmax": "{speed_over_softmax:.2f}", "peak MiB": "{peak_mib:,.0f}",
    }  # fmt: skip
    save(rows=rows, page=f"{SCORED_ROWS} texts of {min(lengths)} to {max(lengths)} tokens\n\n{table(rows, columns)}")
