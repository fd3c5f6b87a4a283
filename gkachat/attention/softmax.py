"""Softmax attention, the nanochat baseline."""

from torch import Tensor, nn

from gkachat.attention.base import Attention, Groups
from gkachat.attention.features import Rope, ShortConv, apply_rope, rms_norm
from gkachat.attention.head_gate import HeadGate
from gkachat.attention.linear import Linear, uniform_
from gkachat.attention.qkv import QKV
from gkachat.attention.value_embedding import ValueEmbedding
from gkachat.config import GPTConfig

QK_SCALE = 1.2  # sharpens the logits of normalised queries and keys


class SoftmaxAttention(Attention):
    """Scaled dot-product attention with rotary positions, normalised queries and keys, and gated value embeddings.

    `config.short_conv` adds short convolutions of queries, keys and values, and a gate on each head's output. With
    `attention_x0` and without value embeddings, a run then compares like for like with gka_conv. Forget gates in place
    of rotation make softmax worse (docs/experiments.md).
    """

    def __init__(self, config: GPTConfig, index: int):
        super().__init__(config, index)
        C = config.n_embd
        self.c_q, self.c_k, self.c_v = (Linear(C, C) for _ in range(3))
        self.value_embedding = ValueEmbedding(config) if ValueEmbedding.in_layer(config, index) else None
        self.convs, self.head_gate = None, None
        if config.short_conv:
            self.head_gate = HeadGate(config)
            self.convs = nn.ModuleList(ShortConv(config.n_head, config.head_dim) for _ in range(3))
            self.lookback = ShortConv.TAPS - 1

    def qkv(self, x_BTC: Tensor, idx_BT: Tensor | None, rope: Rope | None) -> QKV:
        """Project, convolve, add value embeddings, rotate and normalise."""
        q, k, v = (self.split_heads(projection(x_BTC)) for projection in (self.c_q, self.c_k, self.c_v))
        if self.convs is not None:
            T = idx_BT.size(1)
            q, k, v = (conv(t, T) for conv, t in zip(self.convs, (q, k, v), strict=True))
            x_BTC = x_BTC[:, -T:]
        if self.value_embedding is not None:
            v = self.value_embedding(v, x_BTC, idx_BT)
        q, k = (QK_SCALE * rms_norm(apply_rope(t, rope)) for t in (q, k))
        return QKV(q, k, v, scale=self.config.head_dim**-0.5)

    def output(self, y_BTHD: Tensor, x_BTC: Tensor) -> Tensor:
        return y_BTHD if self.head_gate is None else self.head_gate(y_BTHD, x_BTC)

    def init_weights(self) -> None:
        """Fill projections uniformly with standard deviation 1 / sqrt(C); convolutions start as in gka_conv."""
        super().init_weights()
        for projection in (self.c_q, self.c_k, self.c_v):
            uniform_(projection.weight, projection.in_features**-0.5)
        if self.value_embedding is not None:
            self.value_embedding.init_weights()
        if self.convs is not None:
            for conv, delays in zip(self.convs, ((0,), ShortConv.KEY_DELAYS, (0,)), strict=True):
                conv.init_weights(delays)
            self.head_gate.init_weights()

    def parameter_groups(self) -> Groups:
        groups = super().parameter_groups()
        groups["matrices"] = [m.weight for m in (self.c_q, self.c_k, self.c_v, self.c_proj)]
        if self.convs is not None:
            groups["convolutions"] = [conv.weight for conv in self.convs]
            groups["gates"] = [self.head_gate.gate.weight]
        if self.value_embedding is not None:
            for name, parameters in self.value_embedding.parameter_groups().items():
                groups.setdefault(name, []).extend(parameters)
        return groups
