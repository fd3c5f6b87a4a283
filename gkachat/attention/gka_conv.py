"""gka_conv: Gaussian Kernel Attention on three short convolutions of one tensor x.

    q_i = conv_q(x)_i    k_j = conv_k(x)_j    v_j = conv_v(x)_j
    s_ij = -|q_i - k_j|^2 / (2 sigma^2) + log(f_(j+1) ... f_i)    y_i = gate_i sum_j softmax_j(s_ij) v_j

x is a learned sum of the block input and the embedding (`Attention.mixed`), and in the first layer the block input.
The forget gates f read x, and the output gates read the block input.

A token of published GKA attends to tokens like itself. Here the convolution of the keys starts as a delay, by 1, 2, 3,
1, ... tokens from head to head. A token then attends to what followed tokens like itself, as an induction head does
(arXiv 2209.11895), from the first training step on.

Forget gates f take the place of rotary positions (forget_gate.py). No key is rotated. Keys and values of cached tokens
can therefore be computed from x (`Taps`), and the cache keeps x in place of both. The query's own norm cancels in the
softmax. What remains of the scores is q.k / sigma^2 and a bias per key: the key's norm and what the gates make the head
forget. q is divided by sigma^2, and q and k leave three channels free for the bias, so that any softmax kernel can run
the layer. With H heads a layer's convolutions have 12 C - 24 H parameters, the forget gates C + 1 per head.
docs/experiments.md measures what each part is worth.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkachat.attention.base import Groups
from gkachat.attention.features import Rope, ShortConv, choose_features
from gkachat.attention.forget_gate import CHANNELS, ForgetGate
from gkachat.attention.gka import GaussianKernelAttention
from gkachat.attention.head_gate import HeadGate
from gkachat.attention.kernels import reference
from gkachat.attention.qkv import QKV, Taps
from gkachat.config import GPTConfig

SHARPNESS = 1.2  # for inputs of unit RMS, q.k / sigma^2 starts as sharp as softmax attention's logits


class GKAConv(GaussianKernelAttention):
    """Gaussian Kernel Attention on short convolutions of one tensor.

    The cache keeps that tensor, and a bias per key and head, in place of keys and values.
    """

    gaussian, forgets = False, True
    taps, lookback = ShortConv.TAPS, ShortConv.TAPS - 1

    def __init__(self, config: GPTConfig, index: int):
        super().__init__(config, index)
        self.unit_norm, self.include_self = False, True  # options of published GKA
        H, D = config.n_head, config.head_dim
        self.conv_q, self.conv_k = (ShortConv(H, D - CHANNELS) for _ in range(2))  # the others hold the key's bias
        self.conv_v = ShortConv(H, D)
        self.forget_gate = ForgetGate(config)
        self.head_gate = HeadGate(config)

    def inputs(self, x_BTC: Tensor) -> Tensor:
        """Return what the layer reads, split into heads, (B, T, H, D)."""
        return self.split_heads(x_BTC)

    def qkv(self, x_BSHD: Tensor, idx_BT: Tensor, rope: Rope) -> QKV:
        """Convolve the input three times, divide q by sigma^2, and give keys their biases.

        Cached keys are 0 in the channels of the bias, since these have no taps: while decoding, the cache's biases take
        their place.
        """
        T, new_BTHD = idx_BT.size(1), x_BSHD[:, -idx_BT.size(1) :]
        running_sum = self.forget_gate(new_BTHD.flatten(2))
        weights = (*(F.pad(conv.weight, (0, CHANNELS)) for conv in (self.conv_q, self.conv_k)), self.conv_v.weight)
        q, k, v, key_bias = self.features.compute(x_BSHD, weights, self.sigma.square().reciprocal(), running_sum, T)
        return QKV(q, k, v, taps=Taps(new_BTHD, *weights[1:]), key_bias=key_bias, running_sum=running_sum)

    def output(self, y_BTHD: Tensor, x_BTC: Tensor) -> Tensor:
        """Multiply each head by its gate."""
        return self.head_gate(y_BTHD, x_BTC)

    def squared_distances(self, q_BHTD: Tensor, k_BHSD: Tensor, qkv: QKV) -> Tensor:
        """Return |q_i - k_j|^2 of the features before q was divided by sigma^2."""
        q, k = (t[..., :-CHANNELS] for t in (q_BHTD, k_BHSD))
        return reference.squared_distances(q * self.sigma.square()[:, None, None], k)

    def choose_kernels(self, device: torch.device, dtype: torch.dtype) -> None:
        super().choose_kernels(device, dtype)
        self.features = choose_features(self.config.head_dim, device, dtype)

    def kernel_lines(self) -> list[str]:
        return [*super().kernel_lines(), f"features {self.features.name} ({self.features.reason})"]

    def init_weights(self) -> None:
        """Start keys as delays, queries and values as the identity, bandwidths at softmax attention's sharpness."""
        super().init_weights()
        nn.init.constant_(self.log_sigma, math.log(self.config.head_dim**0.25 / SHARPNESS))
        self.conv_q.init_weights()
        self.conv_k.init_weights(ShortConv.KEY_DELAYS)
        self.conv_v.init_weights()
        self.forget_gate.init_weights()
        self.head_gate.init_weights()

    def parameter_groups(self) -> Groups:
        return super().parameter_groups() | {
            "convolutions": [conv.weight for conv in (self.conv_q, self.conv_k, self.conv_v)],
            "gates": [self.head_gate.gate.weight, self.forget_gate.gate.weight],
            "forget_bias": [self.forget_gate.bias],
        }
