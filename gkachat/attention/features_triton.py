"""Convolutions, rotation and norm of gka_plus in Triton: one pass over the block input forward, two backward.

Forward, x is read once and q, k and v are written. Backward, the first kernel goes through norm and rotation: it
convolves x again and writes the gradients of the convolutions of q and k. The second goes through the convolutions:
it reads these, dv and x, and writes dx and its part of the weights' gradients, whose sum has a fixed order. A number of
x in bfloat16 moves 8 bytes forward and 20 backward. Rows that several taps read come from a cache.

Arithmetic is float32. `convolved_features` of features.py is the reference. Imported only where it is used.
Axes: B batch, S input tokens, T output tokens (the last T of S), H heads, D head_dim, N taps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkachat.attention.features import Rope, ShortConv
from gkachat.attention.kernels.gaussian_triton import contiguous_channels, on_device_of_first, rounded

N_TAPS = tl.constexpr(ShortConv.TAPS)
EPS = tl.constexpr(torch.finfo(torch.float32).eps)
TILE = 1024  # numbers in a tile of the norm's kernels, half a head wide
CONV_TILE, CONV_WARPS, CONV_ROWS = 512, 8, 256  # tile of the convolution's backward; rows that one program sums over


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
def _inverse_norm(a, b, D):
    """Return 1 / the root mean square of each row of (a, b)."""
    return tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + EPS)[:, None]


@triton.jit
def _convolve_and_rotate(X, W, Q, rows, look, columns, cos, sin, stride_xt, S, T, H, D):
    """Write the normalised, rotated convolution of one block."""
    a = _convolve(X, W, rows + look, columns, stride_xt, H * D, S, D // 2)
    b = _convolve(X + D // 2, W + D // 2, rows + look, columns, stride_xt, H * D, S, D // 2)
    scale = _inverse_norm(a, b, D)
    _store(Q, (a * cos + b * sin) * scale, rows, columns, H * D, T, D // 2)
    _store(Q + D // 2, (b * cos - a * sin) * scale, rows, columns, H * D, T, D // 2)


@triton.jit
def forward_kernel(
    X, WQ, WK, WV, COS, SIN, Q, K, V, stride_xb, stride_xt, stride_xh, stride_cb, stride_ct, S, T, H, D, n_blocks,
    BT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Write q, k and v of one block of tokens of one head."""
    bh, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    batch, head = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    rows, columns = block * BT + tl.arange(0, BT), tl.arange(0, HALF)
    X += batch * stride_xb + head * stride_xh
    cos = _load(COS + batch * stride_cb, rows, columns, stride_ct, T, D // 2)
    sin = _load(SIN + batch * stride_cb, rows, columns, stride_ct, T, D // 2)
    weight, out = head * D, batch * T * H * D + head * D
    _convolve_and_rotate(X, WQ + weight, Q + out, rows, S - T, columns, cos, sin, stride_xt, S, T, H, D)
    _convolve_and_rotate(X, WK + weight, K + out, rows, S - T, columns, cos, sin, stride_xt, S, T, H, D)
    for half in tl.static_range(2):
        at = half * (D // 2)
        v = _convolve(X + at, WV + weight + at, rows + S - T, columns, stride_xt, H * D, S, D // 2)
        _store(V + out + at, v, rows, columns, H * D, T, D // 2)


@triton.jit
def _through_norm(X, W, DQ, DC, rows, look, columns, cos, sin, stride_xt, stride_dt, S, T, H, D):
    """Write the gradient of a convolution c: with u = dq rotated back and r = 1 / rms(c), r (u - r^2 c mean(u c))."""
    a = _convolve(X, W, rows + look, columns, stride_xt, H * D, S, D // 2)
    b = _convolve(X + D // 2, W + D // 2, rows + look, columns, stride_xt, H * D, S, D // 2)
    d_a = _load(DQ, rows, columns, stride_dt, T, D // 2)
    d_b = _load(DQ + D // 2, rows, columns, stride_dt, T, D // 2)
    u_a, u_b = d_a * cos - d_b * sin, d_b * cos + d_a * sin
    scale = _inverse_norm(a, b, D)
    along = scale * scale * ((tl.sum(u_a * a, 1) + tl.sum(u_b * b, 1)) / D)[:, None]
    _store(DC, scale * (u_a - along * a), rows, columns, H * D, T, D // 2)
    _store(DC + D // 2, scale * (u_b - along * b), rows, columns, H * D, T, D // 2)


@triton.jit
def norm_backward_kernel(
    X, WQ, WK, COS, SIN, DQ, DK, DCQ, DCK, stride_xb, stride_xt, stride_xh, stride_cb, stride_ct,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, S, T, H, D, n_blocks,
    BT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the convolutions of q and k, for one block of tokens of one head."""
    bh, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    batch, head = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    rows, columns = block * BT + tl.arange(0, BT), tl.arange(0, HALF)
    X += batch * stride_xb + head * stride_xh
    DQ += batch * stride_qb + head * stride_qh
    DK += batch * stride_kb + head * stride_kh
    cos = _load(COS + batch * stride_cb, rows, columns, stride_ct, T, D // 2)
    sin = _load(SIN + batch * stride_cb, rows, columns, stride_ct, T, D // 2)
    weight, out = head * D, batch * T * H * D + head * D
    _through_norm(X, WQ + weight, DQ, DCQ + out, rows, S - T, columns, cos, sin, stride_xt, stride_qt, S, T, H, D)
    _through_norm(X, WK + weight, DK, DCK + out, rows, S - T, columns, cos, sin, stride_xt, stride_kt, S, T, H, D)


@triton.jit
def _through_taps(dx, dw_0, dw_1, dw_2, dw_3, x, DC, W, rows, columns, stride_t, stride_n, T, D):
    """Add one convolution's part of dx, and x times its gradient to the sums of the four taps."""
    for n in tl.static_range(N_TAPS):
        w = tl.load(W + n * stride_n + columns, mask=columns < D, other=0.0).to(tl.float32)
        dc = _load(DC, rows + n, columns, stride_t, T, D)
        dx += w[None, :] * dc
        if n == 0:
            dw_0 += x * dc
        elif n == 1:
            dw_1 += x * dc
        elif n == 2:
            dw_2 += x * dc
        else:
            dw_3 += x * dc
    return dx, dw_0, dw_1, dw_2, dw_3


@triton.jit
def _store_taps(DW, dw_0, dw_1, dw_2, dw_3, columns, D):
    tl.store(DW + columns, tl.sum(dw_0, 0), mask=columns < D)
    tl.store(DW + D + columns, tl.sum(dw_1, 0), mask=columns < D)
    tl.store(DW + 2 * D + columns, tl.sum(dw_2, 0), mask=columns < D)
    tl.store(DW + 3 * D + columns, tl.sum(dw_3, 0), mask=columns < D)


@triton.jit
def conv_backward_kernel(
    X, WQ, WK, WV, DCQ, DCK, DV, DX, DW, stride_xb, stride_xt, stride_xh, stride_vb, stride_vt, stride_vh,
    S, T, H, D, n_blocks, BT: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write dx of ROWS input tokens of one head, and their part of the weights' gradients."""
    bh, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    batch, head = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    columns = tl.arange(0, BD)
    X += batch * stride_xb + head * stride_xh
    DV += batch * stride_vb + head * stride_vh
    DX += batch * S * H * D + head * D
    DCQ += batch * T * H * D + head * D
    DCK += batch * T * H * D + head * D
    q_0 = tl.zeros([BT, BD], tl.float32)
    q_1, q_2, q_3, k_0, k_1, k_2, k_3, v_0, v_1, v_2, v_3 = q_0, q_0, q_0, q_0, q_0, q_0, q_0, q_0, q_0, q_0, q_0
    for start in tl.range(block * ROWS, tl.minimum(block * ROWS + ROWS, S), BT, disable_licm=True):
        rows = start + tl.arange(0, BT)
        t = rows - (S - T)  # output token at each input row
        x = _load(X, rows, columns, stride_xt, S, D)
        dx = tl.zeros([BT, BD], tl.float32)
        dx, q_0, q_1, q_2, q_3 = _through_taps(
            dx, q_0, q_1, q_2, q_3, x, DCQ, WQ + head * D, t, columns, H * D, H * D, T, D)  # fmt: skip
        dx, k_0, k_1, k_2, k_3 = _through_taps(
            dx, k_0, k_1, k_2, k_3, x, DCK, WK + head * D, t, columns, H * D, H * D, T, D)  # fmt: skip
        dx, v_0, v_1, v_2, v_3 = _through_taps(
            dx, v_0, v_1, v_2, v_3, x, DV, WV + head * D, t, columns, stride_vt, H * D, T, D)  # fmt: skip
        _store(DX, dx, rows, columns, H * D, S, D)
    DW += tl.program_id(0).to(tl.int64) * 3 * N_TAPS * D
    _store_taps(DW, q_0, q_1, q_2, q_3, columns, D)
    _store_taps(DW + N_TAPS * D, k_0, k_1, k_2, k_3, columns, D)
    _store_taps(DW + 2 * N_TAPS * D, v_0, v_1, v_2, v_3, columns, D)


def norm_tile(D: int) -> tuple[int, int]:
    """Return rows and columns of a tile that holds half of each head."""
    half = max(16, triton.next_power_of_2(D // 2))
    return TILE // half, half


def conv_tile(D: int) -> tuple[int, int]:
    """Return rows and columns of a tile of the convolution's backward."""
    width = max(16, triton.next_power_of_2(D))
    return CONV_TILE // width, width


@torch.library.custom_op("gkachat::features", mutates_args=())
@on_device_of_first
def features(
    x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return q, k and v, each (B, T, H, D), of x (B, S, H, D), weights (4, H, D) and tables (T, D/2) or (B, T, D/2)."""
    (B, S, H, D), T = x.shape, cos.size(-2)
    x, cos, sin = contiguous_channels(x), cos.contiguous(), sin.contiguous()
    q, k, v = (x.new_empty(B, T, H, D) for _ in range(3))
    BT, half = norm_tile(D)
    n_blocks = triton.cdiv(T, BT)
    forward_kernel[(n_blocks * B * H,)](
        x, w_q.contiguous(), w_k.contiguous(), w_v.contiguous(), cos, sin, q, k, v, *x.stride()[:3],
        *_table_strides(cos), S, T, H, D, n_blocks, BT=BT, HALF=half,
    )  # fmt: skip
    return q, k, v


@torch.library.custom_op("gkachat::features_backward", mutates_args=())
@on_device_of_first
def features_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x and of the three weights."""
    (B, S, H, D), T = x.shape, cos.size(-2)
    x, dq, dk, dv = (contiguous_channels(t) for t in (x, dq, dk, dv))
    cos, sin, w_q, w_k, w_v = (t.contiguous() for t in (cos, sin, w_q, w_k, w_v))
    dc_q, dc_k = (x.new_empty(B, T, H, D) for _ in range(2))
    BT, half = norm_tile(D)
    n_blocks = triton.cdiv(T, BT)
    norm_backward_kernel[(n_blocks * B * H,)](
        x, w_q, w_k, cos, sin, dq, dk, dc_q, dc_k, *x.stride()[:3], *_table_strides(cos),
        *dq.stride()[:3], *dk.stride()[:3], S, T, H, D, n_blocks, BT=BT, HALF=half,
    )  # fmt: skip
    dx = x.new_empty(B, S, H, D)
    BT, width = conv_tile(D)
    n_blocks = triton.cdiv(S, CONV_ROWS)
    parts = x.new_empty(B, H, n_blocks, 3, ShortConv.TAPS, D, dtype=torch.float32)
    conv_backward_kernel[(n_blocks * B * H,)](
        x, w_q, w_k, w_v, dc_q, dc_k, dv, dx, parts, *x.stride()[:3], *dv.stride()[:3],
        S, T, H, D, n_blocks, BT=BT, BD=width, ROWS=CONV_ROWS, num_warps=CONV_WARPS,
    )  # fmt: skip
    dw = parts.sum((0, 2)).permute(1, 2, 0, 3)  # (3, N, H, D)
    return dx, *(part.to(w_q.dtype, copy=True, memory_format=torch.contiguous_format) for part in dw)


def _table_strides(table: Tensor) -> tuple[int, int]:
    return (table.stride(0) if table.ndim == 3 else 0), table.stride(-2)


@features.register_fake
def _(x, w_q, w_k, w_v, cos, sin):
    B, _, H, D = x.shape
    return tuple(x.new_empty(B, cos.size(-2), H, D) for _ in range(3))


@features_backward.register_fake
def _(dq, dk, dv, x, w_q, w_k, w_v, cos, sin):
    return x.new_empty(x.shape), *(w.new_empty(w.shape) for w in (w_q, w_k, w_v))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
    return *features_backward(dq, dk, dv, *ctx.saved_tensors), None, None


features.register_autograd(_backward, setup_context=_save)


def convolved_features(x_BSHD: Tensor, weights: tuple[Tensor, Tensor, Tensor], rope: Rope) -> tuple[Tensor, ...]:
    """Return q, k and v of the last T tokens, each (B, T, H, D). T is that of the rope."""
    return features(x_BSHD, *weights, *rope)
