"""Kernels of Gaussian Kernel Attention in Triton, forward and backward. gaussian_triton.py launches them.

The kernel uses three facts that a general attention kernel cannot know:

- Keys and values are one tile. One load of x_j serves S = F_i F_j^T and Y += P X_j. With rope, F and X are two tensors.
- Scores are at most 0, and 0 on the diagonal. With self among the keys, the row's maximum is known beforehand and
  nothing is rescaled. Without self the kernel is an ordinary online softmax, and a row without keys gives zeros.
- dx sums a value, a key and a query part. Where F is X, the first two share one accumulator.

The backward has five products for each pair of blocks, as FlashAttention 2 (arXiv 2307.08691, section 3.2): a program
owns a block of keys, walks over the queries that see it, and adds the query part to a float32 buffer with atomics. The
order of these additions changes from run to run, so that dx on a GPU is the same only up to float32 rounding. y, the
row sums and the gradient of sigma have fixed orders: they are the same bits in every run with the same block sizes,
which the autotuner chooses in each process.

All arithmetic is float32, except that operands of products have the dtype of x. dx is formed as sum(dS f) - f sum(dS),
with both sums over the same rounded dS. The plain form would lose all precision in bfloat16 where features have a large
common offset. Some is still lost, since y is rounded too: dx is off by 1 % at an offset of 10 standard deviations, and
by 8 % at 100. The gradient of sigma takes the direct form, -2 sum(dL/ds s) / sigma, because Euler's identity cancels.
The sums of dS over rows and columns are products with a tile of ones, which a tensor core takes less time for than
threads take to exchange them.

Tiles are loaded through tensor descriptors: the TMA unit of a Hopper then computes addresses and bounds. Vectors with a
number for each row (bias, lse) are padded to a multiple of PAD rows, with a value that gives rows beyond T no weight.
Loops have disable_licm: what Triton would hoist out of them takes registers that they need.
Axes: B batch, T time, H heads, D head_dim; i are queries, j are keys.
"""

import os

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exponentials are taken in base 2
LN2 = tl.constexpr(0.6931471805599453)
MIN_BLOCK = tl.constexpr(16)  # the smallest block
HIDDEN = tl.constexpr(1e30)  # exp2(-HIDDEN) is 0, and unlike infinity HIDDEN times 0 is 0

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
def _block(T, ROWS: tl.constexpr):
    """Return the batch entry times heads, and the number of its block of rows, that this program works on.

    All programs are on the grid's first axis, since the others end at 65,535.
    """
    blocks = tl.cdiv(T, ROWS)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks


@triton.jit
def _load_tile(descriptor, batch, row, head, ROWS: tl.constexpr, D: tl.constexpr):
    """Load (ROWS, D) of one batch entry and head from a (B, T, H, D) descriptor, with zeros beyond T."""
    tile = descriptor.load([batch, row, head, 0]).reshape(ROWS, D)
    if INTERPRET:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _rows_at(base, bh, rows, T, H, stride_b, stride_t, stride_h, D: tl.constexpr):
    """Return pointers to rows of one batch entry and head, and the mask of those before T. Offsets have 64 bits."""
    base += (bh // H).to(tl.int64) * stride_b + (bh % H).to(tl.int64) * stride_h
    return base + rows[:, None].to(tl.int64) * stride_t + tl.arange(0, D)[None, :], (rows < T)[:, None]


@triton.jit
def _load_rows(base, bh, rows, T, H, stride_b, stride_t, stride_h, D: tl.constexpr):
    """Load rows of one batch entry and head, with zeros beyond T."""
    at, inside = _rows_at(base, bh, rows, T, H, stride_b, stride_t, stride_h, D)
    tile = tl.load(at, mask=inside, other=0.0)
    if INTERPRET:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _contiguous_rows_at(base, bh, rows, T, H, D: tl.constexpr):
    """Return pointers to rows of a contiguous (B, T, H, D), and the mask of those before T."""
    offset = (((bh // H).to(tl.int64) * T + rows[:, None]) * H + bh % H) * D
    return base + offset + tl.arange(0, D)[None, :], (rows < T)[:, None]


@triton.jit
def _write_bias(F, SIGMA, BIAS, bh, rows, stride_fb, stride_ft, stride_fh, T, T_PAD, H, D: tl.constexpr):
    """Write and return log2(e) |f|^2 / 2 sigma^2 of each row, HIDDEN beyond T. |f|^2 is that of the rounded numbers."""
    f = _load_rows(F, bh, rows, T, H, stride_fb, stride_ft, stride_fh, D).to(tl.float32)
    sigma = tl.load(SIGMA + bh % H)
    bias = tl.where(rows < T, 0.5 * LOG2E / (sigma * sigma) * tl.sum(f * f, 1), HIDDEN)
    tl.store(BIAS + bh.to(tl.int64) * T_PAD + rows, bias)
    return bias, sigma


@triton.jit
def bias_kernel(F, SIGMA, BIAS, stride_fb, stride_ft, stride_fh, T, T_PAD, H, D: tl.constexpr, BLOCK: tl.constexpr):
    """Write the bias of each row."""
    bh, block = _block(T_PAD, BLOCK)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    _write_bias(F, SIGMA, BIAS, bh, rows, stride_fb, stride_ft, stride_fh, T, T_PAD, H, D)


@triton.jit
def backward_rows_kernel(
    F, SIGMA, Y, DY, LSE, BIAS, DOT_LSE, DELTA,
    stride_fb, stride_ft, stride_fh, stride_dyb, stride_dyt, stride_dyh, T, T_PAD, H,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what the backward needs of each row: bias, dot_lse = bias + lse, delta = <dy, y> / sigma^2."""
    bh, block = _block(T_PAD, BLOCK)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    bias, sigma = _write_bias(F, SIGMA, BIAS, bh, rows, stride_fb, stride_ft, stride_fh, T, T_PAD, H, D)
    lse = tl.load(LSE + bh.to(tl.int64) * T + rows, mask=rows < T, other=0.0)
    y_at, inside = _contiguous_rows_at(Y, bh, rows, T, H, D)
    y = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    dy = _load_rows(DY, bh, rows, T, H, stride_dyb, stride_dyt, stride_dyh, D).to(tl.float32)
    out = bh.to(tl.int64) * T_PAD + rows
    tl.store(DOT_LSE + out, tl.minimum(bias + lse, HIDDEN))
    tl.store(DELTA + out, tl.sum(y * dy, 1) / (sigma * sigma))


@triton.jit
def backward_sum_kernel(
    F, DF_SUM, DS_SUM, DF, stride_fb, stride_ft, stride_fh, T, T_PAD, H, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write df = sum(ds f) - f sum(ds), where both sums are complete."""
    bh, block = _block(T_PAD, BLOCK)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    f = _load_rows(F, bh, rows, T, H, stride_fb, stride_ft, stride_fh, D).to(tl.float32)
    at = bh.to(tl.int64) * T_PAD + rows
    df = tl.load(DF_SUM + at[:, None] * D + tl.arange(0, D)[None, :]) - f * tl.load(DS_SUM + at)[:, None]
    out, inside = _contiguous_rows_at(DF, bh, rows, T, H, D)
    tl.store(out, rounded(df, DF.dtype.element_ty), mask=inside)


@triton.jit
def _is_masked(i0, j0, ROWS_I: tl.constexpr, ROWS_J: tl.constexpr, window, CAUSAL: tl.constexpr):
    """Return whether a tile has pairs that the mask hides, or the diagonal."""
    masked = i0 + ROWS_I - j0 > window
    if CAUSAL:
        masked |= i0 < j0 + ROWS_J
    else:
        masked |= (j0 + ROWS_J - i0 > window) | ((i0 < j0 + ROWS_J) & (j0 < i0 + ROWS_I))
    return masked


@triton.jit
def _hide(z, i, j, window, INCLUDE_SELF: tl.constexpr, CAUSAL: tl.constexpr):
    """Set z to -HIDDEN where query i does not see key j."""
    distance = i - j
    if not CAUSAL:
        distance = tl.abs(distance)
    return tl.where((distance >= (0 if INCLUDE_SELF else 1)) & (distance < window), z, -HIDDEN)


@triton.jit
def forward_kernel(
    FQ, FK, X, BIAS, SIGMA, Y, LSE, T, T_PAD, H, window,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, INCLUDE_SELF: tl.constexpr, SEPARATE_F: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Write y and log2 of each row's sum for one block of queries.

    FQ, FK and X are descriptors of the features by blocks of queries and of keys, and of the values by blocks of keys.
    """
    bh, block = _block(T, BM)
    batch, head = bh // H, bh % H
    DTYPE: tl.constexpr = FQ.dtype
    i0 = (tl.cdiv(T, BM) - 1 - block) * BM  # the longest rows start first
    i = i0 + tl.arange(0, BM)
    sigma = tl.load(SIGMA + head)
    scale = LOG2E / (sigma * sigma)
    f_i = _load_tile(FQ, batch, i0, head, BM, D)
    BIAS += bh.to(tl.int64) * T_PAD
    bias_i = tl.load(BIAS + i)
    acc = tl.zeros([BM, D], tl.float32)
    row_sum = tl.zeros([BM], tl.float32)
    row_max = tl.full([BM], -HIDDEN, tl.float32)
    lo, hi = tl.maximum(0, i0 - window + 1) // BN * BN, tl.minimum(T, i0 + BM)
    if not CAUSAL:
        hi = tl.minimum(T, i0 + BM - 1 + window)
    for j0 in tl.range(lo, hi, BN, disable_licm=True):
        j = j0 + tl.arange(0, BN)
        f_j = _load_tile(FK, batch, j0, head, BN, D)
        x_j = f_j
        if SEPARATE_F:
            x_j = _load_tile(X, batch, j0, head, BN, D)
        bias_j = tl.load(BIAS + j)
        dots = tl.dot(f_i, tl.trans(f_j), input_precision="tf32x3")
        z = tl.minimum(scale * dots - bias_i[:, None] - bias_j[None, :], 0.0)  # base-2 scores
        if _is_masked(i0, j0, BM, BN, window, CAUSAL):
            z = _hide(z, i[:, None], j[None, :], window, INCLUDE_SELF, CAUSAL)
            if INCLUDE_SELF:  # exactly 0 on the diagonal, so that no row's sum is below 1
                z = tl.where(i[:, None] == j[None, :], 0.0, z)
        if not INCLUDE_SELF:
            new_max = tl.maximum(row_max, tl.max(z, 1))
            safe_max = tl.where(new_max <= -HIDDEN, 0.0, new_max)
            rescale = tl.exp2(row_max - safe_max)
            z -= safe_max[:, None]
            row_sum *= rescale
            acc *= rescale[:, None]
            row_max = new_max
        p = tl.exp2(z)
        row_sum += tl.sum(p, 1)
        acc = tl.dot(rounded(p, DTYPE), x_j, acc, input_precision="tf32x3")
    safe_sum = tl.where(row_sum > 0.0, row_sum, 1.0)
    lse = tl.log2(safe_sum)
    if not INCLUDE_SELF:  # a row without keys has weights of 0 in the backward
        lse = tl.where(row_sum > 0.0, row_max + lse, HIDDEN)
    out, inside = _contiguous_rows_at(Y, bh, i, T, H, D)
    tl.store(out, rounded(acc / safe_sum[:, None], DTYPE), mask=inside)
    tl.store(LSE + bh.to(tl.int64) * T + i, lse, mask=i < T)


@triton.jit
def backward_kernel(
    FQ, F, X, DY, BIAS, DOT_LSE, DELTA, SIGMA, DF_SUM, DS_SUM, DSIGMA, DX,
    stride_fb, stride_ft, stride_fh, stride_xb, stride_xt, stride_xh, T, T_PAD, H, window,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, INCLUDE_SELF: tl.constexpr, SEPARATE_F: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Add to DF_SUM and DS_SUM what a block of keys and the queries that see it contribute, and write to DSIGMA.

    FQ and DY are descriptors by blocks of queries. The block of keys is loaded through pointers: Triton then multiplies
    it from shared memory, and through a descriptor it would keep it in registers. DF_SUM is (B, H, T_PAD, D), DS_SUM is
    (B, H, T_PAD), and both start at zero. DSIGMA has a number for each block. Where F is X, the value part is in
    DF_SUM too, and DX is None; otherwise it is written to DX.
    """
    bh, block = _block(T, BM)
    batch, head = bh // H, bh % H
    DTYPE: tl.constexpr = FQ.dtype
    j0 = block * BM
    j = j0 + tl.arange(0, BM)
    sigma = tl.load(SIGMA + head)
    inv_sigma2 = 1.0 / (sigma * sigma)
    scale = inv_sigma2 * LOG2E
    f_j = _load_rows(F, bh, j, T, H, stride_fb, stride_ft, stride_fh, D)
    x_j = f_j
    if SEPARATE_F:
        x_j = _load_rows(X, bh, j, T, H, stride_xb, stride_xt, stride_xh, D)
    row0 = bh.to(tl.int64) * T_PAD  # added within the loop: pointers kept for it would take registers
    bias_j = tl.load(BIAS + row0 + j)
    acc = tl.zeros([BM, D], tl.float32)
    acc_dx = acc
    if SEPARATE_F:
        acc_dx = tl.zeros([BM, D], tl.float32)
    ds_sum = tl.zeros([BM, 16], tl.float32)
    dsigma_acc = tl.zeros([BM], tl.float32)
    ones_i = rounded(tl.full([BN, 16], 1.0, tl.float32), DTYPE)
    ones_j = rounded(tl.full([BM, 16], 1.0, tl.float32), DTYPE)
    lo, hi = j0 // BN * BN, tl.minimum(T, j0 + BM - 1 + window)
    if not CAUSAL:
        lo = tl.maximum(0, j0 - window + 1) // BN * BN
    for i0 in tl.range(lo, hi, BN, disable_licm=True):
        i = i0 + tl.arange(0, BN)
        f_i = _load_tile(FQ, batch, i0, head, BN, D)
        dy_i = _load_tile(DY, batch, i0, head, BN, D)
        dot_lse, delta = tl.load(DOT_LSE + row0 + i), tl.load(DELTA + row0 + i)
        dots = tl.dot(f_j, tl.trans(f_i), input_precision="tf32x3")  # transposed: [j, i]
        dp = tl.dot(x_j, tl.trans(dy_i), input_precision="tf32x3")
        log_p = tl.minimum(scale * dots - dot_lse[None, :] - bias_j[:, None], 0.0)
        if _is_masked(i0, j0, BN, BM, window, CAUSAL):
            log_p = _hide(log_p, i[None, :], j[:, None], window, INCLUDE_SELF, CAUSAL)
        p = tl.exp2(log_p)
        ds = p * (dp * inv_sigma2 - delta[None, :])
        # The ds of a query sum to 0, so that log p can stand for the score. It is small wherever p is not.
        dsigma_acc += tl.sum(ds * log_p, 1)
        p, ds = rounded(p, DTYPE), rounded(ds, DTYPE)
        ds_sum = tl.dot(ds, ones_i, ds_sum, input_precision="tf32x3")
        if SEPARATE_F:
            acc_dx = tl.dot(p, dy_i, acc_dx, input_precision="tf32x3")
        else:
            acc = tl.dot(p, dy_i, acc, input_precision="tf32x3")
        acc = tl.dot(ds, f_i, acc, input_precision="tf32x3")
        ds = tl.trans(ds)
        df_i = tl.dot(ds, f_j, input_precision="tf32x3")
        ds_sum_i = tl.max(tl.dot(ds, ones_j, input_precision="tf32x3"), 1)  # the columns are equal
        tl.atomic_add(DS_SUM + row0 + i, ds_sum_i, sem="relaxed")
        at = DF_SUM + (row0 + i0) * D + tl.arange(0, BN)[:, None] * D + tl.arange(0, D)[None, :]
        tl.atomic_add(at, df_i, sem="relaxed")
    at = DF_SUM + (row0 + j0) * D + tl.arange(0, BM)[:, None] * D + tl.arange(0, D)[None, :]
    tl.atomic_add(at, acc, sem="relaxed")
    tl.atomic_add(DS_SUM + row0 + j0 + tl.arange(0, BM), tl.max(ds_sum, 1), sem="relaxed")
    if SEPARATE_F:
        out, inside = _contiguous_rows_at(DX, bh, j, T, H, D)
        tl.store(out, rounded(acc_dx, DTYPE), mask=inside)
    # Loading sigma again takes fewer registers than keeping it. `volatile` stops Triton from merging the two loads.
    sigma = tl.load(SIGMA + head, volatile=True)
    tl.store(DSIGMA + bh.to(tl.int64) * (T_PAD // MIN_BLOCK) + block, tl.sum(dsigma_acc, 0) * sigma * (-2.0 * LN2))
