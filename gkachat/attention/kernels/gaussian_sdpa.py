"""Gaussian Kernel Attention through softmax attention kernels.

The norm of a query cancels in the softmax. Ordinary attention with one bias per key remains (arXiv 2605.02144):

    y_i = sum_j softmax_j(f_i . f_j / sigma^2 - |f_j|^2 / (2 sigma^2)) x_j

Any softmax kernel can compute this: the keys get the bias as one more channel, and the queries a 1. Features of one
common norm need no bias.
Axes: B batch, T time, H heads, D head_dim.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gkachat.attention.features import cast
from gkachat.attention.kernels.reference import visible
from gkachat.attention.kernels.window_cpu import window_attention
from gkachat.attention.qkv import QKV


def attend_unit_norm(qkv: QKV, *, softmax_attend: Callable[[QKV], Tensor]) -> Tensor:
    """Return Gaussian attention of queries and keys that all have the same norm, (B, T, H, D).

    The biases of the keys are equal and cancel. The backward of the softmax kernel lacks the derivative of the norms.
    That part of the gradient is parallel to the feature, and the backward of the preceding RMSNorm removes it.
    """
    inverse = qkv.sigma.square().reciprocal()[:, None]
    return softmax_attend(QKV((qkv.q * inverse).to(qkv.q.dtype), qkv.k, qkv.v))


def attend(qkv: QKV, *, window: int | None, causal: bool, include_self: bool) -> Tensor:
    """Return Gaussian attention where queries and keys are one tensor, (B, T, H, D). It reads qkv.k and not qkv.q."""
    q, k, v = bias_as_channels(qkv)
    y = _softmax_attention(q, k, v, window=window, causal=causal, include_self=include_self)
    return y[..., : qkv.v.size(-1)]


def bias_as_channels(qkv: QKV) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v for which softmax attention with scale 1 is Gaussian attention of qkv.k and qkv.v.

    They have more channels than D, of which the output's first D count.
    """
    x, D = qkv.v, qkv.k.size(-1)
    q, bias = scaled_with_bias(qkv)
    high = bias.to(x.dtype)
    # In half precision, one column would round the bias by 4e-3. A second column holds the rounding error.
    columns = [high] if x.dtype == bias.dtype else [high, (bias - high.to(bias.dtype)).to(x.dtype)]
    # Kernels want head sizes in multiples of 8, and want v as wide as q and k.
    zeros = x.new_zeros(*x.shape[:-1], -(D + len(columns)) % 8)
    ones = x.new_ones(*x.shape[:-1], len(columns))
    k = torch.cat((q, *columns, zeros), dim=-1)
    return torch.cat((q, ones, zeros), dim=-1), k, F.pad(x, (0, k.size(-1) - D))


def scaled_with_bias(qkv: QKV) -> tuple[Tensor, Tensor]:
    """Return q = k / sigma, and the bias -|q|^2 / 2 of each key, (B, T, H, 1) in float32 at least."""
    return _ScaledWithBias.apply(qkv.k, qkv.sigma)


class _ScaledWithBias(torch.autograd.Function):
    """q = f / sigma and the bias -|q|^2 / 2, in float32 at least. The backward keeps only q."""

    @staticmethod
    def forward(ctx, f: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(f.dtype, torch.float32)
        q = cast(cast(f, wide) / cast(sigma, wide)[:, None], f.dtype)
        ctx.save_for_backward(q, sigma)
        # The norm must be that of the rounded numbers that enter the dot product: only then do rounding errors cancel.
        return q, -0.5 * cast(q, wide).square().sum(dim=-1, keepdim=True)

    @staticmethod
    def backward(ctx, dq: Tensor, dbias: Tensor) -> tuple[Tensor, Tensor]:
        q, sigma = ctx.saved_tensors
        dtype, wide = q.dtype, dbias.dtype
        dq, q = cast(dq, wide), cast(q, wide)
        dq = dq - dbias * q
        dsigma = -(dq * q).sum((0, 1, 3)) / sigma
        return cast(dq / cast(sigma, wide)[:, None], dtype), cast(dsigma, sigma.dtype)


def _softmax_attention(
    q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, *, window: int | None, causal: bool, include_self: bool
) -> Tensor:
    """Return softmax attention with scale 1 under any mask of the operator. A row without a key gives 0."""
    T = q_BTHD.size(1)
    q, k, v = (t.transpose(1, 2) for t in (q_BTHD, k_BTHD, v_BTHD))
    window = T if window is None else min(window, T)
    if window == T and include_self:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1.0)
    elif q.device.type == "cpu" and causal:
        y = window_attention(q, k, v, window, include_self, 1.0)[0]
    else:
        mask = visible(T, window if window < T else None, causal, include_self, q.device)
        keyless = ~mask.any(dim=1, keepdim=True)
        # A softmax over no key is 0 / 0. Such rows attend to themselves, and their result is set to 0.
        mask = mask | (keyless & torch.eye(T, dtype=torch.bool, device=q.device))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).masked_fill(keyless, 0)
    return y.transpose(1, 2)
