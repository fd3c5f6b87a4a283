"""gka_conv: Gaussian Kernel Attention on short convolutions of one tensor, which is all that decoding keeps of a token.

    r_t = rope(x_t)    q = norm(conv(r))    k = norm(conv(r))    v = conv(r)    s_ij = q_i . k_j / sigma^2
    y_i = gate_i rope^-1(sum_j softmax_j(s_ij) v_j)

A token of published GKA attends to tokens like itself. Here the convolution of the keys starts as a delay, by 1, 2, 3,
1, ... tokens from head to head. A token then attends to what followed tokens like itself, as an induction head does
(arXiv 2209.11895), from the first training step on. The features have one common norm, so the Gaussian kernel's
distance reduces to the dot product. The layer divides its queries by sigma^2, and is then softmax attention to every
kernel.

The rotation comes before the convolutions, so that keys and values of cached tokens can be read off r by tap (`Taps`),
without rotating them. Values are therefore rotated as well, and the output is rotated back. Half of the channels do not
rotate at all: this costs the positions nothing, and what a value says there does not depend on how far away it is. The
convolutions have 12 C parameters per layer. docs/experiments.md measures what each part is worth.
"""

import math

import torch
from torch import Tensor, nn

from gkachat.attention.base import Groups
from gkachat.attention.features import Rope, ShortConv, apply_rope, choose_features
from gkachat.attention.gka import GaussianKernelAttention
from gkachat.attention.head_gate import HeadGate
from gkachat.attention.kernels import reference
from gkachat.attention.qkv import QKV, Taps
from gkachat.config import GPTConfig

SHARPNESS = 1.2  # q.k / sigma^2 starts as sharp as softmax attention's logits


def every_other(rope: Rope) -> Rope:
    """Return every other column of the tables, which rotate half of the channels, from the fastest to the slowest."""
    return rope[0][..., ::2], rope[1][..., ::2]


class GKAConv(GaussianKernelAttention):
    """Gaussian Kernel Attention on short convolutions of the rotated block input. Caches that one tensor."""

    gaussian = False
    taps, lookback = ShortConv.TAPS, ShortConv.TAPS - 1

    def __init__(self, config: GPTConfig, index: int):
        super().__init__(config, index)
        self.unit_norm, self.include_self = False, True  # options of published GKA
        self.conv_q, self.conv_k, self.conv_v = (ShortConv(config.n_head, config.head_dim) for _ in range(3))
        self.head_gate = HeadGate(config)

    def inputs(self, x_BTC: Tensor, rope: Rope) -> Tensor:
        """Return the block input, split into heads and rotated, (B, T, H, D)."""
        return apply_rope(self.split_heads(x_BTC), every_other(rope))

    def qkv(self, r_BSHD: Tensor, idx_BT: Tensor, rope: Rope) -> QKV:
        """Convolve the rotated input three times, normalise what is compared, and divide q by sigma^2.

        A softmax kernel's backward lacks the derivative of the norms. That part of the gradient is parallel to the
        feature, and the backward of the norm removes it.
        """
        weights = self.conv_q.weight, self.conv_k.weight, self.conv_v.weight
        gain_H, T = self.sigma.square().reciprocal(), idx_BT.size(1)
        q, k, v, key_scales = self.features.compute(r_BSHD, weights, gain_H, T)
        return QKV(q, k, v, taps=Taps(r_BSHD[:, -T:], *weights[1:], key_scales))

    def output(self, y_BTHD: Tensor, x_BTC: Tensor, rope: Rope) -> Tensor:
        """Rotate back, and multiply each head by its gate."""
        cos, sin = every_other(rope)
        return self.head_gate(apply_rope(y_BTHD, (cos, -sin)), x_BTC)

    def squared_distances(self, q_BHTD: Tensor, k_BHSD: Tensor, qkv: QKV) -> Tensor:
        """Return |q_i - k_j|^2 of the features before q was divided by sigma^2."""
        return reference.squared_distances(q_BHTD * self.sigma.square()[:, None, None], k_BHSD)

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
        self.head_gate.init_weights()

    def parameter_groups(self) -> Groups:
        convolutions = [conv.weight for conv in (self.conv_q, self.conv_k, self.conv_v)]
        return super().parameter_groups() | {"convolutions": convolutions, "gates": [self.head_gate.gate.weight]}
