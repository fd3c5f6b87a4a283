"""Causal softmax attention with a sliding window on a CPU. Its cost grows with T times the window.

A kernel with a mask computes all T x T scores and discards most of them. Here each block of queries attends only to the
keys that it can see.
Axes: B batch, H heads, T time, D head_dim.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gkachat.attention.qkv import QKV

# Queries per block. At T 2048, window 256 and D 128, 32 and 64 are level, 128 takes 1.2x and 256 takes 1.5x the time.
BLOCK = 64


def attend(qkv: QKV, *, window: int) -> Tensor:
    """Return softmax attention over the window, (B, T, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in qkv[:3])
    return window_attention(q, k, v, min(window, q.size(2)), True, qkv.scale)[0].transpose(1, 2)


def _blocks(T: int, window: int, include_self: bool, like: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (queries, the keys that they see, additive mask) for each block. Queries that see no key are left out."""
    n_keyless = 0 if include_self else T if window == 1 else 1
    distance = torch.arange(BLOCK)[:, None] + window - torch.arange(window + BLOCK)[None, :]
    hidden = (distance < (0 if include_self else 1)) | (distance >= window)
    mask = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -torch.inf)
    for start in range(0, T, BLOCK):
        begin, end, first = max(start, n_keyless), min(T, start + BLOCK), max(0, start - window)
        if begin < end:
            columns = slice(window - (start - first), window + end - start)
            yield slice(begin, end), slice(first, end), mask[begin - start : end - start, columns]


@torch.library.custom_op("gkachat::window_attention", mutates_args=())
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, include_self: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return causal window attention of (B, H, T, D) tensors, and the log-sum-exp of each row's scores (B, H, T).

    Both are 0 for a row without a key.
    """
    B, H, T, _ = q.shape
    y = torch.zeros_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    lse = q.new_zeros(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, keys, mask in _blocks(T, window, include_self, q):
        y[:, :, rows], lse[:, :, rows] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], 0.0, False, attn_mask=mask, scale=scale
        )
    return y, lse


@torch.library.custom_op("gkachat::window_attention_backward", mutates_args=())
def window_attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, window: int, include_self: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v. They are computed in float32 at least.

    torch's kernel takes half the time in float32 that it takes in bfloat16 (T 256, window 129, D 64; 0.7 at T 1,024).
    """
    dtype = q.dtype
    dy, q, k, v, y = (t.to(lse.dtype) for t in (dy, q, k, v, y))
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    for rows, keys, mask in _blocks(q.size(2), window, include_self, q):
        dq[:, :, rows], dk_part, dv_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], y[:, :, rows], lse[:, :, rows],
            0.0, False, attn_mask=mask, scale=scale,
        )  # fmt: skip
        dk[:, :, keys] += dk_part
        dv[:, :, keys] += dv_part
    return tuple(t.to(dtype) for t in (dq, dk, dv))


@window_attention.register_fake
def _(q, k, v, window, include_self, scale):
    y = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    return y, q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@window_attention_backward.register_fake
def _(dy, q, k, v, y, lse, window, include_self, scale):
    return tuple(torch.empty_like(t) for t in (q, k, v))


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.window, ctx.include_self, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx, dy: Tensor, _):
    gradients = window_attention_backward(dy, *ctx.saved_tensors, ctx.window, ctx.include_self, ctx.scale)
    return *gradients, None, None, None


window_attention.register_autograd(_backward, setup_context=_save)
