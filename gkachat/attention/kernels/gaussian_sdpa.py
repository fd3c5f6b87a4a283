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


def attend_unit_norm(qkv: QKV, *key_bias: Tensor, softmax_attend: Callable[..., Tensor]) -> Tensor:
    """Return Gaussian attention of queries and keys that all have the same norm, (B, T, H, D).

    `softmax_attend` computes softmax attention of a QKV, and takes a bias per key if one is given.

    The biases of the keys are equal and cancel. The backward of the softmax kernel lacks the derivative of the norms.
    That part of the gradient is parallel to the feature, and the backward of the preceding RMSNorm removes it.
    """
    inverse = qkv.sigma.square().reciprocal()[:, None]
    return softmax_attend(QKV((qkv.q * inverse).to(qkv.q.dtype), qkv.k, qkv.v), *key_bias)


def attend(
    qkv: QKV, key_bias_BS: Tensor | None = None, *, window: int | None, causal: bool, include_self: bool
) -> Tensor:  # fmt: skip
    """Return Gaussian attention, (B, T, H, D). A bias per key, if given, is added to its scores."""
    wide = QKV(*bias_as_channels(qkv))
    y = softmax_attention(wide, key_bias_BS, window=window, causal=causal, include_self=include_self)
    return y[..., : qkv.v.size(-1)]


def bias_as_channels(qkv: QKV) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v for which softmax attention with scale 1 is Gaussian attention of qkv.

    They have more channels than D, of which the output's first D count.
    """
    x, D = qkv.v, qkv.k.size(-1)
    k, bias = scaled_with_bias(qkv)
    q = k if qkv.q is qkv.k else (qkv.q / qkv.sigma[:, None]).to(x.dtype)
    high = bias.to(x.dtype)
    # In half precision, one column would round the bias by 4e-3. A second column holds the rounding error.
    columns = [high] if x.dtype == bias.dtype else [high, (bias - high.to(bias.dtype)).to(x.dtype)]
    # Kernels want head sizes in multiples of 8, and want v as wide as q and k.
    zeros = x.new_zeros(*x.shape[:-1], -(D + len(columns)) % 8)
    ones = x.new_ones(*x.shape[:-1], len(columns))
    k = torch.cat((k, *columns, zeros), dim=-1)
    return torch.cat((q, ones, zeros), dim=-1), k, F.pad(x, (0, k.size(-1) - D))


def scaled_with_bias(qkv: QKV) -> tuple[Tensor, Tensor]:
    """Return f = k / sigma, and the bias -|f|^2 / 2 of each key, (B, T, H, 1) in float32 at least."""
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


def softmax_attention(
    qkv: QKV, key_bias_BS: Tensor | None = None, *, window: int | None, causal: bool, include_self: bool
) -> Tensor:  # fmt: skip
    """Return softmax attention with scale 1 under any mask of the operator, (B, T, H, D).

    The bias is in the dtype of the keys, and -inf for a key that is ignored. A row without a key gives 0.
    """
    T = qkv.q.size(1)
    q, k, v = (t.transpose(1, 2) for t in qkv[:3])
    window = T if window is None else min(window, T)
    sees_all = window == T and include_self
    if key_bias_BS is None and sees_all:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1.0)
    elif key_bias_BS is None and q.device.type == "cpu" and causal:
        y = window_attention(q, k, v, window, include_self, 1.0)[0]
    else:
        mask = q.new_zeros(1, 1, 1, T) if key_bias_BS is None else key_bias_BS[:, None, None]
        if causal or not sees_all:
            seen = visible(T, window if window < T else None, causal, include_self, q.device)
            mask = mask.masked_fill(~seen, -torch.inf)
        keyless = (mask == -torch.inf).all(dim=-1, keepdim=True)
        # A softmax over no key is 0 / 0. Such rows attend to all keys, and their result is set to 0.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.masked_fill(keyless, 0), scale=1.0)
        y = y.masked_fill(keyless, 0)
    return y.transpose(1, 2)
