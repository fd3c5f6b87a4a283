"""The accounts: parameters, training FLOPs and decode-cache bytes, counted from a model built on the meta device.

FLOPs a training token: 6 for each parameter that is multiplied with, of matrices, head, convolutions and head vectors
(2 forward, 4 backward), and 12 C min(window, T) a layer for comparing and averaging tokens, two products in each
attention (PaLM, arXiv 2204.02311, appendix B). Embeddings are looked up, not multiplied; what the causal mask saves is
not counted.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gkachat.attention.layers import ATTENTION
from gkachat.config import GPTConfig
from gkachat.model.gpt import GPT

PUBLISHED_PARAMS_RATIO = 0.42  # arXiv 2605.02144, abstract, depth 20
PUBLISHED_FLOPS_RATIO = 0.49
PROTOCOLS = ("equal-tokens", "equal-ratio", "paper", "equal-flops")
CACHE_BYTES = 2  # a cached number is bfloat16


@dataclass(frozen=True)
class ModelStats:
    params: dict[str, int]
    """By group, and their total."""
    flops_per_token: int
    """Of training: forward and backward."""
    cache_bytes_per_token: int
    """What decoding keeps for each token of the context, in bfloat16."""

    @property
    def scaling_params(self) -> int:
        """N, what horizons scale with: matrices and head."""
        return self.params["matrices"] + self.params["lm_head"]


@cache
def model_stats(config: GPTConfig) -> ModelStats:
    """Count a model of this shape; nothing is allocated."""
    with torch.device("meta"):
        model = GPT(config)
    groups = {name: sum(p.numel() for p in group) for name, group in model.parameter_groups().items()}
    multiplied = sum(groups.get(name, 0) for name in ("matrices", "lm_head", "convolutions", "head_vectors"))
    seen = sum(min(config.window(layer) or config.sequence_len, config.sequence_len) for layer in range(config.depth))
    return ModelStats(
        params={"total": sum(groups.values()), **groups},
        flops_per_token=6 * multiplied + 12 * config.n_embd * seen,
        cache_bytes_per_token=ATTENTION[config.attention].cache_tensors * config.depth * config.n_embd * CACHE_BYTES,
    )


def state_bytes(config: GPTConfig, world_size: int = 1) -> int:
    """Bytes of weights and gradients in float32, and of a process's share of what Muon (one number a weight) and AdamW
    (two) remember."""
    params = model_stats(config).params
    muon = params["matrices"] + params.get("value_gates", 0)
    return 8 * params["total"] + 4 * (muon + 2 * (params["total"] - muon)) // world_size


def activation_bytes(config: GPTConfig, rows: int) -> int:
    """Bytes that so many rows in bfloat16 keep for their backward, counted operation by operation; nothing is computed.

    An upper bound: bfloat16 copies of the weights are among them, a compiled model computes again what is cheap, and
    GKA is counted on its softmax route, which keeps more than the fused kernel.
    """
    config = dataclasses.replace(config, gka=dataclasses.replace(config.gka, backend="sdpa"))
    with FakeTensorMode():
        model = GPT(config, torch.bfloat16)
        idx = torch.zeros(rows, config.sequence_len, dtype=torch.long)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(idx, idx)  # held until all is counted, or storages would be freed and their keys used again
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)


def token_budget(protocol: str, config: GPTConfig, baseline_tokens: float) -> float:
    """Tokens that a model of this shape trains on, where the softmax model of the same shape has `baseline_tokens`.

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


def compare_accounts(config: GPTConfig) -> dict[str, Any]:
    """Every attention at one shape, and its ratios over softmax (`ratio`: those of gka); total FLOPs under each
    protocol."""
    shapes = {name: dataclasses.replace(config, attention=name) for name in ATTENTION}
    counted = {name: model_stats(shape) for name, shape in shapes.items()}

    def ratios(name: str) -> dict[str, Any]:
        own, softmax = counted[name], counted["softmax"]
        flops = own.flops_per_token / softmax.flops_per_token
        return {
            "params": own.params["total"] / softmax.params["total"],
            "flops_per_token": flops,
            "cache_bytes_per_token": own.cache_bytes_per_token / softmax.cache_bytes_per_token,
            "total_flops": {protocol: flops * token_budget(protocol, shapes[name], 1.0) for protocol in PROTOCOLS},
        }

    over = {name: ratios(name) for name in ATTENTION if name != "softmax"}
    return {name: dataclasses.asdict(a) for name, a in counted.items()} | {"ratio": over["gka"], "ratios": over}
