"""gkachat's GPT for transformers, by itself: `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`.

Pre-norm transformer with parameter-free RMSNorm, relu^2 MLP, an untied head with soft-capped logits, and two learned
scalars a layer. Attention is softmax, or Gaussian Kernel Attention (arXiv 2605.02144), which has no query, key or value
projections: the block input is compared, and averaged, as it is, or in gka_plus after short convolutions over time. The
cache of either is that input alone, kept as keys; the values are a tensor without channels.
Shapes: B batch, T new tokens, S tokens seen, H heads, D head_dim, C channels. MIT License, the gkachat developers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_gkachat import GkachatConfig

LOGIT_CAP = 15.0
QK_SCALE = 1.2  # sharpens the logits of unit queries and keys
GATE_CHANNELS = 12  # block-input channels that the value gates look at
ROPE_BASE = 100_000.0
EPS = torch.finfo(torch.float32).eps
# What transformers calls a cache in its outputs depends on its version.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def rms_norm(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * (wide.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


class Linear(nn.Linear):
    """Without bias."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)


class Places:
    """Where the new tokens stand, and what they see. Keys are always the latest: S of them end with the newest token.

    Places are counted from the row's start, padding too: only distances matter, and padding is seen by nobody.
    """

    def __init__(self, n_new: int, total: int, attention_mask: Tensor | None, head_dim: int, device: torch.device):
        self.n_new, self.real = n_new, None if attention_mask is None else attention_mask.bool()
        self.at = torch.arange(total, device=device)
        channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
        angles = self.at.float()[:, None] * ROPE_BASE ** (-channels / head_dim)
        self.cos, self.sin = angles.cos(), angles.sin()

    def rotate(self, x_BHSD: Tensor) -> Tensor:
        """Channel i against channel i + D/2, by the places of the latest S tokens."""
        S = x_BHSD.size(2)
        cos, sin = self.cos[-S:], self.sin[-S:]
        a, b = x_BHSD.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x_BHSD.dtype)

    def visible(self, n_keys: int, window: int | None, include_self: bool) -> Tensor:
        """(B or 1, 1, T, S), bool."""
        distance = self.at[-self.n_new :, None] - self.at[None, -n_keys:]
        seen = distance >= (0 if include_self else 1)
        if window is not None:
            seen = seen & (distance < window)
        return seen[None, None] if self.real is None else seen & self.real[:, None, None, -n_keys:]


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | Tensor, bias: float | Tensor = 0.0) -> Tensor:
    """Softmax attention with scores scale q.k + bias; 0 for a token that sees nothing.

    q (B, H, T, D), k and v (B, H, S, D), scale (.., T or 1, 1), bias (B, H, 1, S).
    """
    scores = ((q @ k.mT).float() * scale + bias).masked_fill(~seen, -torch.inf)
    highest = scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (scores - highest).exp()
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return weights.to(v.dtype) @ v


class Attention(nn.Module):
    """What all have in common: heads, a window, a place in the cache, on some layers gated value embeddings."""

    def __init__(self, config: GkachatConfig, index: int):
        super().__init__()
        self.config, self.index = config, index
        self.window = config.window if config.layer_types[index] == "sliding_attention" else None
        self.c_proj = Linear(config.hidden_size, config.hidden_size)
        has_value_embedding = index in config.value_embedding_layers
        self.value_embedding = nn.Embedding(config.vocab_size, config.hidden_size) if has_value_embedding else None
        self.value_gate = Linear(GATE_CHANNELS, config.num_attention_heads) if has_value_embedding else None

    def heads(self, x_BTC: Tensor) -> Tensor:
        """(B, H, T, D)"""
        return x_BTC.unflatten(-1, (self.config.num_attention_heads, self.config.head_dim)).transpose(1, 2)

    def embedded_values(self, x_BTC: Tensor, idx_BT: Tensor) -> Tensor:
        """(B, H, T, D), what value embeddings add to the values."""
        gate = 3 * torch.sigmoid(self.value_gate(x_BTC[..., :GATE_CHANNELS]))
        return gate.mT[..., None] * self.heads(self.value_embedding(idx_BT))


class SoftmaxAttention(Attention):
    """Rotary positions, normalised queries and keys."""

    def __init__(self, config: GkachatConfig, index: int):
        super().__init__(config, index)
        C = config.hidden_size
        self.c_q, self.c_k, self.c_v = Linear(C, C), Linear(C, C), Linear(C, C)

    def forward(self, x_BTC: Tensor, idx_BT: Tensor, places: Places, cache: DynamicCache | None) -> Tensor:
        q, k, v = (self.heads(project(x_BTC)) for project in (self.c_q, self.c_k, self.c_v))
        if self.value_embedding is not None:
            v = v + self.embedded_values(x_BTC, idx_BT)
        q, k = (QK_SCALE * rms_norm(places.rotate(t)) for t in (q, k))
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        seen = places.visible(k.size(2), self.window, True)
        return self.c_proj(attend(q, k, v, seen, self.config.head_dim**-0.5).transpose(1, 2).flatten(2))


class GaussianKernelAttention(Attention):
    """A mean of the tokens seen, weighed by exp(-|x_i - x_j|^2 / 2 sigma^2) with one bandwidth sigma a head.

    A row's own norm cancels in that mean, so it is softmax attention with a bias for each key's norm.
    """

    def __init__(self, config: GkachatConfig, index: int):
        super().__init__(config, index)
        start = 0.5 * math.log(config.head_dim / 2)
        self.log_sigma = nn.Parameter(torch.full((config.num_attention_heads,), start))

    def forward(self, x_BTC: Tensor, idx_BT: Tensor, places: Places, cache: DynamicCache | None) -> Tensor:
        config = self.config
        x = q = self.heads(x_BTC)
        if config.gka_normalize:
            x = q = rms_norm(x)
        if cache is not None:
            x, _ = cache.update(x, x[..., :0], self.index)
        scale = (-2 * self.log_sigma.float()).exp()[:, None, None]
        keys, bias = x, -0.5 * scale * x.float().square().sum(dim=-1, keepdim=True).mT  # a rotation leaves norms
        if config.gka_rope:
            q, keys = places.rotate(q), places.rotate(x)
        seen = places.visible(x.size(2), self.window, config.gka_include_self)
        return self.c_proj(attend(q, keys, x, seen, scale, bias).transpose(1, 2).flatten(2))


class ShortConv(nn.Module):
    """Each channel mixes its last `taps` tokens: y_t = sum_n w_n x_(t-n)."""

    def __init__(self, taps: int, heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(taps, heads, head_dim))

    def forward(self, x_BHSD: Tensor) -> Tensor:
        S = x_BHSD.size(2)
        return sum(F.pad(x_BHSD, (0, 0, n, 0))[:, :, :S] * weight[:, None] for n, weight in enumerate(self.weight))


class GKAPlus(Attention):
    """GKA whose queries, keys and values are short convolutions of the block input, for the former the next head's.

    Scores are tau_i q_i.k_j / sigma^2 + b_j, with tau_i = exp(u.x_i), and b_j = w.x_j in the place of the last channel.
    """

    def __init__(self, config: GkachatConfig, index: int):
        super().__init__(config, index)
        plus, shape = config.plus, (config.num_attention_heads, config.head_dim)
        self.conv_q, self.conv_k, self.conv_v = (
            ShortConv(plus["taps"], *shape) if plus[name] else nn.Identity()
            for name in ("conv_query", "conv_key", "conv_value")
        )
        self.log_sigma = nn.Parameter(torch.zeros(config.num_attention_heads))
        self.bandwidth = nn.Parameter(torch.zeros(shape)) if plus["token_bandwidth"] else None
        self.key_weight = nn.Parameter(torch.zeros(shape)) if plus["key_weight"] else None

    def forward(self, x_BTC: Tensor, idx_BT: Tensor, places: Places, cache: DynamicCache | None) -> Tensor:
        plus, new = self.config.plus, slice(-x_BTC.size(1), None)
        x = self.heads(x_BTC)
        if places.real is not None:  # to a convolution, nothing comes before the text
            x = x.masked_fill(~places.real[:, None, new, None], 0)
        embedded = x[..., :0] if self.value_embedding is None else self.embedded_values(x_BTC, idx_BT)
        if cache is not None:
            x, embedded = cache.update(x, embedded, self.index)
        f = x.roll(-1, dims=1) if plus["neighbour"] else x
        q, k, v = self.conv_q(f)[:, :, new], self.conv_k(f), self.conv_v(x)
        v = v if self.value_embedding is None else v + embedded
        q, k = (places.rotate(t) for t in (q, k)) if plus["rope"] else (q, k)
        q, k = (rms_norm(t) for t in (q, k)) if plus["normalize"] else (q, k)
        if self.key_weight is not None or not plus["normalize"]:
            q, k = q[..., :-1], k[..., :-1]
        scale = (-2 * self.log_sigma.float()).exp()[:, None, None]
        bias = 0.0 if plus["normalize"] else -0.5 * scale * k.float().square().sum(dim=-1, keepdim=True).mT
        if self.key_weight is not None:
            bias = bias + (x * self.key_weight[:, None]).sum(dim=-1, keepdim=True).float().mT
        if self.bandwidth is not None:
            scale = scale * (x[:, :, new] * self.bandwidth[:, None]).sum(dim=-1, keepdim=True).float().exp()
        seen = places.visible(k.size(2), self.window, True)
        return self.c_proj(attend(q, k, v, seen, scale, bias).transpose(1, 2).flatten(2))


ATTENTION = {"softmax": SoftmaxAttention, "gka": GaussianKernelAttention, "gka_plus": GKAPlus}


class MLP(nn.Module):
    def __init__(self, config: GkachatConfig):
        super().__init__()
        self.c_fc = Linear(config.hidden_size, 4 * config.hidden_size)
        self.c_proj = Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x_BTC)).square())


class Block(nn.Module):
    def __init__(self, config: GkachatConfig, index: int):
        super().__init__()
        self.attn = ATTENTION[config.attention](config, index)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, idx_BT: Tensor, places: Places, cache: DynamicCache | None) -> Tensor:
        x_BTC = x_BTC + self.attn(rms_norm(x_BTC), idx_BT, places, cache)
        return x_BTC + self.mlp(rms_norm(x_BTC))


class GkachatForCausalLM(PreTrainedModel, GenerationMixin):
    """Made to load trained weights; to train from the start, use gkachat, whose initialisation differs."""

    config_class = GkachatConfig
    _keep_in_fp32_modules_strict = ["log_sigma", "residual_scale", "x0_mix"]  # noqa: RUF012 (transformers wants a list)

    def __init__(self, config: GkachatConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.residual_scale = nn.Parameter(torch.ones(config.num_hidden_layers))
        self.x0_mix = nn.Parameter(torch.zeros(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        cache: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) in float32 and, with `labels` (B, T), the mean loss in nats of each token after its past.

        Args:
            attention_mask: (B, tokens so far and T), 0 for padding, on either side.
            position_ids: follow from the mask; given, they are only checked.
            cache: a DynamicCache (called past_key_values too).
            labels: shifted here; -100 is not scored.
            logits_to_keep: only of the last so many tokens, or of those at these places.

        Raises ValueError for what is not supported: other caches and masks, positions that begin anew in a row.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and not self.training and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(f"cache: given a {type(cache).__name__}, expected a DynamicCache")
        T = input_ids.size(1)
        total = T + (0 if cache is None else cache.get_seq_length())
        if attention_mask is not None and attention_mask.shape != (input_ids.size(0), total):
            expected = (input_ids.size(0), total)
            raise ValueError(f"attention_mask: given {tuple(attention_mask.shape)}, expected {expected}")
        places = Places(T, total, attention_mask, self.config.head_dim, input_ids.device)
        if position_ids is not None and T > 1:
            real = places.real[:, -T:] if places.real is not None else torch.ones_like(position_ids, dtype=torch.bool)
            if ((position_ids.diff() != 1) & real[:, 1:] & real[:, :-1]).any():
                raise ValueError("position_ids: expected consecutive ones; texts packed into one row are not supported")

        x_BTC = x0_BTC = rms_norm(self.wte(input_ids))
        for block, scale, mix in zip(self.blocks, self.residual_scale, self.x0_mix, strict=True):
            x_BTC = block(scale.to(x_BTC.dtype) * x_BTC + mix.to(x_BTC.dtype) * x0_BTC, input_ids, places, cache)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(rms_norm(x_BTC[:, keep]) / LOGIT_CAP).float().tanh() * LOGIT_CAP
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
