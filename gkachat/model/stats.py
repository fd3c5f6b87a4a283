"""Model size: parameters, training FLOPs and cache bytes, counted from a model built on the meta device.

    stats = model_stats(GPTConfig(depth=20, attention="gka"))
    stats.params["total"], stats.flops_per_token, stats.cache_bytes_per_token

Training FLOPs per token are 6 for each parameter of the matrices, the head and the convolutions (2 forward, 4
backward), and 12 C min(window, T) per layer for comparing and averaging tokens (PaLM, arXiv 2204.02311, appendix B).
Embeddings are looked up and cost none. What the causal mask saves is not counted.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gkachat.config import ATTENTIONS, GPTConfig, Protocol
from gkachat.model.gpt import GPT

PUBLISHED_PARAMS_RATIO = 0.42  # arXiv 2605.02144, abstract, depth 20
PUBLISHED_FLOPS_RATIO = 0.49
PROTOCOLS = get_args(Protocol)
CACHE_BYTES = 2  # bytes of a cached number, a bfloat16


@dataclass(frozen=True)
class ModelStats:
    """Size of a model."""

    params: dict[str, int]
    """Parameters by group, and their total."""
    flops_per_token: int
    """Training FLOPs, forward and backward."""
    cache_bytes_per_token: int
    """Bytes that decoding keeps for each token of context: keys and values in bfloat16, and biases of keys.
    The norms of gka's keys are left out."""

    @property
    def scaling_params(self) -> int:
        """N, the parameters that token budgets scale with: matrices and head."""
        return self.params["matrices"] + self.params["lm_head"]


@cache
def model_stats(config: GPTConfig) -> ModelStats:
    """Count a model of this shape, without allocating it."""
    with torch.device("meta"):
        model = GPT(config)
    groups = {name: sum(p.numel() for p in group) for name, group in model.parameter_groups().items()}
    multiplied = sum(groups.get(name, 0) for name in ("matrices", "lm_head", "convolutions"))
    seen = sum(min(block.attn.window or config.sequence_len, config.sequence_len) for block in model.blocks)
    tensors = sum(1 if block.attn.shares_kv else 2 for block in model.blocks)
    biases = sum(block.attn.forgets for block in model.blocks)  # in float32
    return ModelStats(
        params={"total": sum(groups.values()), **groups},
        flops_per_token=6 * multiplied + 12 * config.n_embd * seen,
        cache_bytes_per_token=tensors * config.n_embd * CACHE_BYTES + 4 * config.n_head * biases,
    )


def state_bytes(config: GPTConfig, world_size: int = 1) -> int:
    """Return the bytes per rank of weights and gradients in float32, and of its share of the optimizer state.

    Muon keeps one number per weight, AdamW two.
    """
    params = model_stats(config).params
    muon = params["matrices"] + params.get("gates", 0)
    return 8 * params["total"] + 4 * (muon + 2 * (params["total"] - muon)) // world_size


def activation_bytes(config: GPTConfig, rows: int) -> int:
    """Return the bytes of activations that `rows` rows in bfloat16 save for the backward, counted by operation.

    This is an upper bound. It contains bfloat16 copies of the weights. A compiled model recomputes what is cheap. GKA
    is counted on its softmax kernels, which save more than the fused kernel.
    """
    config = dataclasses.replace(config, gka=dataclasses.replace(config.gka, backend="sdpa"))
    with FakeTensorMode():
        model = GPT(config, torch.bfloat16)
        idx = torch.zeros(rows, config.sequence_len, dtype=torch.long)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        saved: dict[int, torch.Tensor] = {}

        def save(tensor: torch.Tensor) -> torch.Tensor:
            saved.setdefault(tensor.untyped_storage()._cdata, tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss = model(idx, idx)  # held until all is counted: freed storages would have their addresses used again
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in weights)


def token_budget(protocol: str, config: GPTConfig, baseline_tokens: float) -> float:
    """Return the tokens that a model trains on, where the softmax model of its shape has `baseline_tokens`.

    Raises ValueError for an unknown protocol.
    """
    own, baseline = model_stats(config), model_stats(dataclasses.replace(config, attention="softmax"))
    if config.attention == "softmax":
        return baseline_tokens
    equal_flops = baseline_tokens * baseline.flops_per_token / own.flops_per_token
    match protocol:
        case "equal-tokens":
            return baseline_tokens
        case "equal-ratio":
            return baseline_tokens * own.scaling_params / baseline.scaling_params
        case "paper":
            return PUBLISHED_FLOPS_RATIO * equal_flops
        case "equal-flops":
            return equal_flops
    raise ValueError(f"protocol: given {protocol!r}, expected one of {', '.join(PROTOCOLS)}")


def compare_stats(config: GPTConfig) -> dict[str, Any]:
    """Return the size of every attention at one shape, and its ratios to softmax.

    `ratio` has the ratios of gka, `ratios` those of each attention, with total FLOPs under each protocol.
    """
    shapes = {name: config if name == config.attention else config.with_attention(name) for name in ATTENTIONS}
    stats = {name: model_stats(shape) for name, shape in shapes.items()}

    def ratios(name: str) -> dict[str, Any]:
        own, softmax = stats[name], stats["softmax"]
        flops = own.flops_per_token / softmax.flops_per_token
        return {
            "params": own.params["total"] / softmax.params["total"],
            "flops_per_token": flops,
            "cache_bytes_per_token": own.cache_bytes_per_token / softmax.cache_bytes_per_token,
            "total_flops": {protocol: flops * token_budget(protocol, shapes[name], 1.0) for protocol in PROTOCOLS},
        }

    over = {name: ratios(name) for name in ATTENTIONS if name != "softmax"}
    return {name: dataclasses.asdict(s) for name, s in stats.items()} | {"ratio": over["gka"], "ratios": over}
