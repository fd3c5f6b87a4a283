"""Statistics of a trained model's attention weights, for each layer and head.

    inspection = inspect_run(run_dir, text="def add(a, b):")
    inspection.statistics["distance"][layer][head]

The weights come from each layer's `attention_weights`, so every registered attention can be inspected.
Axes: T query time, S key time, H heads.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gkachat.attention import Attention
from gkachat.attention.kernels.reference import visible
from gkachat.checkpoint import checkpoint_steps, load_model, load_weights, step_dir, tokens_dir
from gkachat.data.shards import Split
from gkachat.eval.compare import by_layer
from gkachat.model.gpt import GPT
from gkachat.tokenizer import Tokenizer
from gkachat.train.metrics import read_metrics

STATISTICS = {
    "effective": "effective number of attended tokens",
    "distance": "mean attended distance, tokens",
    "self": "weight on the token itself",
    "unassigned": "weight on no token",
}
MAX_PAIRS = 160_000  # squared distances sampled for each head
DEFAULT_MAPS = 12


@dataclass(frozen=True)
class Inspection:
    """Attention statistics of one checkpoint over some texts. Nested lists are [layer][head]."""

    run: str
    attention: str
    step: int
    source: str
    """The texts that were read, in words."""
    statistics: dict[str, list[list[float]]]
    """Mean over all positions, for each name in STATISTICS."""
    visible: list[float]
    """Mean number of tokens visible to a position, for each layer."""
    sigma: list[list[float]]
    """Bandwidths; empty for an attention without them."""
    distances: list[Tensor]
    """Squared distances to earlier tokens within the window, (H, pairs) for each layer; empty without sigma."""
    sigma_history: dict[int, list[list[float]]]
    """Bandwidths by training step; empty without sigma."""
    tokens: list[str]
    """Tokens shown on the axes of the maps."""
    maps: dict[str, Tensor]
    """(T, S) weights among `tokens`, by head name "LAYER.HEAD"."""


@torch.no_grad()
def inspect_run(
    run_dir: Path,
    *,
    text: str | None = None,
    step: int | None = None,
    device: str | torch.device = "cpu",
    documents: int = 8,
    tokens: int = 48,
    heads: tuple[str, ...] = (),
) -> Inspection:
    """Run a checkpoint over a text, or over the first val documents, and collect every layer's attention statistics.

    Args:
        text: the text to read; None reads val documents.
        step: the checkpoint to load; None loads the last.
        documents: number of val documents to read.
        tokens: number of tokens of the first text that the maps show.
        heads: names "LAYER.HEAD", counted from 0, of the heads to map; by default DEFAULT_MAPS, evenly spaced.

    Raises:
        FileNotFoundError: the run or the checkpoint does not exist.
        ValueError: the text is empty, a head does not exist, a number is too small, or the attention has no weights.
    """
    if documents < 1 or tokens < 2:
        raise ValueError(f"given {documents} documents and maps of {tokens} tokens, expected at least 1 and 2")
    model, tokenizer, meta = load_model(run_dir, device, step)
    config, layers = model.config, [block.attn for block in model.blocks]
    _check_weights(type(layers[0]), config.attention)
    mapped = _mapped_heads(heads, config.depth, config.n_head)
    texts, source = _read_texts(text, tokenizer, meta, documents, config.sequence_len)
    observed = _observe(model, layers, texts, tokens)
    sigma = [layer.sigma.tolist() for layer in layers if hasattr(layer, "sigma")]
    return Inspection(
        run=run_dir.resolve().name,
        attention=config.attention,
        step=meta["step"],
        source=source,
        statistics={
            name: [torch.cat(found[name], dim=1).nanmean(dim=1).tolist() for found in observed] for name in STATISTICS
        },
        visible=[torch.cat(found["visible"]).mean().item() for found in observed],
        sigma=sigma,
        distances=[torch.cat(found["distances"], dim=1) for found in observed if found["distances"]],
        sigma_history=sigma_history(run_dir) if sigma else {},
        tokens=[tokenizer.decode_bytes([id]).decode(errors="backslashreplace") for id in texts[0][:tokens]],
        maps={name: observed[layer]["map"][0][head] for name, (layer, head) in mapped.items()},
    )


def _check_weights(layer: type, attention: str) -> None:
    """Raise ValueError for a layer class that cannot tell its weights."""
    method = getattr(layer, "attention_weights", None)
    if method is None or (method is Attention.attention_weights and layer.qkv is Attention.qkv):
        raise ValueError(
            f"attention {attention!r} cannot be inspected: its class {layer.__name__} defines neither qkv nor "
            "attention_weights (docs/attention.md)"
        )


@torch.no_grad()
def attention_inputs(model: GPT, ids: list[int]) -> list[tuple]:
    """Run the model over one text; return the arguments of each layer's `attention_weights`."""
    inputs: list[tuple] = []

    def collect(layer: Attention, args: tuple) -> None:
        x_BTC, idx_BT, rope, _, x0_BTC = args
        inputs.append((x_BTC, idx_BT, rope, None, x0_BTC))

    hooks = [block.attn.register_forward_pre_hook(collect) for block in model.blocks]
    try:
        model(torch.tensor([ids], device=model.wte.weight.device), logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


@torch.no_grad()
def last_token_weights(model: GPT, ids: list[int]) -> Tensor:
    """Return the weight of each token of a text at its last position, for every layer and head: (layers, H, T)."""
    layers = [block.attn for block in model.blocks]
    return torch.stack(
        [
            layer.attention_weights(*args).weights[0, :, -1].float().cpu()
            for layer, args in zip(layers, attention_inputs(model, ids), strict=True)
        ]
    )


def _observe(
    model: GPT, layers: list[Attention], texts: list[list[int]], map_tokens: int
) -> list[dict[str, list[Tensor]]]:
    """Return for each layer, by name, what was observed on each text: STATISTICS, visible, map and distances."""
    generator = torch.Generator().manual_seed(0)
    observed: list[dict[str, list[Tensor]]] = [defaultdict(list) for _ in layers]
    for ids in texts:
        for layer, args, found in zip(layers, attention_inputs(model, ids), observed, strict=True):
            weights, _, distances = layer.attention_weights(*args)
            for name, values_HT in head_statistics(weights[0].cpu()).items():
                found[name].append(values_HT.double())
            found["visible"].append(visible(len(ids), layer.window).sum(dim=-1).double())
            found["map"].append(weights[0, :, :map_tokens, :map_tokens].cpu())
            if distances is not None:
                pairs = distances[0].cpu()[:, visible(len(ids), layer.window, include_self=False)]
                if pairs.size(1) > (n := max(1, MAX_PAIRS // len(texts))):
                    pairs = pairs[:, torch.randint(pairs.size(1), (n,), generator=generator)]
                found["distances"].append(pairs)
    return observed


def head_statistics(weights_HTS: Tensor) -> dict[str, Tensor]:
    """Return each of STATISTICS for each head and position, (H, T), from the weights of one text.

    "effective" is exp of the entropy in nats and "distance" the mean of i - j, both of the weights divided by their
    sum. Both are NaN where that sum is 0.
    """
    total = weights_HTS.sum(dim=-1)
    shares = weights_HTS / total[..., None]
    positions = torch.arange(weights_HTS.size(-1))
    return {
        "effective": torch.where(total > 0, -torch.xlogy(shares, shares).sum(dim=-1), math.nan).exp(),
        "distance": (shares * (positions[:, None] - positions)).sum(dim=-1),
        "self": weights_HTS.diagonal(dim1=-2, dim2=-1),
        "unassigned": (1 - total).clamp(min=0),
    }


def _mapped_heads(heads: tuple[str, ...], depth: int, n_head: int) -> dict[str, tuple[int, int]]:
    """Return name -> (layer, head) of the heads to map."""
    available = {f"{layer}.{head}": (layer, head) for layer in range(depth) for head in range(n_head)}
    if unknown := [head for head in heads if head not in available]:
        raise ValueError(
            f"heads: given {unknown[0]!r}, expected LAYER.HEAD with a layer from 0 to {depth - 1} and a head from 0 to "
            f"{n_head - 1}"
        )
    every = math.ceil(len(available) / DEFAULT_MAPS)
    return {name: available[name] for name in heads or list(available)[::every]}


def _read_texts(
    text: str | None, tokenizer: Tokenizer, meta: dict[str, Any], documents: int, sequence_len: int
) -> tuple[list[list[int]], str]:
    """Return the token ids of each text, with BOS and cut to the context, and a description of the texts."""
    if text is not None:
        texts = [tokenizer.encode(text)]
        source = f"a text of {len(texts[0]):,} tokens"
    else:
        val_documents = (
            shard.tokens[start : start + min(length, sequence_len)].tolist()
            for shard in Split(tokens_dir(meta), "val", tokenizer)
            for start, length in zip(shard.start, shard.length, strict=True)
        )
        texts = [ids for ids in islice(val_documents, documents) if ids]
        source = f"{len(texts)} val documents"
    texts = [[tokenizer.bos, *ids][:sequence_len] for ids in texts if ids]
    if not texts:
        raise ValueError("the text is empty, expected at least one token")
    total = sum(map(len, texts))
    return texts, f"{source}, {total:,} tokens read with BOS, at most {sequence_len:,} of each"


def sigma_history(run_dir: Path) -> dict[int, list[list[float]]]:
    """Return {step: bandwidths, [layer][head]}, from metrics.jsonl or, if it has none, from the checkpoints."""
    records = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    logged = {record["step"]: record["sigma_by_head"] for record in records if "sigma_by_head" in record}
    return logged or {step: by_layer(load_weights(step_dir(run_dir, step))) for step in checkpoint_steps(run_dir)}
