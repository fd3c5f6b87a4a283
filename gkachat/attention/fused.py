"""Fused softmax attention kernels: what softmax attention runs on, and GKA through its identities.

All take (B, T, H, D) queries, keys and values, and see `window` positions back, self included (where they are not
causal, as many ahead). Full windows go to torch's own kernels. Short ones could, but a kernel that is handed a mask
computes all T x T scores and throws most away; here cost follows T times the window: on a CPU in blocks of queries,
each against the few keys it sees, on a GPU through FlexAttention's block mask or FlashAttention's own window. Which one
a model uses is decided in backends.py.
Axes: B batch, H heads, T time, S key time, D head_dim.
"""

import importlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

SDPA_PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

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


def softmax_weights(q_BTHD: Tensor, k_BTHD: Tensor, *, window: int | None, scale: float, causal: bool = True) -> Tensor:
    """What these kernels average values by, (B, H, T, S) in float32: for looking at, not for computing with."""
    scores = torch.einsum("bthd,bshd->bhts", q_BTHD.float(), k_BTHD.float()) * scale
    hidden = ~visible(q_BTHD.size(1), window, causal, device=scores.device)
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)


def sdpa(
    q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, *, window: int | None, scale: float, causal: bool = True
) -> Tensor:
    """torch's scaled_dot_product_attention, cuDNN's kernel first: on Hopper it is the fastest of those torch brings."""
    T = q_BTHD.size(1)
    q, k, v = (t.transpose(1, 2) for t in (q_BTHD, k_BTHD, v_BTHD))
    mask = None if window is None or window >= T else visible(T, window, causal, device=q.device)
    if q.device.type == "cuda" and mask is None:
        with sdpa_kernel(SDPA_PRIORITY, set_priority=True):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale)
    return y.transpose(1, 2)


def blocks(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, *, window: int | None, scale: float) -> Tensor:
    """A sliding window on a CPU."""
    q, k, v = (t.transpose(1, 2) for t in (q_BTHD, k_BTHD, v_BTHD))
    return block_attention(q, k, v, min(window, q.size(2)), True, scale)[0].transpose(1, 2)


class Flex:
    """A sliding window through FlexAttention. Block masks are made once for each length, outside the compiled graph."""

    def __init__(self, window: int, sequence_len: int, device: torch.device):
        self.window, self.device = window, device
        self.attend = torch.compile(flex_attention, dynamic=False)  # as it is, it would form all T x T scores
        self.masks = {sequence_len: self._mask(sequence_len)}

    def _mask(self, T: int) -> BlockMask:
        def seen(b, h, i, j):
            return (i >= j) & (i - j < self.window)

        return create_block_mask(seen, None, None, T, T, device=self.device)

    def __call__(self, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, *, window: int | None, scale: float) -> Tensor:
        T = q_BTHD.size(1)
        if T not in self.masks:
            self.masks[T] = self._mask(T)
        q, k, v = (t.transpose(1, 2) for t in (q_BTHD, k_BTHD, v_BTHD))
        return self.attend(q, k, v, block_mask=self.masks[T], scale=scale).transpose(1, 2)


def flash(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    *,
    window: int | None,
    scale: float,
    module: str,
    causal: bool = True,
) -> Tensor:
    """The flash-attn packages: `flash_attn_interface` (version 3) or `flash_attn` (version 2)."""
    back = -1 if window is None else window - 1  # they count the positions before self
    ahead = 0 if causal and back >= 0 else back
    y = importlib.import_module(module).flash_attn_func(
        q_BTHD,
        k_BTHD,
        v_BTHD,
        softmax_scale=scale,
        causal=causal,
        window_size=(back, ahead),
    )
    return y[0] if isinstance(y, tuple) else y  # version 3 has returned the log-sum-exp along with it


def masked_attention(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    *,
    window: int | None,
    causal: bool,
    include_self: bool,
    scale: float,
) -> Tensor:
    """Any mask of the operator's; rows without a key give zeros. In blocks when causal on a CPU, else all T x T."""
    T = q_BTHD.size(1)
    q, k, v = (t.transpose(1, 2) for t in (q_BTHD, k_BTHD, v_BTHD))
    window = T if window is None else min(window, T)
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
