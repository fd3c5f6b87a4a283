"""Gaussian Kernel Attention (arXiv 2605.02144): the operator, and the layer as published.

    f_i = R_i x_i (rope) or x_i;   s_ij = -|f_i - f_j|^2 / (2 sigma_h^2);   y_i = sum_j softmax_j(s_ij) x_j

x is the block input, split into heads. There are no query, key or value projections.
"""

import math

import torch
from torch import Tensor, nn

from gkachat.attention.base import Attention, Groups
from gkachat.attention.features import Rope, apply_rope, rms_norm
from gkachat.attention.kernels.choose import KernelSpec, choose_kernel
from gkachat.attention.qkv import QKV
from gkachat.config import GPTConfig


def gaussian_kernel_attention(
    x: Tensor,
    sigma: Tensor,
    *,
    window: int | None = None,
    causal: bool = True,
    rope: Rope | None = None,
    include_self: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Return the kernel-weighted mean of each head's own channels over the visible tokens.

    Args:
        x: (B, T, H, D), both what is compared and what is averaged; any floating dtype.
        sigma: (H,), bandwidths above 0, in the units of x.
        window: number of visible positions, the token itself included: 0 <= i - j < window when causal,
            |i - j| < window otherwise. None: no limit.
        causal: whether i sees only j <= i.
        rope: (cos, sin), each (T, D/2), rotates what is compared and never what is averaged. The direction is
            nanochat's, (a, b) -> (a cos + b sin, b cos - a sin) for channels a = x[i] and b = x[i + D/2]. RoFormer and
            transformers rotate the other way: give them the negative of their sin.
        include_self: whether i is among its own keys. A row without a key gives zeros.
        backend: "reference" (the definition), "sdpa" (softmax attention kernels with a bias per key), "triton" (a
            fused kernel; bfloat16 or float32, heads of 64 or 128, on a GPU or under TRITON_INTERPRET=1), or "auto"
            (the fastest that can run).

    Returns:
        (B, T, H, D) in the dtype of x, differentiable in x and sigma.

    Raises:
        ValueError: for shapes, a window or a backend that do not fit.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x: given {tuple(x.shape)} {x.dtype}, expected a floating (B, T, H, D)")
    _, T, H, D = x.shape
    if sigma.shape != (H,):
        raise ValueError(f"sigma: given shape {tuple(sigma.shape)}, expected one bandwidth for each of {H} heads")
    if window is not None and window < 1:
        raise ValueError(f"window: given {window}, expected 1 or more, or None")
    if rope is not None and any(table.shape != (T, D // 2) for table in rope):
        raise ValueError(f"rope: given {[tuple(t.shape) for t in rope]}, expected (cos, sin) of shape {(T, D // 2)}")
    spec = KernelSpec(D, T, window, causal, include_self, gaussian=True, backend=backend)
    f = apply_rope(x, rope)
    return choose_kernel(spec, x.device, x.dtype).attend(QKV(f, f, x, sigma=sigma))


class GaussianKernelAttention(Attention):
    """Gaussian Kernel Attention as published: one learned bandwidth per head and the output projection.

    The layer learns the logarithm of each bandwidth, in float32, so that bandwidths stay above 0. They start at
    sqrt(D/2). A token then has weight 1 on itself and, where features are independent and of unit variance, exp(-2) on
    another token.
    """

    shares_kv = True
    gaussian = True

    def __init__(self, config: GPTConfig, index: int):
        super().__init__(config, index)
        self.log_sigma = nn.Parameter(torch.empty(config.n_head))
        self.unit_norm = config.gka.normalize
        self.include_self = config.gka.include_self
        self.backend = config.gka.backend

    @property
    def sigma(self) -> Tensor:
        """(H,) bandwidths, in the units of the features."""
        return self.log_sigma.exp()

    def qkv(self, x_BTC: Tensor, idx_BT: Tensor | None, rope: Rope | None) -> QKV:
        """Return the block input, split into heads, as queries, keys and values."""
        options, x = self.config.gka, self.split_heads(x_BTC)
        if options.normalize:
            x = rms_norm(x)
        if not options.rope:
            return QKV(x, x, x, sigma=self.sigma)
        f = apply_rope(x, rope)
        return QKV(f, f, x, sigma=self.sigma, unrotated_k=x)

    def init_weights(self) -> None:
        """Start every bandwidth at sqrt(D/2)."""
        super().init_weights()
        nn.init.constant_(self.log_sigma, 0.5 * math.log(self.config.head_dim / 2))

    def parameter_groups(self) -> Groups:
        return super().parameter_groups() | {"log_sigma": [self.log_sigma]}

    def statistics(self) -> dict[str, Tensor]:
        """Return the smallest, median and largest bandwidth, and that of every head."""
        sigma = self.sigma.detach()
        return {"sigma": torch.stack((sigma.min(), sigma.median(), sigma.max())), "sigma_by_head": sigma}
