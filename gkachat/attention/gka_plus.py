"""gka_plus: Gaussian Kernel Attention with short convolutions, rotation and normalised features, and no projection.

    q = norm(rope(conv(x)))    k = norm(rope(conv(x)))    v = conv(x)    s_ij = q_i . k_j / sigma^2

A token of published GKA attends to tokens like itself. Here the convolution of the keys starts as a delay, by 1, 2, 3,
1, ... tokens from head to head. A token then attends to what followed tokens like itself, as an induction head does
(arXiv 2209.11895), from the first training step on. The features have one common norm, so the Gaussian kernel's
distance reduces to the dot product. The layer divides its queries by sigma^2, and is then softmax attention to every
kernel and cache. The convolutions have 12 C parameters per layer. docs/experiments.md measures what each addition is
worth.
"""

import math

import torch
from torch import Tensor, nn

from gkachat.attention.base import Groups
from gkachat.attention.features import Rope, ShortConv, choose_features
from gkachat.attention.gka import GaussianKernelAttention
from gkachat.attention.kernels import reference
from gkachat.attention.qkv import QKV
from gkachat.attention.value_embedding import ValueEmbedding
from gkachat.config import GPTConfig

SHARPNESS = 1.2  # q.k / sigma^2 starts as sharp as softmax attention's logits


class GKAPlus(GaussianKernelAttention):
    """Gaussian Kernel Attention on convolved, rotated, normalised features. Caches keys and values."""

    shares_kv, gaussian = False, False
    lookback = ShortConv.TAPS - 1

    def __init__(self, config: GPTConfig, index: int):
        super().__init__(config, index)
        self.unit_norm, self.include_self = False, True  # options of published GKA
        self.conv_q, self.conv_k, self.conv_v = (ShortConv(config.n_head, config.head_dim) for _ in range(3))
        self.value_embedding = ValueEmbedding(config) if ValueEmbedding.in_layer(config, index) else None

    def qkv(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope) -> QKV:
        """Convolve the block input three times; rotate and normalise what is compared; divide q by sigma^2.

        A softmax kernel's backward lacks the derivative of the norms. That part of the gradient is parallel to the
        feature, and the backward of the norm removes it.
        """
        weights = self.conv_q.weight, self.conv_k.weight, self.conv_v.weight
        gain_H = self.sigma.square().reciprocal()
        q, k, v = self.features.compute(self.split_heads(x_BTC), weights, gain_H, rope)
        if self.value_embedding is not None:
            v = self.value_embedding(v, x_BTC[:, -idx_BT.size(1) :], idx_BT)
        return QKV(q, k, v)

    def squared_distances(self, q_BHTD: Tensor, k_BHSD: Tensor, qkv: QKV) -> Tensor:
        """Return |q_i - k_j|^2 of the features before q was divided by sigma^2."""
        return reference.squared_distances(q_BHTD * self.sigma.square()[:, None, None], k_BHSD)

    def choose_kernels(self, device: torch.device, dtype: torch.dtype) -> None:
        super().choose_kernels(device, dtype)
        self.features = choose_features(self.config.head_dim, device, dtype)

    def kernel_lines(self) -> list[str]:
        return [*super().kernel_lines(), f"features {self.features.name} ({self.features.reason})"]

    def init_weights(self) -> None:
        """Start keys as delays, queries and values as the identity, and bandwidths at softmax attention's sharpness."""
        super().init_weights()
        nn.init.constant_(self.log_sigma, math.log(self.config.head_dim**0.25 / SHARPNESS))
        self.conv_q.init_weights()
        self.conv_k.init_weights(ShortConv.KEY_DELAYS)
        self.conv_v.init_weights()
        if self.value_embedding is not None:
            self.value_embedding.init_weights()

    def parameter_groups(self) -> Groups:
        groups = super().parameter_groups()
        groups["convolutions"] = [conv.weight for conv in (self.conv_q, self.conv_k, self.conv_v)]
        return groups if self.value_embedding is None else groups | self.value_embedding.parameter_groups()
