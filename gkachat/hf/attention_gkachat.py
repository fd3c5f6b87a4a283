"""Attention of gkachat's GPT for transformers: softmax, gka and gka_conv, one class each over a common one.

Shapes: B batch, T new tokens, S tokens in the cache and new, H heads, D head_dim, C channels.
MIT License, the gkachat developers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from .configuration_gkachat import TAPS, GkachatConfig
from .positions_gkachat import Positions, RecentInputs, Span

QK_SCALE = 1.2  # sharpens the logits of unit queries and keys
GATE_CHANNELS = 12  # block-input channels that the gates of values and heads read
BIAS_CHANNELS = 3  # of a key, that hold its bias: three numbers in bfloat16 have the precision of float32
FEW = 8  # new tokens from which on gka_conv makes all keys and values anew, in place of reading its cache by tap
EPS = torch.finfo(torch.float32).eps


def rms_norm(x: Tensor, gain: float = 1.0) -> Tensor:
    wide = x.float()
    return (wide * ((wide.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * gain)).to(x.dtype)


def in_parts(x: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Return x (..., 1) as n numbers of a dtype that add up to it, (..., n): each rounds what those before it left."""
    parts = []
    for _ in range(n):
        parts.append(x.to(dtype))
        x = x - parts[-1].to(x.dtype)
    return torch.cat(parts, dim=-1)


def linear(n_in: int, n_out: int) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=False)


def parameter(n: int) -> nn.Parameter:
    """Return n numbers that stay in float32, also in a model of another dtype."""
    return nn.Parameter(torch.zeros(n, dtype=torch.float32))


def attention_weights(scores: Tensor, span: Span) -> Tensor:
    """Return the softmax of the scores (B, H, T, S) over the keys that each query sees."""
    if span.visible is not None:
        scores = scores.masked_fill(~span.visible, -torch.inf)
    weights = scores.softmax(dim=-1)
    return weights if span.keyless is None else weights.masked_fill(span.keyless, 0)


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, span: Span
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale q.k + bias) v, (B, H, T, D), and the weights, (B, H, T, S) float32."""
    scores = q.float() @ k.float().mT * scale
    if bias is not None:
        scores = scores + bias.mT
    weights = attention_weights(scores, span)
    return weights.to(v.dtype) @ v, weights


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, span: Span
) -> tuple[Tensor, None]:
    """Return what `eager_attention` returns, without weights, from torch's fused kernels."""
    T, D = q.size(2), v.size(-1)
    if bias is not None and T == 1:  # nothing to fuse, and no copy of the keys
        return eager_attention(q, k, v, scale, bias, span)[0], None
    if bias is not None:
        # Keys get the bias as more channels, and queries ones. A mask would need the dtype of the queries, and bfloat16
        # rounds a running sum of 100 to 0.5. Kernels want head sizes in multiples of 8, and values as wide as keys.
        zeros = k.new_zeros(*k.shape[:-1], -(k.size(-1) + BIAS_CHANNELS) % 8)
        q = torch.cat((q, q.new_ones(*q.shape[:-1], BIAS_CHANNELS), zeros[:, :, -T:]), dim=-1)
        k = torch.cat((k, in_parts(bias, BIAS_CHANNELS, k.dtype), zeros), dim=-1)
        v = F.pad(v, (0, k.size(-1) - D))
    is_causal = span.visible is None and T > 1
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=span.visible, is_causal=is_causal, scale=scale)[..., :D]
    return y if span.keyless is None else y.masked_fill(span.keyless, 0), None


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


class ShortConv(nn.Module):
    """Causal convolution of each channel over its last TAPS tokens: y_t = sum_n w_n x_(t-n)."""

    def __init__(self, n_head: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(TAPS, n_head, head_dim))

    def forward(self, x_BTC: Tensor, before: list[Tensor]) -> Tensor:
        return sum(x * weight.flatten() for x, weight in zip((x_BTC, *before), self.weight, strict=True))


class HeadGate(nn.Module):
    """Multiplies the output of each head by 2 sigmoid(W x[:12]) of the token."""

    def __init__(self, config: GkachatConfig):
        super().__init__()
        self.gate = linear(GATE_CHANNELS, config.num_attention_heads)

    def forward(self, y_BHTD: Tensor, x_BTC: Tensor) -> Tensor:
        return (2 * torch.sigmoid(self.gate(x_BTC[..., :GATE_CHANNELS]))).mT[..., None] * y_BHTD


class ForgetGate(nn.Module):
    """Makes each head forget: a token multiplies the weights of all tokens before it by f = sigmoid(W x + b)."""

    def __init__(self, config: GkachatConfig):
        super().__init__()
        self.gate = linear(config.hidden_size, config.num_attention_heads)
        self.bias = parameter(config.num_attention_heads)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return -log f, (B, H, T, 1) float32."""
        return -F.logsigmoid(self.gate(x_BTC).float() + self.bias).mT[..., None]


class Attention(nn.Module):
    """Attention to the cached tokens, softmax(scale q.k + bias) v, and the output projection.

    A variant defines `qkv`, and `compared` where its cache keeps something else than keys and values.
    """

    has_convs = False
    scale = 1.0

    def __init__(self, config: GkachatConfig, index: int):
        super().__init__()
        self.config, self.index = config, index
        self.window = config.window if config.layer_types[index] == "sliding_attention" else None
        self.c_proj = linear(config.hidden_size, config.hidden_size)
        # The first layer's residual stream is the embedding.
        self.input_mix = parameter(2) if config.attention_x0 and index else None
        self.head_gate: HeadGate | None = None

    def qkv(
        self, x_BTC: Tensor, idx_BT: Tensor | None, positions: Positions, recent: RecentInputs | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of the new tokens, (B, H, T, *). The cache keeps the last two."""
        raise NotImplementedError

    def compared(
        self, q: Tensor, keys: Tensor, values: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return q, and k, v and the bias (B, H, S, 1) of all tokens, from what the cache keeps of them."""
        return q, keys, values, None

    def forward(
        self,
        x_BTC: Tensor,
        x0_BTC: Tensor,
        idx_BT: Tensor | None,
        positions: Positions,
        cache: DynamicCache | None,
        output_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what is added to the residual stream, and the weights where they are asked for.

        Args:
            x_BTC: the normalised residual stream.
            x0_BTC: the embedding, after its norm and smear.
        """
        input_BTC = x_BTC
        if self.input_mix is not None:
            x_share, x0_share = self.input_mix.to(x_BTC.dtype)
            input_BTC = x_share * x_BTC + x0_share * x0_BTC
        y_BHTD, weights = self.heads(input_BTC, idx_BT, positions, cache, output_weights)
        if self.head_gate is not None:
            y_BHTD = self.head_gate(y_BHTD, x_BTC)
        return self.c_proj(y_BHTD.transpose(1, 2).flatten(2)), weights if output_weights else None

    def heads(
        self,
        x_BTC: Tensor,
        idx_BT: Tensor | None,
        positions: Positions,
        cache: DynamicCache | None,
        output_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mean of the values, (B, H, T, D), and the weights (B, H, T, S) where they are asked for."""
        recent = None
        if cache is not None and self.has_convs:
            recent = cache.layers[self.config.num_hidden_layers + 1 + self.index]
        q, k, v = self.qkv(x_BTC, idx_BT, positions, recent)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        return self.attend(*self.compared(q, k, v, positions), positions, output_weights)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, positions: Positions, output_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return softmax(scale q.k + bias) v over the keys that the new tokens see, and the weights."""
        is_sdpa = self.config._attn_implementation == "sdpa" and not output_weights
        attend, parts = (sdpa_attention if is_sdpa else eager_attention), []
        for span in positions.spans(k.size(2), self.window, is_sdpa, not output_weights):
            part_of_bias = None if bias is None else bias[:, :, span.keys]
            of_queries, of_keys = q[:, :, span.queries], (t[:, :, span.keys] for t in (k, v))
            y, weights = attend(of_queries, *of_keys, self.scale, part_of_bias, span)
            parts.append(y)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2), weights

    def split_heads(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, H, T, D)."""
        return x_BTC.unflatten(-1, (self.config.num_attention_heads, self.config.head_dim)).transpose(1, 2)


class SoftmaxAttention(Attention):
    """Softmax attention with rotary positions and normalised queries and keys."""

    def __init__(self, config: GkachatConfig, index: int):
        super().__init__(config, index)
        C = config.hidden_size
        self.scale, self.has_convs = config.head_dim**-0.5, config.short_conv
        self.c_q, self.c_k, self.c_v = linear(C, C), linear(C, C), linear(C, C)
        self.convs = None
        if config.short_conv:
            self.convs = nn.ModuleList(ShortConv(config.num_attention_heads, config.head_dim) for _ in range(3))
        self.head_gate = HeadGate(config) if config.short_conv else None
        self.value_embedding = ValueEmbedding(config) if index in config.value_embedding_layers else None

    def qkv(
        self, x_BTC: Tensor, idx_BT: Tensor | None, positions: Positions, recent: RecentInputs | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.c_q(x_BTC), self.c_k(x_BTC), self.c_v(x_BTC)
        if self.convs is not None:
            before = positions.before(torch.cat(qkv, dim=-1), TAPS - 1, recent)
            before = zip(*(x.chunk(3, dim=-1) for x in before), strict=True)
            qkv = [conv(x, past) for conv, x, past in zip(self.convs, qkv, before, strict=True)]
        q, k, v = map(self.split_heads, qkv)
        if self.value_embedding is not None:
            v = v + self.value_embedding(x_BTC, idx_BT)
        return rms_norm(positions.rotate(q), QK_SCALE), rms_norm(positions.rotate(k), QK_SCALE), v


class GaussianKernelAttention(Attention):
    """Mean of the visible tokens, weighted by exp(-|x_i - x_j|^2 / (2 sigma^2)) with one bandwidth sigma per head.

    The query's own norm cancels in that mean, which leaves softmax attention with a bias for each key's norm. The
    cache keeps the input as keys; its values have no channels.
    """

    def __init__(self, config: GkachatConfig, index: int):
        super().__init__(config, index)
        self.log_sigma = parameter(config.num_attention_heads)

    def qkv(
        self, x_BTC: Tensor, idx_BT: Tensor | None, positions: Positions, recent: RecentInputs | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self.split_heads(x_BTC)
        x = rms_norm(x) if self.config.gka_normalize else x
        return x, x, x[..., :0]

    def compared(
        self, q: Tensor, keys: Tensor, values: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        k = positions.rotate(keys) if self.config.gka_rope else keys
        k = (k.float() * (-self.log_sigma.float()).exp()[:, None, None]).to(keys.dtype)
        # The norm must be that of the rounded numbers that enter the dot product: only then do rounding errors cancel.
        bias = -0.5 * k.float().square().sum(dim=-1, keepdim=True)
        return k[:, :, -positions.n_new :], k, keys, bias


class GKAConv(Attention):
    """GKA on short convolutions of its input x, with a forget gate per head and a gate on each head's output.

    The bias of a key is the running sum of -log f, which takes the place of positions (FoX, arXiv 2503.02130), less
    |k|^2 / (2 sigma^2). The cache keeps x as keys, and the biases as values.
    """

    def __init__(self, config: GkachatConfig, index: int):
        super().__init__(config, index)
        H, D = config.num_attention_heads, config.head_dim
        self.conv_q, self.conv_k = (ShortConv(H, D - BIAS_CHANNELS) for _ in range(2))
        self.conv_v = ShortConv(H, D)
        self.forget_gate, self.head_gate = ForgetGate(config), HeadGate(config)
        self.log_sigma = parameter(H)

    @property
    def taps(self) -> list[Tensor]:
        """The weights of the convolutions for queries, keys and values, (TAPS, H, D) each; queries get 1 / sigma^2."""
        free = (0, BIAS_CHANNELS)
        query_weight = (self.conv_q.weight * self.inverse_sigma_squared).to(self.conv_q.weight.dtype)
        return [F.pad(query_weight, free), F.pad(self.conv_k.weight, free), self.conv_v.weight]

    @property
    def inverse_sigma_squared(self) -> Tensor:
        """1 / sigma^2 of each head, (H, 1) float32."""
        return (-2 * self.log_sigma.float()).exp()[:, None]

    def heads(
        self,
        x_BTC: Tensor,
        idx_BT: Tensor | None,
        positions: Positions,
        cache: DynamicCache | None,
        output_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        x, T = positions.mask(self.split_heads(x_BTC)), x_BTC.size(1)
        running_sum = positions.mask(self.forget_gate(x_BTC)).cumsum(dim=2)  # padding makes nothing forget
        taps, known, n_convolved = self.taps, x, T
        past = None if cache is None else cache.layers[self.index]
        if past is not None and past.is_initialized and past.keys.size(2):
            # The slot before the new ones is convolved too: its bias and its norm give the running sum up to it.
            known = torch.cat((past.keys if positions.has_holes else past.keys[:, :, -TAPS:], x), dim=2)
            n_convolved = T + 1
        q, k, v = positions.convolve(known, taps, n_convolved)
        half_square = self.half_square(k)
        if n_convolved > T:
            running_sum = running_sum + past.values[:, :, -1:].view(torch.float32) + half_square[:, :, :1]
            q, k, v, half_square = (t[:, :, 1:] for t in (q, k, v, half_square))
        bias = (running_sum - half_square).contiguous()
        if cache is not None:  # a running sum needs 4 bytes: in a model with 2, two numbers hold their bits
            x, values = cache.update(x, bias.view(x.dtype) if x.element_size() == 2 else bias, self.index)
            bias = values.view(torch.float32)
        S = x.size(2)
        if S > T and T < FEW and not positions.has_holes:
            return self.attend_by_tap(q, x, taps, bias, positions.spans(S, self.window, False, True)[0])
        k, v = (k, v) if S == T else positions.convolve(x, taps[1:], S)
        q, k = (t[..., :-BIAS_CHANNELS] for t in (q, k))
        return self.attend(q, k, v, bias, positions, output_weights)

    def half_square(self, k: Tensor) -> Tensor:
        """Return |k|^2 / (2 sigma^2) of each key, (B, H, T, 1) float32."""
        return 0.5 * self.inverse_sigma_squared[:, None] * k.float().square().sum(dim=-1, keepdim=True)

    def attend_by_tap(
        self, q: Tensor, x: Tensor, taps: list[Tensor], bias: Tensor, span: Span
    ) -> tuple[Tensor, Tensor]:
        """Return what `attend` returns, without making keys and values of x.

        Since q.(w x) = (w q).x, a query becomes one for each tap, whose scores are added up over neighbours.
        """
        first = max(0, span.keys.start - TAPS + 1)
        n_missing = TAPS - 1 - span.keys.start + first  # tokens before the text
        x, bias = x[:, :, first : span.keys.stop], bias[:, :, span.keys]
        key_weight, value_weight = (weight.transpose(0, 1)[:, None] for weight in taps[1:])
        by_tap = (q[:, :, :, None] * key_weight.flip(2)).flatten(2, 3)  # (B, H, T N, D), oldest first
        products = F.pad((x @ by_tap.mT).float(), (0, 0, n_missing, 0)).unflatten(-1, (-1, TAPS))  # (B, H, N-1+S, T, N)
        of_each_key = products.unfold(2, TAPS, 1).diagonal(dim1=-2, dim2=-1)  # tap n with the n-th of N tokens
        weights = attention_weights((of_each_key.sum(dim=-1) + bias).mT, span)
        n = weights.size(-1) + TAPS - 1
        by_tap = F.pad(weights.to(x.dtype), (TAPS - 1, TAPS - 1)).unfold(-1, n, 1)  # (B, H, T, N, N-1+S), newest first
        sums = by_tap[..., n_missing:].flatten(2, 3) @ x
        return (sums.unflatten(2, (-1, TAPS)) * value_weight).sum(dim=3), weights


ATTENTIONS = {"softmax": SoftmaxAttention, "gka": GaussianKernelAttention, "gka_conv": GKAConv}
