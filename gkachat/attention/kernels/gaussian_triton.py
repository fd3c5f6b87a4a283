"""Gaussian Kernel Attention fused in Triton, forward and backward. Imported only where it is used.

The kernel uses three facts that a general attention kernel cannot know:

- Keys and values are one tile. One load of x_j serves S = F_i F_j^T and Y += P X_j. With rope, F and X are two tensors.
- Scores are at most 0, and 0 on the diagonal. With self among the keys, the row's maximum is known beforehand and
  nothing is rescaled. Without self the kernel is an ordinary online softmax, and a row without keys gives zeros.
- dx sums a value, a key and a query part. The program that owns a block computes all three and writes dx once, without
  atomics, so that gradients are deterministic. That costs seven products where separate passes take five.

All arithmetic is float32, except that operands of products have the dtype of x. dx is formed as sum(dS f) - f sum(dS),
with both sums over the same rounded dS. The plain form would lose all precision in bfloat16 where features have a large
common offset. Some is still lost, since y is rounded too: dx is off by 1 % at an offset of 10 standard deviations, and
by 8 % at 100. The gradient of sigma takes the direct form, -2 sum(dL/ds s) / sigma, because Euler's identity cancels.

Loops have disable_licm: what Triton would hoist out of them takes registers that they need.
Axes: B batch, T time, H heads, D head_dim; b, i, j are rows of a block, of queries, of keys.
"""

import os
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkachat.attention.qkv import QKV

HALF_LOG2E = tl.constexpr(0.7213475204444817)  # log2(e) / 2, since exponentials are taken in base 2
LN2 = tl.constexpr(0.6931471805599453)

# Triton's interpreter computes with the raw bits of bfloat16 (triton issue 4972). Under the interpreter, tiles are kept
# in float32 and rounded to bfloat16's grid by hand, which gives the values that a GPU would multiply.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def rounded(tile, dtype: tl.constexpr):
    """Round a float32 tile to `dtype`."""
    if INTERPRET:
        if dtype == tl.bfloat16:
            bits = tile.to(tl.int32, bitcast=True)
            tile = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        tile = tile.to(dtype)
    return tile


@triton.jit
def _load_rows(base, rows, T, stride_t, D: tl.constexpr):
    """Load (rows, D) of one batch entry and head, with zeros beyond T."""
    d = tl.arange(0, D)
    tile = tl.load(base + rows[:, None] * stride_t + d[None, :], mask=(rows < T)[:, None], other=0.0)
    if INTERPRET:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _load_row(base, rows, T):
    """Load one number for each row, with zeros beyond T."""
    return tl.load(base + rows, mask=rows < T, other=0.0)


@triton.jit
def _log_weights(
    dots, offset_i, bias_j, scale, i, j, T, window,
    MASKED: tl.constexpr, INCLUDE_SELF: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Return 2 scale f_i.f_j - offset_i - bias_j where query i sees key j, and -inf elsewhere.

    scale = log2(e) / 2 sigma^2 and bias = scale |f|^2. With the query's own bias as its offset, the result is the
    base-2 score. With dot_lse_i = bias_i + lse_i as its offset, the result is log2 of the weight p_ij.
    """
    z = tl.minimum(2.0 * scale * dots - offset_i - bias_j, 0.0)
    if MASKED:
        distance = i - j
        if not CAUSAL:
            distance = tl.abs(distance)
        seen = (distance >= (0 if INCLUDE_SELF else 1)) & (distance < window) & (i < T) & (j < T)
        z = tl.where(seen, z, float("-inf"))
    return z


@triton.jit
def _key_bias(F, SIGMA, rows, bh, stride_fb, stride_ft, stride_fh, T, H, D: tl.constexpr):
    """Return scale |f|^2, computed from the rounded numbers that enter the products."""
    f = _load_rows(F + (bh // H).to(tl.int64) * stride_fb + (bh % H) * stride_fh, rows, T, stride_ft, D).to(tl.float32)
    sigma = tl.load(SIGMA + bh % H)
    return HALF_LOG2E / (sigma * sigma) * tl.sum(f * f, 1)


@triton.jit
def bias_kernel(F, SIGMA, BIAS, stride_fb, stride_ft, stride_fh, T, H, D: tl.constexpr, BLOCK: tl.constexpr):
    """Write the bias of each row."""
    bh = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bias = _key_bias(F, SIGMA, rows, bh, stride_fb, stride_ft, stride_fh, T, H, D)
    tl.store(BIAS + bh.to(tl.int64) * T + rows, bias, mask=rows < T)


@triton.jit
def backward_rows_kernel(
    F, SIGMA, Y, DY, LSE, BIAS, DOT_LSE, DELTA,
    stride_fb, stride_ft, stride_fh, stride_dyb, stride_dyt, stride_dyh, T, H, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what the backward needs of each row: bias, dot_lse = bias + lse, delta = <dy, y>."""
    bh = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch, head, out = (bh // H).to(tl.int64), bh % H, bh.to(tl.int64) * T + rows
    bias = _key_bias(F, SIGMA, rows, bh, stride_fb, stride_ft, stride_fh, T, H, D)
    y = _load_rows(Y + batch * T * H * D + head * D, rows, T, H * D, D).to(tl.float32)
    dy = _load_rows(DY + batch * stride_dyb + head * stride_dyh, rows, T, stride_dyt, D).to(tl.float32)
    lse = tl.load(LSE + out, mask=rows < T, other=0.0)
    tl.store(BIAS + out, bias, mask=rows < T)
    tl.store(DOT_LSE + out, bias + lse, mask=rows < T)
    tl.store(DELTA + out, tl.sum(y * dy, 1), mask=rows < T)


@triton.jit
def _attend_keys(
    acc, row_sum, row_max, f_i, bias_i, i, scale, F, X, BIAS, stride_ft, stride_xt, lo, hi, T, window,
    D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, INCLUDE_SELF: tl.constexpr, SEPARATE_F: tl.constexpr,
    CAUSAL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add keys lo to hi to the sums of queries i."""
    for j0 in tl.range(lo, hi, BN, disable_licm=True):
        j = j0 + tl.arange(0, BN)
        f_j = _load_rows(F, j, T, stride_ft, D)
        x_j = f_j
        if SEPARATE_F:
            x_j = _load_rows(X, j, T, stride_xt, D)
        dots = tl.dot(f_i, tl.trans(f_j), input_precision="tf32x3")
        bias_j = _load_row(BIAS, j, T)
        z = _log_weights(
            dots, bias_i[:, None], bias_j[None, :], scale, i[:, None], j[None, :], T, window, MASKED, INCLUDE_SELF,
            CAUSAL,
        )  # fmt: skip
        if INCLUDE_SELF:
            if MASKED:  # exactly 0 on the diagonal, so that no row's sum is below 1
                z = tl.where(i[:, None] == j[None, :], 0.0, z)
            p = tl.exp2(z)
            row_sum += tl.sum(p, 1)
        else:
            new_max = tl.maximum(row_max, tl.max(z, 1))
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            rescale = tl.exp2(row_max - safe_max)
            p = tl.exp2(z - safe_max[:, None])
            row_sum = row_sum * rescale + tl.sum(p, 1)
            acc = acc * rescale[:, None]
            row_max = new_max
        acc = tl.dot(rounded(p, DTYPE), x_j, acc, input_precision="tf32x3")
    return acc, row_sum, row_max


@triton.jit
def forward_kernel(
    F, X, BIAS, SIGMA, Y, LSE, stride_fb, stride_ft, stride_fh, stride_xb, stride_xt, stride_xh, T, H, window,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, INCLUDE_SELF: tl.constexpr, SEPARATE_F: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Write y and log2 of each row's sum for one block of queries."""
    bh = tl.program_id(1)
    batch, head = (bh // H).to(tl.int64), bh % H
    DTYPE: tl.constexpr = X.dtype.element_ty
    F += batch * stride_fb + head * stride_fh
    X += batch * stride_xb + head * stride_xh
    Y += batch * T * H * D + head * D
    BIAS += bh.to(tl.int64) * T
    i0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the longest rows start first
    i = i0 + tl.arange(0, BM)
    sigma = tl.load(SIGMA + head)
    scale = HALF_LOG2E / (sigma * sigma)
    f_i = _load_rows(F, i, T, stride_ft, D)
    bias_i = _load_row(BIAS, i, T)
    acc = tl.zeros([BM, D], tl.float32)
    row_sum = tl.zeros([BM], tl.float32)
    row_max = tl.full([BM], float("-inf"), tl.float32)
    # Keys come in three ranges: the window's edge (masked), keys that every row sees (not masked), the diagonal
    # (masked). Without the causal mask one masked loop covers all keys, because more loops need too many registers.
    lo = tl.maximum(0, i0 - window + 1) // BN * BN
    diagonal, hi = i0 // BN * BN, tl.minimum(T, i0 + BM)
    if CAUSAL:
        inner = tl.minimum(tl.maximum(lo, tl.cdiv(tl.maximum(0, i0 + BM - window), BN) * BN), diagonal)
        acc, row_sum, row_max = _attend_keys(
            acc, row_sum, row_max, f_i, bias_i, i, scale, F, X, BIAS, stride_ft, stride_xt, lo, inner,
            T, window, D, BN, True, INCLUDE_SELF, SEPARATE_F, CAUSAL, DTYPE)  # fmt: skip
        acc, row_sum, row_max = _attend_keys(
            acc, row_sum, row_max, f_i, bias_i, i, scale, F, X, BIAS, stride_ft, stride_xt, inner, diagonal,
            T, window, D, BN, False, INCLUDE_SELF, SEPARATE_F, CAUSAL, DTYPE)  # fmt: skip
        lo = diagonal
    else:
        hi = tl.minimum(T, i0 + BM - 1 + window)
    acc, row_sum, row_max = _attend_keys(
        acc, row_sum, row_max, f_i, bias_i, i, scale, F, X, BIAS, stride_ft, stride_xt, lo, hi,
        T, window, D, BN, True, INCLUDE_SELF, SEPARATE_F, CAUSAL, DTYPE)  # fmt: skip
    safe_sum = tl.where(row_sum > 0.0, row_sum, 1.0)
    lse = tl.log2(safe_sum)
    if not INCLUDE_SELF:  # a row without keys: exp2(z - inf) is 0 in the backward
        lse = tl.where(row_sum > 0.0, row_max + lse, float("inf"))
    d = tl.arange(0, D)
    out = Y + i[:, None] * (H * D) + d[None, :]
    tl.store(out, rounded(acc / safe_sum[:, None], DTYPE), mask=(i < T)[:, None])
    tl.store(LSE + bh.to(tl.int64) * T + i, lse, mask=i < T)


@triton.jit
def _backward_as_keys(
    acc, acc_df, ds_sum, f_b, x_b, bias_b, b, scale, inv_sigma2, F, DY, DOT_LSE, DELTA, stride_ft, stride_dyt,
    lo, hi, T, window,
    D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, INCLUDE_SELF: tl.constexpr, SEPARATE_F: tl.constexpr,
    CAUSAL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add the value part and the key part of dx: block b as keys and values of queries lo to hi."""
    for i0 in tl.range(lo, hi, BN, disable_licm=True):
        i = i0 + tl.arange(0, BN)
        f_i = _load_rows(F, i, T, stride_ft, D)
        dy_i = _load_rows(DY, i, T, stride_dyt, D)
        dot_lse, delta = _load_row(DOT_LSE, i, T), _load_row(DELTA, i, T)
        dots = tl.dot(f_b, tl.trans(f_i), input_precision="tf32x3")  # transposed: [b, i]
        log_p = _log_weights(
            dots, dot_lse[None, :], bias_b[:, None], scale, i[None, :], b[:, None], T, window, MASKED, INCLUDE_SELF,
            CAUSAL,
        )  # fmt: skip
        p = tl.exp2(log_p)
        dp = tl.dot(x_b, tl.trans(dy_i), input_precision="tf32x3")
        ds = rounded(p * (dp - delta[None, :]) * inv_sigma2, DTYPE)
        ds_sum += tl.sum(ds.to(tl.float32), 1)
        acc = tl.dot(rounded(p, DTYPE), dy_i, acc, input_precision="tf32x3")
        if SEPARATE_F:
            acc_df = tl.dot(ds, f_i, acc_df, input_precision="tf32x3")
        else:
            acc = tl.dot(ds, f_i, acc, input_precision="tf32x3")
    return acc, acc_df, ds_sum


@triton.jit
def _backward_as_queries(
    acc, acc_df, ds_sum, dsigma_acc, f_b, dy_b, dot_lse_b, delta_b, b, scale, inv_sigma2, F, X, BIAS,
    stride_ft, stride_xt, lo, hi, T, window,
    D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, INCLUDE_SELF: tl.constexpr, SEPARATE_F: tl.constexpr,
    CAUSAL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add the query part of dx, and the gradient of sigma: block b as queries of keys lo to hi."""
    for j0 in tl.range(lo, hi, BN, disable_licm=True):
        j = j0 + tl.arange(0, BN)
        f_j = _load_rows(F, j, T, stride_ft, D)
        x_j = f_j
        if SEPARATE_F:
            x_j = _load_rows(X, j, T, stride_xt, D)
        bias_j = _load_row(BIAS, j, T)
        dots = tl.dot(f_b, tl.trans(f_j), input_precision="tf32x3")
        log_p = _log_weights(
            dots, dot_lse_b[:, None], bias_j[None, :], scale, b[:, None], j[None, :], T, window, MASKED, INCLUDE_SELF,
            CAUSAL,
        )  # fmt: skip
        p = tl.exp2(log_p)
        dp = tl.dot(dy_b, tl.trans(x_j), input_precision="tf32x3")
        ds = p * (dp - delta_b[:, None])
        # The ds of a row sum to 0, so that log p can stand for the score. It is small wherever p is not.
        dsigma_acc += tl.sum(ds * tl.where(p > 0.0, log_p, 0.0), 1)
        ds = rounded(ds * inv_sigma2, DTYPE)
        ds_sum += tl.sum(ds.to(tl.float32), 1)
        if SEPARATE_F:
            acc_df = tl.dot(ds, f_j, acc_df, input_precision="tf32x3")
        else:
            acc = tl.dot(ds, f_j, acc, input_precision="tf32x3")
    return acc, acc_df, ds_sum, dsigma_acc


@triton.jit
def backward_kernel(
    F, X, BIAS, DOT_LSE, SIGMA, DY, DELTA, DX, DF, DSIGMA,
    stride_fb, stride_ft, stride_fh, stride_xb, stride_xt, stride_xh, stride_dyb, stride_dyt, stride_dyh,
    T, H, window, n_blocks,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, INCLUDE_SELF: tl.constexpr, SEPARATE_F: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Write dx of one block, and its part of the gradient of sigma.

    SEPARATE_F: the gradients of X and F have an accumulator each, and DF is written too.
    """
    bh = tl.program_id(1)
    batch, head = (bh // H).to(tl.int64), bh % H
    DTYPE: tl.constexpr = X.dtype.element_ty
    F += batch * stride_fb + head * stride_fh
    X += batch * stride_xb + head * stride_xh
    DY += batch * stride_dyb + head * stride_dyh
    BIAS += bh.to(tl.int64) * T
    DOT_LSE += bh.to(tl.int64) * T
    DELTA += bh.to(tl.int64) * T
    b0 = tl.program_id(0) * BM
    b = b0 + tl.arange(0, BM)
    sigma = tl.load(SIGMA + head)
    inv_sigma2 = 1.0 / (sigma * sigma)
    scale = HALF_LOG2E * inv_sigma2
    f_b = _load_rows(F, b, T, stride_ft, D)
    x_b = f_b
    if SEPARATE_F:
        x_b = _load_rows(X, b, T, stride_xt, D)
    bias_b = _load_row(BIAS, b, T)
    acc = tl.zeros([BM, D], tl.float32)
    acc_df = acc
    if SEPARATE_F:
        acc_df = tl.zeros([BM, D], tl.float32)
    ds_sum = tl.zeros([BM], tl.float32)  # sum of ds over both roles, multiplied by f at the end
    dsigma_acc = tl.zeros([BM], tl.float32)  # sum of ds times score

    # Later queries: the diagonal (masked), queries that see every key (not masked), the window's edge (masked).
    lo = tl.maximum(0, b0 - window + 1) // BN * BN
    start, hi = b0 // BN * BN, tl.minimum(T, b0 + BM - 1 + window)
    window_edge = lo
    if CAUSAL:
        unmasked = tl.minimum(tl.cdiv(b0 + BM, BN) * BN, tl.cdiv(hi, BN) * BN)
        window_edge = tl.maximum(unmasked, tl.minimum(b0 + window, T) // BN * BN)
        acc, acc_df, ds_sum = _backward_as_keys(
            acc, acc_df, ds_sum, f_b, x_b, bias_b, b, scale, inv_sigma2, F, DY, DOT_LSE, DELTA, stride_ft, stride_dyt,
            start, unmasked, T, window, D, BN, True, INCLUDE_SELF, SEPARATE_F, CAUSAL, DTYPE)  # fmt: skip
        acc, acc_df, ds_sum = _backward_as_keys(
            acc, acc_df, ds_sum, f_b, x_b, bias_b, b, scale, inv_sigma2, F, DY, DOT_LSE, DELTA, stride_ft, stride_dyt,
            unmasked, window_edge, T, window, D, BN, False, INCLUDE_SELF, SEPARATE_F, CAUSAL, DTYPE)  # fmt: skip
    acc, acc_df, ds_sum = _backward_as_keys(
        acc, acc_df, ds_sum, f_b, x_b, bias_b, b, scale, inv_sigma2, F, DY, DOT_LSE, DELTA, stride_ft, stride_dyt,
        window_edge, hi, T, window, D, BN, True, INCLUDE_SELF, SEPARATE_F, CAUSAL, DTYPE)  # fmt: skip

    # Earlier keys: the window's edge, keys that every row sees, the diagonal.
    dy_b = _load_rows(DY, b, T, stride_dyt, D)
    dot_lse_b, delta_b = _load_row(DOT_LSE, b, T), _load_row(DELTA, b, T)
    if CAUSAL:
        inner = tl.minimum(tl.maximum(lo, tl.cdiv(tl.maximum(0, b0 + BM - window), BN) * BN), start)
        acc, acc_df, ds_sum, dsigma_acc = _backward_as_queries(
            acc, acc_df, ds_sum, dsigma_acc, f_b, dy_b, dot_lse_b, delta_b, b, scale, inv_sigma2, F, X, BIAS,
            stride_ft, stride_xt, lo, inner, T, window,
            D, BN, True, INCLUDE_SELF, SEPARATE_F, CAUSAL, DTYPE)  # fmt: skip
        acc, acc_df, ds_sum, dsigma_acc = _backward_as_queries(
            acc, acc_df, ds_sum, dsigma_acc, f_b, dy_b, dot_lse_b, delta_b, b, scale, inv_sigma2, F, X, BIAS,
            stride_ft, stride_xt, inner, start, T, window,
            D, BN, False, INCLUDE_SELF, SEPARATE_F, CAUSAL, DTYPE)  # fmt: skip
        lo, hi = start, tl.minimum(T, b0 + BM)
    acc, acc_df, ds_sum, dsigma_acc = _backward_as_queries(
        acc, acc_df, ds_sum, dsigma_acc, f_b, dy_b, dot_lse_b, delta_b, b, scale, inv_sigma2, F, X, BIAS,
        stride_ft, stride_xt, lo, hi, T, window, D, BN, True, INCLUDE_SELF, SEPARATE_F, CAUSAL, DTYPE)  # fmt: skip

    d = tl.arange(0, D)
    out = batch * T * H * D + head * D + b[:, None] * (H * D) + d[None, :]
    # Loading f again takes fewer registers than keeping it. `volatile` stops Triton from merging the two loads.
    f_b = tl.load(F + b[:, None] * stride_ft + d[None, :], mask=(b < T)[:, None], other=0.0, volatile=True)
    f_term = ds_sum[:, None] * f_b.to(tl.float32)
    if SEPARATE_F:
        tl.store(DF + out, rounded(acc_df - f_term, DTYPE), mask=(b < T)[:, None])
    else:
        acc = acc - f_term
    tl.store(DX + out, rounded(acc, DTYPE), mask=(b < T)[:, None])
    dsigma = -2.0 * LN2 * tl.sum(dsigma_acc, 0) / sigma
    tl.store(DSIGMA + bh.to(tl.int64) * n_blocks + tl.program_id(0), dsigma)


# Candidates (BM, BN, warps, pipeline stages) that the autotuner times on first use. Triton 3.9 compiles all of them for
# sm_90 without spills and within its shared memory (tests/attention/kernels). float32 products are made of three in
# TF32, which take registers, so that their blocks are small.
FORWARD = {
    (torch.bfloat16, 64): [(128, 64, 8, 3), (64, 64, 4, 3)],
    (torch.bfloat16, 128): [(128, 64, 8, 3), (64, 32, 4, 3)],
    (torch.float32, 64): [(64, 32, 4, 2)],
    (torch.float32, 128): [(16, 32, 4, 1)],
}
# The third key is SEPARATE_F. Rope needs it, and in float32 it takes fewer registers.
BACKWARD = {
    (torch.bfloat16, 64, False): [(128, 64, 8, 1), (128, 32, 8, 2), (64, 32, 4, 2)],
    (torch.bfloat16, 64, True): [(128, 32, 8, 2), (64, 32, 4, 2)],
    (torch.bfloat16, 128, False): [(128, 64, 8, 1), (128, 32, 8, 2), (64, 32, 4, 2)],
    (torch.bfloat16, 128, True): [(128, 32, 8, 1)],
    (torch.float32, 64, True): [(64, 16, 4, 1)],
    (torch.float32, 128, True): [(16, 16, 8, 1)],
}


def backward_candidates(dtype: torch.dtype, D: int, separate_f: bool, causal: bool) -> list[tuple[int, int, int, int]]:
    """Return the candidates that fit the registers. Masked blocks, which all are if not causal, need BN below 64."""
    return [candidate for candidate in BACKWARD[dtype, D, separate_f] if causal or candidate[1] < 64]


ROWS = 64  # block of the kernels that work row by row


@cache
def _tuned(kernel, candidates: tuple[tuple[int, int, int, int], ...]):
    configs = [
        triton.Config({"BM": rows, "BN": columns}, num_warps=warps, num_stages=stages)
        for rows, columns, warps, stages in candidates
    ]
    if INTERPRET.value:  # times mean nothing there
        configs = configs[-1:]
    return triton.autotune(configs, key=["D", "INCLUDE_SELF", "SEPARATE_F", "CAUSAL"])(kernel)


def contiguous_channels(t: Tensor) -> Tensor:
    """Return x if the channels of each head are contiguous, as the kernels read them, and otherwise a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


@torch.library.custom_op("gkachat::gka", mutates_args=())
def gka(
    x: Tensor, f: Tensor | None, sigma: Tensor, window: int, include_self: bool, causal: bool
) -> tuple[Tensor, Tensor]:
    """Return y (B, T, H, D) and log2 of the row sums (B, H, T).

    x and f are (B, T, H, D), where f None stands for x; sigma is (H,) float32.
    """
    B, T, H, D = x.shape
    x = contiguous_channels(x)
    f, separate_f = (x, False) if f is None else (contiguous_channels(f), True)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    lse, bias = x.new_empty(2, B, H, T, dtype=torch.float32)
    bias_kernel[(triton.cdiv(T, ROWS), B * H)](f, sigma, bias, *f.stride()[:3], T, H, D=D, BLOCK=ROWS)
    _tuned(forward_kernel, tuple(FORWARD[x.dtype, D]))[lambda meta: (triton.cdiv(T, meta["BM"]), B * H)](
        f, x, bias, sigma, y, lse, *f.stride()[:3], *x.stride()[:3], T, H, window,
        D=D, INCLUDE_SELF=include_self, SEPARATE_F=separate_f, CAUSAL=causal,
    )  # fmt: skip
    return y, lse


@torch.library.custom_op("gkachat::gka_backward", mutates_args=())
def gka_backward(
    dy: Tensor, x: Tensor, f: Tensor | None, sigma: Tensor, y: Tensor, lse: Tensor,
    window: int, include_self: bool, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, f (empty where f is None) and sigma."""
    B, T, H, D = x.shape
    x, dy = contiguous_channels(x), contiguous_channels(dy)
    features = x if f is None else contiguous_channels(f)
    separate_f = f is not None or x.dtype == torch.float32
    candidates = backward_candidates(x.dtype, D, separate_f, causal)
    bias, dot_lse, delta = lse.new_empty(3, *lse.shape)
    backward_rows_kernel[(triton.cdiv(T, ROWS), B * H)](
        features, sigma, y, dy, lse, bias, dot_lse, delta, *features.stride()[:3], *dy.stride()[:3], T, H,
        D=D, BLOCK=ROWS,
    )  # fmt: skip
    dx = torch.empty_like(y)
    df = torch.empty_like(y) if separate_f else y.new_empty(0)
    # Each block writes its part, and the sum has a fixed order. Zeros, because larger blocks write fewer parts.
    dsigma = lse.new_zeros(B, H, triton.cdiv(T, min(rows for rows, *_ in candidates)))
    _tuned(backward_kernel, tuple(candidates))[lambda meta: (triton.cdiv(T, meta["BM"]), B * H)](
        features, x, bias, dot_lse, sigma, dy, delta, dx, df, dsigma,
        *features.stride()[:3], *x.stride()[:3], *dy.stride()[:3], T, H, window, dsigma.size(2),
        D=D, INCLUDE_SELF=include_self, SEPARATE_F=separate_f, CAUSAL=causal,
    )  # fmt: skip
    if f is None and separate_f:
        dx, df = dx + df, y.new_empty(0)
    return dx, df, dsigma.sum((0, 2))


@gka.register_fake
def _(x, f, sigma, window, include_self, causal):
    B, T, H, _ = x.shape
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(B, H, T, dtype=torch.float32)


@gka_backward.register_fake
def _(dy, x, f, sigma, y, lse, window, include_self, causal):
    return torch.empty_like(y), y.new_empty(0) if f is None else torch.empty_like(y), torch.empty_like(sigma)


def _save(ctx, inputs, output) -> None:
    x, f, sigma, ctx.window, ctx.include_self, ctx.causal = inputs
    ctx.save_for_backward(x, f, sigma, *output)


def _backward(ctx, dy: Tensor, _):
    x, f, sigma, y, lse = ctx.saved_tensors  # read once, as recomputed blocks allow no more
    dx, df, dsigma = gka_backward(dy, x, f, sigma, y, lse, ctx.window, ctx.include_self, ctx.causal)
    return dx, None if f is None else df, dsigma, None, None, None


gka.register_autograd(_backward, setup_context=_save)


def attend(qkv: QKV, *, window: int | None, causal: bool, include_self: bool) -> Tensor:
    """Return Gaussian attention where queries and keys are one tensor, (B, T, H, D). It reads qkv.k and not qkv.q.

    Rotated features are a tensor of their own, since rotating them in the kernel takes too much shared memory.
    """
    f = None if qkv.k is qkv.v else qkv.k
    window = qkv.v.size(1) if window is None else window
    return gka(qkv.v, f, qkv.sigma.float(), window, include_self, causal)[0]
