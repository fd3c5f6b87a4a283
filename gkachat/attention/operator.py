"""The Gaussian kernel operator: its definition, and the fast route that computes the very same thing.

    f_i = R_i x_i (rope) or x_i;   s_ij = -||f_i - f_j||^2 / (2 sigma_h^2);   y_i = sum_j softmax_j(s_ij) x_j

A row's own norm cancels in the softmax, which leaves ordinary attention with one bias per key:

    y = softmax_j(f_i . f_j / sigma^2 - ||f_j||^2 / (2 sigma^2)) x

so appending the bias to the keys, and a one to the queries, hands GKA to any fused softmax attention kernel.
Source: arXiv 2605.02144. Axes: B batch, T query time, S key time, H heads, D head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gkachat.attention.features import Rope, apply_rope
from gkachat.attention.fused import visible, windowed_attention


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
    """Kernel-weighted mean of each head's own channels over the visible tokens.

    Args:
        x: (B, T, H, D), features and payload in one; any floating dtype.
        sigma: (H,), bandwidths above 0, in the units of x.
        window: how many positions are seen, the token itself counted: 0 <= i - j < window when causal,
            |i - j| < window otherwise. None: no limit.
        causal: see j <= i only.
        rope: (cos, sin), each (T, D/2): rotates what is compared, never what is averaged.
        include_self: whether i is among its own keys. A row left without a key gives zeros.
        backend: "reference" (the definition, distances taken one by one), "sdpa" (fused softmax attention
            through the identity above), "auto" (the fastest that is exact here).

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
    if backend not in BACKENDS:
        raise ValueError(f"backend: given {backend!r}, expected one of {', '.join(BACKENDS)}")
    return BACKENDS[backend](x, sigma, window, causal, rope, include_self)


def _reference(
    x: Tensor, sigma: Tensor, window: int | None, causal: bool, rope: Rope | None, include_self: bool
) -> Tensor:
    """The definition, in float32 at least: all T x T distances, from differences and not from norms."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, sigma.dtype), torch.float32)
    x_BHTD = x.to(dtype).transpose(1, 2)
    f_BHTD = (x.to(dtype) if rope is None else apply_rope(x.to(dtype), rope)).transpose(1, 2)
    distances_BHTS = torch.cdist(f_BHTD, f_BHTD, compute_mode="donot_use_mm_for_euclid_dist")
    scores_BHTS = -distances_BHTS.square() / (2 * sigma.to(dtype).square()[:, None, None])
    mask = visible(x.size(1), window, causal, include_self, x.device)
    keyless = ~mask.any(dim=1, keepdim=True)
    weights_BHTS = scores_BHTS.masked_fill(~mask, -torch.inf).masked_fill(keyless, 0).softmax(dim=-1)
    return (weights_BHTS.masked_fill(keyless, 0) @ x_BHTD).transpose(1, 2).to(x.dtype)


def _sdpa(x: Tensor, sigma: Tensor, window: int | None, causal: bool, rope: Rope | None, include_self: bool) -> Tensor:
    """Fused softmax attention on q = (f / sigma, 1 ...), k = (f / sigma, bias ...), v = (x, 0 ...)."""
    D = x.size(-1)
    wide = torch.promote_types(x.dtype, torch.float32)  # norms and bandwidths are never taken in half precision
    f = x if rope is None else apply_rope(x, rope)
    q = (f.to(wide) / sigma.to(wide)[:, None]).to(x.dtype)
    # The norm is that of the very numbers that enter the dot product: only then do rounding errors cancel.
    bias = -0.5 * q.to(wide).square().sum(dim=-1, keepdim=True)
    high = bias.to(x.dtype)
    columns = [high] if x.dtype == wide else [high, (bias - high.to(wide)).to(x.dtype)]
    # Kernels want head sizes in multiples of 8, and want v as wide as q and k.
    zeros = x.new_zeros(*x.shape[:-1], -(D + len(columns)) % 8)
    ones = x.new_ones(*x.shape[:-1], len(columns))
    k = torch.cat((q, *columns, zeros), dim=-1)
    v = F.pad(x, (0, k.size(-1) - D))
    q = torch.cat((q, ones, zeros), dim=-1)
    y = windowed_attention(q, k, v, window=window, causal=causal, include_self=include_self, scale=1.0)
    return y[..., :D]


BACKENDS = {"auto": _sdpa, "sdpa": _sdpa, "reference": _reference}
