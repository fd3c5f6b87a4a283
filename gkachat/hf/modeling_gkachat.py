"""gkachat's GPT for transformers. This file needs only transformers and configuration_gkachat.py.

    AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)

The model is a pre-norm transformer with parameter-free RMSNorm, a relu^2 MLP, an untied head with soft-capped logits
and two learned scalars per layer. Each embedding gets a share of the previous one (smear), and a share of the residual
stream after the middle layer is subtracted at the end (backout). Attention is softmax attention or Gaussian Kernel
Attention (GKA, arXiv 2605.02144). GKA has no query, key or value projections: it compares and averages the block input
itself (gka) or short convolutions of it (gka_plus).
Shapes: B batch, T new tokens, S tokens in the cache and new, H heads, D head_dim, C channels.
MIT License, the gkachat developers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_gkachat import TAPS, GkachatConfig

LOGIT_CAP = 15.0
QK_SCALE = 1.2  # sharpens the logits of unit queries and keys
GATE_CHANNELS = 12  # block-input channels that the value gates read
SMEAR_CHANNELS = 24  # embedding channels that the smear's gate reads
ROPE_BASE = 100_000.0
EPS = torch.finfo(torch.float32).eps
# The output field that holds the cache was renamed between versions of transformers.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def rms_norm(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * (wide.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


def linear(n_in: int, n_out: int) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=False)


class Positions:
    """Positions of the new tokens and of the keys: rotations and masks.

    Keys are the latest S tokens and end with the newest. Positions count from the start of a row, padding included:
    only distances matter, and no token sees padding. Raises ValueError for inputs that do not fit together.
    """

    def __init__(
        self,
        idx_BT: Tensor,
        padding_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: DynamicCache | None,
        head_dim: int,
    ):
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(f"cache: given a {type(cache).__name__}, expected a DynamicCache")
        B, T = idx_BT.shape
        n_total = T + (0 if cache is None else cache.get_seq_length())
        if padding_mask is not None and padding_mask.shape != (B, n_total):
            raise ValueError(f"attention_mask: given {tuple(padding_mask.shape)}, expected {(B, n_total)}")
        self.n_new = T
        self.padding_mask = None if padding_mask is None else padding_mask.bool()
        if position_ids is not None:
            breaks = position_ids.diff() != 1
            if padding_mask is not None:
                tokens = self.padding_mask[:, -T:]
                breaks = breaks & tokens[:, 1:] & tokens[:, :-1]
            if breaks.any():
                raise ValueError("position_ids: expected consecutive ones; texts packed into one row are not supported")
        self.positions = torch.arange(n_total, device=idx_BT.device)
        channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=idx_BT.device)
        angles = self.positions.float()[:, None] * ROPE_BASE ** (-channels / head_dim)
        self.cos, self.sin = angles.cos(), angles.sin()

    def rotate(self, x_BHSD: Tensor) -> Tensor:
        """Rotate channel i against channel i + D/2 by the positions of the latest S tokens."""
        S = x_BHSD.size(2)
        cos, sin = self.cos[-S:], self.sin[-S:]
        a, b = x_BHSD.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x_BHSD.dtype)

    def visible(self, n_keys: int, window: int | None, include_self: bool) -> Tensor:
        """Return the attention mask, (B or 1, 1, T, S) bool."""
        distance = self.positions[-self.n_new :, None] - self.positions[None, -n_keys:]
        visible = distance >= (0 if include_self else 1)
        if window is not None:
            visible = visible & (distance < window)
        if self.padding_mask is None:
            return visible[None, None]
        return visible & self.padding_mask[:, None, None, -n_keys:]


class ValueEmbedding(nn.Module):
    """A learned vector per token that is added to the values, gated per head by 3 sigmoid(W x[:12])."""

    def __init__(self, config: GkachatConfig):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.gate = linear(GATE_CHANNELS, config.num_attention_heads)

    def forward(self, x_BTC: Tensor, idx_BT: Tensor) -> Tensor:
        """Return what is added to the values, (B, H, T, D)."""
        gate_BTH = 3 * torch.sigmoid(self.gate(x_BTC[..., :GATE_CHANNELS]))
        y_BTHD = gate_BTH[..., None] * self.table(idx_BT).unflatten(-1, (gate_BTH.size(-1), -1))
        return y_BTHD.transpose(1, 2)


class Attention(nn.Module):
    """Softmax attention to the cached tokens with scores scale q.k + bias. A variant defines two methods:

    cache_entries(x_BTC, idx_BT, positions): what the cache keeps of the new tokens, two (B, H, T, *) tensors.
    qkv(x_BTC, keys, values, positions): from the entries of all S tokens, q (B, H, T, D), k and v (B, H, S, D), the
        scale, a number or (H, 1, 1), and the bias, a number or (B, H, 1, S).
    """

    include_self = True

    def __init__(self, config: GkachatConfig, index: int):
        super().__init__()
        self.config, self.index = config, index
        self.window = config.window if config.layer_types[index] == "sliding_attention" else None
        self.c_proj = linear(config.hidden_size, config.hidden_size)
        self.value_embedding = ValueEmbedding(config) if index in config.value_embedding_layers else None

    def forward(self, x_BTC: Tensor, idx_BT: Tensor, positions: Positions, cache: DynamicCache | None) -> Tensor:
        keys, values = self.cache_entries(x_BTC, idx_BT, positions)
        if cache is not None:
            keys, values = cache.update(keys, values, self.index)
        q, k, v, scale, bias = self.qkv(x_BTC, keys, values, positions)
        visible = positions.visible(k.size(2), self.window, self.include_self)
        scores = ((q @ k.mT).float() * scale + bias).masked_fill(~visible, -torch.inf)
        # A token that sees nothing has only scores of -inf; the clamps give it weights of 0 instead of NaN.
        highest = scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        weights = (scores - highest).exp()
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        y_BHTD = weights.to(v.dtype) @ v
        return self.c_proj(y_BHTD.transpose(1, 2).flatten(2))

    def split_heads(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, H, T, D)."""
        return x_BTC.unflatten(-1, (self.config.num_attention_heads, self.config.head_dim)).transpose(1, 2)


class SoftmaxAttention(Attention):
    """Softmax attention with rotary positions and normalised queries and keys. The cache keeps keys and values."""

    def __init__(self, config: GkachatConfig, index: int):
        super().__init__(config, index)
        C = config.hidden_size
        self.c_q, self.c_k, self.c_v = linear(C, C), linear(C, C), linear(C, C)

    def cache_entries(self, x_BTC: Tensor, idx_BT: Tensor, positions: Positions) -> tuple:
        k, v = self.split_heads(self.c_k(x_BTC)), self.split_heads(self.c_v(x_BTC))
        if self.value_embedding is not None:
            v = v + self.value_embedding(x_BTC, idx_BT)
        return QK_SCALE * rms_norm(positions.rotate(k)), v

    def qkv(self, x_BTC: Tensor, keys: Tensor, values: Tensor, positions: Positions) -> tuple:
        q = self.split_heads(self.c_q(x_BTC))
        return QK_SCALE * rms_norm(positions.rotate(q)), keys, values, self.config.head_dim**-0.5, 0.0


class GaussianKernelAttention(Attention):
    """Mean of the visible tokens, weighted by exp(-|x_i - x_j|^2 / (2 sigma^2)) with one bandwidth sigma per head.

    The query's own norm cancels in that mean, which leaves softmax attention with a bias for each key's norm. The
    cache keeps the block input as keys; its values have no channels.
    """

    def __init__(self, config: GkachatConfig, index: int):
        super().__init__(config, index)
        self.include_self = config.gka_include_self
        start = 0.5 * math.log(config.head_dim / 2)
        self.log_sigma = nn.Parameter(torch.full((config.num_attention_heads,), start))

    def cache_entries(self, x_BTC: Tensor, idx_BT: Tensor, positions: Positions) -> tuple:
        x = self.split_heads(x_BTC)
        x = rms_norm(x) if self.config.gka_normalize else x
        return x, x[..., :0]

    def qkv(self, x_BTC: Tensor, keys: Tensor, values: Tensor, positions: Positions) -> tuple:
        scale = (-2 * self.log_sigma.float()).exp()[:, None, None]
        bias = -0.5 * scale * keys.float().square().sum(dim=-1, keepdim=True).mT  # rotations preserve norms
        k = positions.rotate(keys) if self.config.gka_rope else keys
        return k[:, :, -positions.n_new :], k, keys, scale, bias


class ShortConv(nn.Module):
    """Causal convolution of each channel over its last TAPS tokens: y_t = sum_n w_n x_(t-n)."""

    def __init__(self, n_head: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(TAPS, n_head, head_dim))

    def forward(self, x_BHSD: Tensor) -> Tensor:
        S = x_BHSD.size(2)
        return sum(F.pad(x_BHSD, (0, 0, n, 0))[:, :, :S] * weight[:, None] for n, weight in enumerate(self.weight))


class GKAPlus(Attention):
    """GKA on short convolutions of the block input, rotated and RMS-normalised.

    All keys then have the same norm, so that there is no bias. The cache keeps the block input, as keys, and the
    gated value embeddings of layers that have them.
    """

    def __init__(self, config: GkachatConfig, index: int):
        super().__init__(config, index)
        H, D = config.num_attention_heads, config.head_dim
        self.conv_q, self.conv_k, self.conv_v = ShortConv(H, D), ShortConv(H, D), ShortConv(H, D)
        self.log_sigma = nn.Parameter(torch.zeros(H))

    def cache_entries(self, x_BTC: Tensor, idx_BT: Tensor, positions: Positions) -> tuple:
        x = self.split_heads(x_BTC)
        if positions.padding_mask is not None:  # to a convolution, padding is zeros, like what precedes a text
            x = x.masked_fill(~positions.padding_mask[:, None, -positions.n_new :, None], 0)
        return x, x[..., :0] if self.value_embedding is None else self.value_embedding(x_BTC, idx_BT)

    def qkv(self, x_BTC: Tensor, keys: Tensor, values: Tensor, positions: Positions) -> tuple:
        q, k, v = self.conv_q(keys)[:, :, -positions.n_new :], self.conv_k(keys), self.conv_v(keys)
        if self.value_embedding is not None:
            v = v + values
        q, k = rms_norm(positions.rotate(q)), rms_norm(positions.rotate(k))
        return q, k, v, (-2 * self.log_sigma.float()).exp()[:, None, None], 0.0


ATTENTIONS = {"softmax": SoftmaxAttention, "gka": GaussianKernelAttention, "gka_plus": GKAPlus}


class MLP(nn.Module):
    def __init__(self, config: GkachatConfig):
        super().__init__()
        self.c_fc = linear(config.hidden_size, 4 * config.hidden_size)
        self.c_proj = linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x_BTC)).square())


class Block(nn.Module):
    def __init__(self, config: GkachatConfig, index: int):
        super().__init__()
        self.attn = ATTENTIONS[config.attention](config, index)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, idx_BT: Tensor, positions: Positions, cache: DynamicCache | None) -> Tensor:
        x_BTC = x_BTC + self.attn(rms_norm(x_BTC), idx_BT, positions, cache)
        return x_BTC + self.mlp(rms_norm(x_BTC))


class Smear(nn.Module):
    """Adds a share of the previous token's embedding to each token's, gated by sigmoid(W x[:24]).

    The cache keeps the newest embedding in a layer of its own, behind those of the attention layers.
    """

    def __init__(self, config: GkachatConfig):
        super().__init__()
        self.index = config.num_hidden_layers
        self.gate = linear(min(SMEAR_CHANNELS, config.hidden_size), 1)
        self.share = nn.Parameter(torch.zeros(1))

    def forward(self, x_BTC: Tensor, positions: Positions, cache: DynamicCache | None) -> Tensor:
        known_BTC, T = x_BTC, x_BTC.size(1)
        if positions.padding_mask is not None:  # what precedes a text is zeros
            known_BTC = known_BTC.masked_fill(~positions.padding_mask[:, -T:, None], 0)
        if cache is not None:
            if len(cache.layers) == self.index:
                cache.layers.append(DynamicSlidingWindowLayer(sliding_window=2))
            known_BTC = cache.update(known_BTC[:, None], known_BTC[:, None, :, :0], self.index)[0][:, 0]
        previous_BTC = F.pad(known_BTC, (0, 0, 1, 0))[:, -T - 1 : -1]
        gate_BT1 = self.share.to(x_BTC.dtype) * torch.sigmoid(self.gate(x_BTC[..., : self.gate.in_features]))
        return x_BTC + gate_BT1 * previous_BTC


class GkachatForCausalLM(PreTrainedModel, GenerationMixin):
    """Language model for trained weights. To train from scratch, use gkachat, which initialises weights differently."""

    config_class = GkachatConfig
    _input_embed_layer = "wte"
    _keep_in_fp32_modules_strict = [  # noqa: RUF012 (transformers wants a list)
        "log_sigma", "residual_scale", "x0_mix", "backout", "smear.share",
    ]  # fmt: skip

    def __init__(self, config: GkachatConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.residual_scale = nn.Parameter(torch.ones(config.num_hidden_layers))
        self.x0_mix = nn.Parameter(torch.zeros(config.num_hidden_layers))
        self.smear = Smear(config) if config.smear else None
        self.backout = nn.Parameter(torch.zeros(1)) if config.backout else None
        self.post_init()

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
        """Return logits (B, T, V) in float32 and, with `labels` (B, T), the mean next-token loss in nats.

        Args:
            attention_mask: (B, cached tokens + T), 0 for padding, which may be on either side.
            position_ids: only checked: positions follow from the mask.
            cache: a DynamicCache, also accepted as past_key_values.
            labels: shifted here; -100 is not scored.
            logits_to_keep: keep the logits of the last so many tokens, or of the tokens at these indices.

        Raises:
            ValueError: another kind of cache, a mask of another shape, or positions that restart within a row.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and not self.training and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        positions = Positions(input_ids, attention_mask, position_ids, cache, self.config.head_dim)
        x_BTC = rms_norm(self.wte(input_ids))
        if self.smear is not None:
            x_BTC = self.smear(x_BTC, positions, cache)
        x0_BTC = x_BTC
        for index, (scale, mix) in enumerate(zip(self.residual_scale, self.x0_mix, strict=True)):
            x_BTC = scale.to(x_BTC.dtype) * x_BTC + mix.to(x_BTC.dtype) * x0_BTC
            x_BTC = self.blocks[index](x_BTC, input_ids, positions, cache)
            if index == len(self.blocks) // 2:
                middle_BTC = x_BTC
        if self.backout is not None:
            x_BTC = x_BTC - self.backout.to(x_BTC.dtype) * middle_BTC
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(rms_norm(x_BTC[:, keep]) / LOGIT_CAP).float().tanh() * LOGIT_CAP
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
