"""Fused softmax attention over a window: what softmax attention runs on, and GKA through its identity.

Full windows go to torch's own fused kernels. Short ones could, but a kernel that is handed a mask computes all T x T
scores and throws most away; on a CPU a short window is therefore computed in blocks of queries, each against the few
keys it sees, so that cost follows T times the window. Axes: B batch, H heads, T time, D head_dim.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries a block. At T 2048, window 256, D 128 on a CPU, 32 and 64 are level, 128 takes 1.2x and 256 1.5x the time.
BLOCK = 64


def visible(
    T: int, window: int | None, causal: bool = True, include_self: bool = True, device: torch.device | None = None
) -> Tensor:
    """(T, S) mask, true where query i sees key j."""
    i = torch.arange(T, device=device)
    distance = i[:, None] - i[None, :]
    mask = torch.ones(T, T, dtype=torch.bool, device=device)
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= distance.abs() < window
    if not include_self:
        mask &= distance != 0
    return mask


def windowed_attention(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    *,
    window: int | None,
    causal: bool = True,
    include_self: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention over the visible keys; rows without a key give zeros. (B, T, H, D), v as wide as q and k."""
    T = q_BTHD.size(1)
    q, k, v = (t.transpose(1, 2) for t in (q_BTHD, k_BTHD, v_BTHD))
    window = T if window is None else min(window, T)
    scale = q.size(-1) ** -0.5 if scale is None else scale
    if window == T and include_self:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    elif q.device.type == "cpu" and causal:
        y = block_attention(q, k, v, window, include_self, scale)[0]
    else:
        mask = visible(T, window if window < T else None, causal, include_self, q.device)
        keyless = ~mask.any(dim=1, keepdim=True)
        # A softmax over nothing is 0/0: let such rows see themselves, then take what they saw away.
        mask = mask | (keyless & torch.eye(T, dtype=torch.bool, device=q.device))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).masked_fill(keyless, 0)
    return y.transpose(1, 2)


def _blocks(T: int, window: int, include_self: bool, like: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries, the keys that they see between them, and the additive mask, block after block."""
    distance = torch.arange(BLOCK)[:, None] + window - torch.arange(window + BLOCK)[None, :]
    hidden = (distance < (0 if include_self else 1)) | (distance >= window)
    mask = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -torch.inf)
    for start in range(0, T, BLOCK):
        end, first = min(T, start + BLOCK), max(0, start - window)
        yield slice(start, end), slice(first, end), mask[: end - start, window - (start - first) : window + end - start]


def _keyless(T: int, window: int, include_self: bool) -> int:
    """How many rows, from the first, have no key."""
    return 0 if include_self else T if window == 1 else 1


@torch.library.custom_op("gkachat::block_attention", mutates_args=())
def block_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, include_self: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal window attention on a CPU, each (B, H, T, D) -> y and the log-sum-exp of each row (B, H, T)."""
    B, H, T, _ = q.shape
    y = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    lse = q.new_zeros(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32))
    keyless = _keyless(T, window, include_self)
    y[:, :, :keyless] = 0
    if keyless == T:
        return y, lse
    for rows, keys, mask in _blocks(T, window, include_self, q):
        rows, mask = slice(max(rows.start, keyless), rows.stop), mask[max(0, keyless - rows.start) :]
        if rows.start < rows.stop:
            y[:, :, rows], lse[:, :, rows] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, rows], k[:, :, keys], v[:, :, keys], 0.0, False, attn_mask=mask, scale=scale
            )
    return y, lse


@torch.library.custom_op("gkachat::block_attention_backward", mutates_args=())
def block_attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, window: int, include_self: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    T = q.size(2)
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    keyless = _keyless(T, window, include_self)
    if keyless == T:
        return dq, dk, dv
    for rows, keys, mask in _blocks(T, window, include_self, q):
        rows, mask = slice(max(rows.start, keyless), rows.stop), mask[max(0, keyless - rows.start) :]
        if rows.start < rows.stop:
            dq[:, :, rows], dk_part, dv_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dy[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], y[:, :, rows], lse[:, :, rows],
                0.0, False, attn_mask=mask, scale=scale,
            )  # fmt: skip
            dk[:, :, keys] += dk_part
            dv[:, :, keys] += dv_part
    return dq, dk, dv


@block_attention.register_fake
def _(q, k, v, window, include_self, scale):
    y = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    return y, q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@block_attention_backward.register_fake
def _(dy, q, k, v, y, lse, window, include_self, scale):
    return tuple(torch.empty_like(t) for t in (q, k, v))


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.window, ctx.include_self, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx, dy: Tensor, _):
    gradients = block_attention_backward(dy, *ctx.saved_tensors, ctx.window, ctx.include_self, ctx.scale)
    return *gradients, None, None, None


block_attention.register_autograd(_backward, setup_context=_save)
