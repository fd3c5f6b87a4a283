"""Convolutions of gka_conv and the biases of its keys in Triton: one kernel forward, one backward.

Forward, x is read once, and q, k, v and the biases of the keys are written. The biases also fill the last channels of
k, and ones those of q. Rows that several taps read come from a cache. Backward, a row of a tile walks through a chunk
of tokens, one at a time, and reads x, dq, dk and dv of each. The last rows of x and of dx stay in registers: what a tap
reaches back to is neither read nor computed again, but for a few rows between chunks. The sums of the gradients of
weights and gain have a fixed order. A number of x in bfloat16 moves 8 bytes forward and 10 backward.

Arithmetic is float32. `convolved_features` of features.py is the reference. Imported only where it is used.
Axes: B batch, S input tokens, T output tokens (the last T of S), H heads, D head_dim, N taps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkachat.attention import forget_gate
from gkachat.attention.features import ShortConv, cast
from gkachat.attention.kernels.gaussian_triton import contiguous_channels, on_device_of_first
from gkachat.attention.kernels.gaussian_triton_kernels import rounded

N_TAPS = tl.constexpr(ShortConv.TAPS)
BIAS_CHANNELS = tl.constexpr(forget_gate.CHANNELS)
TILE = 2048  # numbers in a tile of the forward, a head wide
WALK_TILE = 512  # numbers in a tile of the backward, a head wide: with 4 warps, a warp sums over a head of 128
CHUNK = 64  # tokens that a row of the backward's tile walks through, and three of the next chunk


@triton.jit
def _place(H, n_blocks):
    """Return the batch entry, the head and the block of tokens that this program works on."""
    bh, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    return (bh // H).to(tl.int64), (bh % H).to(tl.int64), block


@triton.jit
def _load(base, rows, columns, stride_t, n_rows, n_columns):
    """Load rows and columns in float32, with zeros outside of them."""
    seen = ((rows >= 0) & (rows < n_rows))[:, None] & (columns < n_columns)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride_t + columns[None, :], mask=seen, other=0.0).to(tl.float32)


@triton.jit
def _store(base, tile, rows, columns, stride_t, n_rows, n_columns):
    seen = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    tile = rounded(tile, base.dtype.element_ty)
    tl.store(base + rows.to(tl.int64)[:, None] * stride_t + columns[None, :], tile, mask=seen)


@triton.jit
def _convolve(X, W, rows, columns, stride_t, stride_n, S, n_columns):
    """Return the convolution at some input rows. W points to the head's first tap."""
    y = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for n in tl.static_range(N_TAPS):
        w = tl.load(W + n * stride_n + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
        y += w[None, :] * _load(X, rows - n, columns, stride_t, S, n_columns)
    return y


@triton.jit
def _cut(x):
    """Cut float32 to the bits that bfloat16 has."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def forward_kernel(
    X, WQ, WK, WV, GAIN, SUM, Q, K, V, BIAS, stride_xb, stride_xt, stride_xh, S, T, H, D, n_blocks,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write q, k, v and the biases of the keys of one block of tokens of one head.

    SUM holds the running sums, from which gain |k|^2 / 2 is subtracted.
    """
    batch, head, block = _place(H, n_blocks)
    rows, columns = block * BT + tl.arange(0, BT), tl.arange(0, BD)
    X += batch * stride_xb + head * stride_xh
    weight, out, gain = head * D, batch * T * H * D + head * D, tl.load(GAIN + head)
    per_key, place = batch * T * H + rows.to(tl.int64) * H + head, columns[None, :] - (D - BIAS_CHANNELS)
    q = gain * _convolve(X, WQ + weight, rows + S - T, columns, stride_xt, H * D, S, D)
    _store(Q + out, tl.where(place < 0, q, 1.0), rows, columns, H * D, T, D)
    k = _convolve(X, WK + weight, rows + S - T, columns, stride_xt, H * D, S, D)
    k = rounded(k, K.dtype.element_ty).to(tl.float32)  # the norm is that of what enters the products
    bias = tl.load(SUM + per_key, mask=rows < T, other=0.0) - 0.5 * gain * tl.sum(k * k, 1)
    tl.store(BIAS + per_key, bias, mask=rows < T)
    bias = bias[:, None]
    high = _cut(bias)  # as `forget_gate.split` does
    middle = _cut(bias - high)
    parts = tl.where(place == 0, high, tl.where(place == 1, middle, bias - high - middle))
    _store(K + out, tl.where(place < 0, k, parts), rows, columns, H * D, T, D)
    v = _convolve(X, WV + weight, rows + S - T, columns, stride_xt, H * D, S, D)
    _store(V + out, v, rows, columns, H * D, T, D)


@triton.jit
def _load_taps(W, columns, stride_n, D):
    """Return the weights of the four taps, each (1, BD)."""
    seen = columns < D
    w_0 = tl.load(W + columns, mask=seen, other=0.0).to(tl.float32)[None, :]
    w_1 = tl.load(W + stride_n + columns, mask=seen, other=0.0).to(tl.float32)[None, :]
    w_2 = tl.load(W + 2 * stride_n + columns, mask=seen, other=0.0).to(tl.float32)[None, :]
    w_3 = tl.load(W + 3 * stride_n + columns, mask=seen, other=0.0).to(tl.float32)[None, :]
    return w_0, w_1, w_2, w_3


@triton.jit
def _add_to_inputs(dx_0, dx_1, dx_2, dx_3, dc, w_0, w_1, w_2, w_3):
    """Add a convolution's gradient dc to that of the four rows of x that it read."""
    return dx_0 + w_0 * dc, dx_1 + w_1 * dc, dx_2 + w_2 * dc, dx_3 + w_3 * dc


@triton.jit
def _add_to_taps(dw_0, dw_1, dw_2, dw_3, dc, x_0, x_1, x_2, x_3):
    """Add a convolution's gradient dc, times the four rows of x that it read, to that of the taps."""
    return dw_0 + x_0 * dc, dw_1 + x_1 * dc, dw_2 + x_2 * dc, dw_3 + x_3 * dc


@triton.jit
def _store_taps(DW, dw_0, dw_1, dw_2, dw_3, columns, D):
    tl.store(DW + columns, tl.sum(dw_0, 0), mask=columns < D)
    tl.store(DW + D + columns, tl.sum(dw_1, 0), mask=columns < D)
    tl.store(DW + 2 * D + columns, tl.sum(dw_2, 0), mask=columns < D)
    tl.store(DW + 3 * D + columns, tl.sum(dw_3, 0), mask=columns < D)


@triton.jit
def backward_kernel(
    X, WQ, WK, WV, GAIN, DQ, DK, DV, DX, DW, DGAIN, stride_xb, stride_xt, stride_xh,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, S, T, H,
    n_blocks, D: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write dx of CHUNKS chunks of input tokens of one head, and their part of the gradients of weights and gain.

    At each step of its walk a row of the tile has x_n and dx_n of n tokens before. dx_3 is complete.
    """
    batch, head, block = _place(H, n_blocks)
    columns, one = tl.arange(0, BD), tl.arange(0, 1)
    X += batch * stride_xb + head * stride_xh
    DQ += batch * stride_qb + head * stride_qh
    DK += batch * stride_kb + head * stride_kh
    DV += batch * stride_vb + head * stride_vh
    DX += batch * S * H * D + head * D
    gain = tl.load(GAIN + head)
    wq_0, wq_1, wq_2, wq_3 = _load_taps(WQ + head * D, columns, H * D, D)
    wk_0, wk_1, wk_2, wk_3 = _load_taps(WK + head * D, columns, H * D, D)
    wv_0, wv_1, wv_2, wv_3 = _load_taps(WV + head * D, columns, H * D, D)
    first = (block * CHUNKS + tl.arange(0, CHUNKS)) * CHUNK
    x_1 = _load(X, first - 1, columns, stride_xt, S, D)
    x_2 = _load(X, first - 2, columns, stride_xt, S, D)
    x_3 = _load(X, first - 3, columns, stride_xt, S, D)
    dx_1 = tl.zeros([CHUNKS, BD], tl.float32)
    dx_2, dx_3 = dx_1, dx_1
    q_0, q_1, q_2, q_3, k_0, k_1, k_2, k_3, v_0, v_1, v_2, v_3 = (
        dx_1, dx_1, dx_1, dx_1, dx_1, dx_1, dx_1, dx_1, dx_1, dx_1, dx_1, dx_1)  # fmt: skip
    dgain = tl.zeros([CHUNKS], tl.float32)
    for step in tl.range(0, CHUNK + N_TAPS - 1, disable_licm=True):
        rows = first + step
        t = rows - (S - T)  # output token at each input row; before the first, dq, dk and dv count as 0
        x_0 = _load(X, rows, columns, stride_xt, S, D)
        dc_v = _load(DV, t, columns, stride_vt, T, D)
        dq = _load(DQ, t, columns, stride_qt, T, D - BIAS_CHANNELS)
        dk = _load(DK, t, columns, stride_kt, T, D - BIAS_CHANNELS)
        dbias = _load(DK + D - 1, t, one, stride_kt, T, 1)  # gradient of the bias: q is 1 in the last channel
        q = wq_0 * x_0 + wq_1 * x_1 + wq_2 * x_2 + wq_3 * x_3
        k = wk_0 * x_0 + wk_1 * x_1 + wk_2 * x_2 + wk_3 * x_3
        dc_q, dc_k = gain * dq, dk - gain * dbias * k
        dx_0 = tl.zeros([CHUNKS, BD], tl.float32)
        dx_0, dx_1, dx_2, dx_3 = _add_to_inputs(dx_0, dx_1, dx_2, dx_3, dc_q, wq_0, wq_1, wq_2, wq_3)
        dx_0, dx_1, dx_2, dx_3 = _add_to_inputs(dx_0, dx_1, dx_2, dx_3, dc_k, wk_0, wk_1, wk_2, wk_3)
        dx_0, dx_1, dx_2, dx_3 = _add_to_inputs(dx_0, dx_1, dx_2, dx_3, dc_v, wv_0, wv_1, wv_2, wv_3)
        if step < CHUNK:  # the last three rows belong to the next chunk, which adds them
            dgain += tl.sum(dq * q - 0.5 * dbias * k * k, 1)
            q_0, q_1, q_2, q_3 = _add_to_taps(q_0, q_1, q_2, q_3, dc_q, x_0, x_1, x_2, x_3)
            k_0, k_1, k_2, k_3 = _add_to_taps(k_0, k_1, k_2, k_3, dc_k, x_0, x_1, x_2, x_3)
            v_0, v_1, v_2, v_3 = _add_to_taps(v_0, v_1, v_2, v_3, dc_v, x_0, x_1, x_2, x_3)
        if step >= N_TAPS - 1:
            _store(DX, dx_3, rows - (N_TAPS - 1), columns, H * D, S, D)
        x_1, x_2, x_3 = x_0, x_1, x_2
        dx_1, dx_2, dx_3 = dx_0, dx_1, dx_2
    DW += tl.program_id(0).to(tl.int64) * 3 * N_TAPS * D
    _store_taps(DW, q_0, q_1, q_2, q_3, columns, D)
    _store_taps(DW + N_TAPS * D, k_0, k_1, k_2, k_3, columns, D)
    _store_taps(DW + 2 * N_TAPS * D, v_0, v_1, v_2, v_3, columns, D)
    tl.store(DGAIN + tl.program_id(0), tl.sum(dgain, 0))


def forward_tile(D: int) -> tuple[int, int]:
    """Return rows and columns of a tile of the forward."""
    width = max(16, triton.next_power_of_2(D))
    return TILE // width, width


def backward_tile(D: int) -> tuple[int, int]:
    """Return rows, each with a chunk of its own, and columns of a tile of the backward."""
    width = max(16, triton.next_power_of_2(D))
    return WALK_TILE // width, width


@torch.library.custom_op("gkachat::features", mutates_args=())
@on_device_of_first
def features(
    x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, gain: Tensor, running_sum: Tensor, T: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k and v, each (B, T, H, D), and the biases of the keys, (B, T, H, 1) in float32.

    x is (B, S, H, D), weights are (4, H, D), gain is (H,) and running_sum (B, T, H, 1), both float32.
    """
    B, S, H, D = x.shape
    x = contiguous_channels(x)
    q, k, v = (x.new_empty(B, T, H, D) for _ in range(3))
    bias = x.new_empty(B, T, H, 1, dtype=torch.float32)
    BT, width = forward_tile(D)
    n_blocks = triton.cdiv(T, BT)
    forward_kernel[(n_blocks * B * H,)](
        x, w_q.contiguous(), w_k.contiguous(), w_v.contiguous(), gain.contiguous(), running_sum.contiguous(), q, k, v,
        bias, *x.stride()[:3], S, T, H, D, n_blocks, BT=BT, BD=width,
    )  # fmt: skip
    return q, k, v, bias


@torch.library.custom_op("gkachat::features_backward", mutates_args=())
@on_device_of_first
def features_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, of the three weights and of gain."""
    (B, S, H, D), T = x.shape, dq.size(1)
    x, dq, dk, dv = (contiguous_channels(t) for t in (x, dq, dk, dv))
    w_q, w_k, w_v = (t.contiguous() for t in (w_q, w_k, w_v))
    dx = x.new_empty(B, S, H, D)
    chunks, width = backward_tile(D)
    n_blocks = triton.cdiv(S, chunks * CHUNK)
    dw = x.new_empty(B, H, n_blocks, 3, ShortConv.TAPS, D, dtype=torch.float32)
    dgain = x.new_empty(B, H, n_blocks, dtype=torch.float32)
    backward_kernel[(n_blocks * B * H,)](
        x, w_q, w_k, w_v, gain.contiguous(), dq, dk, dv, dx, dw, dgain, *x.stride()[:3],
        *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], S, T, H, n_blocks,
        D=D, BD=width, CHUNKS=chunks, CHUNK=CHUNK,
    )  # fmt: skip
    dw = dw.sum((0, 2)).permute(1, 2, 0, 3)  # (3, N, H, D)
    dw = (part.to(w_q.dtype, copy=True, memory_format=torch.contiguous_format) for part in dw)
    return dx, *dw, dgain.sum((0, 2))


@features.register_fake
def _(x, w_q, w_k, w_v, gain, running_sum, T):
    B, _, H, D = x.shape
    return *(x.new_empty(B, T, H, D) for _ in range(3)), x.new_empty(B, T, H, 1, dtype=torch.float32)


@features_backward.register_fake
def _(dq, dk, dv, x, w_q, w_k, w_v, gain):
    return tuple(t.new_empty(t.shape) for t in (x, w_q, w_k, w_v, gain))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-2])
    ctx.mark_non_differentiable(output[3])


def _backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor, _: None):
    return *features_backward(dq, dk, dv, *ctx.saved_tensors), cast(dk[..., -1:], torch.float32), None


features.register_autograd(_backward, setup_context=_save)


def convolved_features(
    x_BSHD: Tensor, weights: tuple[Tensor, Tensor, Tensor], gain_H: Tensor, running_sum_BTH1: Tensor, T: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v and the biases of the keys, of the last T tokens."""
    return features(x_BSHD, *weights, gain_H.float(), running_sum_BTH1.float(), T)
