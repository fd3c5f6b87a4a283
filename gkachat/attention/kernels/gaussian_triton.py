"""The Gaussian kernel operator fused in Triton, forward and backward. Imported only where it is used.

What a general attention kernel cannot know, and this one uses:

- Keys and values are one tile: a load of x_j serves S = F_i F_j^T and Y += P X_j (with rope F and X come apart).
- Scores are at most 0, and 0 on the diagonal: with self among the keys the row's maximum is known beforehand, and
  nothing is ever rescaled. Without self it is an ordinary online softmax, and a row without keys gives zeros.
- dx sums a value, a key and a query part: the program that owns a block in both roles writes it once, without atomics,
  so that gradients are deterministic. That costs seven products where separate passes take five.

float32 throughout except for operands of products, which have the dtype of x. In half precision dx is formed as
sum(dS f) - f sum(dS), both sums over the same rounded dS: exactly they agree with the plain form, but features with a
large common offset would leave nothing of it. Such an offset still costs precision, since y is rounded too: dx is off
by 1 % at an offset of 10 standard deviations, by 8 % at 100. sigma's gradient takes the direct form,
-2 sum(dL/ds s) / sigma; Euler's identity cancels.

Axes: B batch, T time, H heads, D head_dim; b, i, j rows of a block, of queries, of keys. Loops hoist nothing
(disable_licm): what they would hoist takes the registers that they lack.
"""

import os
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkachat.attention.qkv import QKV

HALF_LOG2E = tl.constexpr(0.7213475204444817)  # log2(e) / 2: exponentials are taken in base 2
LN2 = tl.constexpr(0.6931471805599453)

# Triton's interpreter holds bfloat16 as raw bits and computes with them as they are (triton issue 4972). There tiles
# are kept in float32 and rounded to bfloat16's grid by hand: the values that a GPU would multiply.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _rounded(tile, dtype: tl.constexpr):
    """A float32 tile as `dtype` would hold it."""
    if INTERPRET:
        if dtype == tl.bfloat16:
            bits = tile.to(tl.int32, bitcast=True)
            tile = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        tile = tile.to(dtype)
    return tile


@triton.jit
def _load_rows(base, rows, T, stride_t, D: tl.constexpr):
    """(rows, D) of one batch entry and head; zeros beyond T."""
    d = tl.arange(0, D)
    tile = tl.load(base + rows[:, None] * stride_t + d[None, :], mask=(rows < T)[:, None], other=0.0)
    if INTERPRET:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _load_row(base, rows, T):
    return tl.load(base + rows, mask=rows < T, other=0.0)


@triton.jit
def _log_weights(
    dots, level_i, height_j, scale, i, j, T, window, MASKED: tl.constexpr, SELF: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """2 scale f_i.f_j - level_i - height_j where query i sees key j; scale = log2(e) / 2 sigma^2, height = scale |f|^2.

    With the query's own height for its level, the base-2 score; with its log-sum-exp added, log2 of the weight p_ij.
    """
    z = tl.minimum(2.0 * scale * dots - level_i - height_j, 0.0)
    if MASKED:
        distance = i - j
        if not CAUSAL:
            distance = tl.abs(distance)
        seen = (distance >= (0 if SELF else 1)) & (distance < window) & (i < T) & (j < T)
        z = tl.where(seen, z, float("-inf"))
    return z


@triton.jit
def _heights(F, SIGMA, rows, bh, f_b, f_t, f_h, T, H, D: tl.constexpr):
    """scale |f|^2, of the very numbers that enter the products."""
    f = _load_rows(F + (bh // H).to(tl.int64) * f_b + (bh % H) * f_h, rows, T, f_t, D).to(tl.float32)
    sigma = tl.load(SIGMA + bh % H)
    return HALF_LOG2E / (sigma * sigma) * tl.sum(f * f, 1)


@triton.jit
def heights_kernel(F, SIGMA, HEIGHT, f_b, f_t, f_h, T, H, D: tl.constexpr, BLOCK: tl.constexpr):
    bh = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    height = _heights(F, SIGMA, rows, bh, f_b, f_t, f_h, T, H, D)
    tl.store(HEIGHT + bh.to(tl.int64) * T + rows, height, mask=rows < T)


@triton.jit
def backward_rows_kernel(
    F, SIGMA, Y, DY, LSE, HEIGHT, LEVEL, DELTA, f_b, f_t, f_h, dy_b, dy_t, dy_h, T, H,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the backward needs of each row: height, level = height + log-sum-exp, delta = <dy, y>."""
    bh = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch, head, out = (bh // H).to(tl.int64), bh % H, bh.to(tl.int64) * T + rows
    height = _heights(F, SIGMA, rows, bh, f_b, f_t, f_h, T, H, D)
    y = _load_rows(Y + batch * T * H * D + head * D, rows, T, H * D, D).to(tl.float32)
    dy = _load_rows(DY + batch * dy_b + head * dy_h, rows, T, dy_t, D).to(tl.float32)
    lse = tl.load(LSE + out, mask=rows < T, other=0.0)
    tl.store(HEIGHT + out, height, mask=rows < T)
    tl.store(LEVEL + out, height + lse, mask=rows < T)
    tl.store(DELTA + out, tl.sum(y * dy, 1), mask=rows < T)


@triton.jit
def _forward_span(
    acc, total, top, f_i, height_i, i, scale, F, X, HEIGHT, f_t, x_t, lo, hi, T, window,
    D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, SELF: tl.constexpr, TWO: tl.constexpr,
    CAUSAL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    for j0 in tl.range(lo, hi, BN, disable_licm=True):
        j = j0 + tl.arange(0, BN)
        f_j = _load_rows(F, j, T, f_t, D)
        x_j = f_j
        if TWO:
            x_j = _load_rows(X, j, T, x_t, D)
        dots = tl.dot(f_i, tl.trans(f_j), input_precision="tf32x3")
        height_j = _load_row(HEIGHT, j, T)
        z = _log_weights(
            dots, height_i[:, None], height_j[None, :], scale, i[:, None], j[None, :], T, window, MASKED, SELF, CAUSAL
        )
        if SELF:
            if MASKED:  # exactly 0 on the diagonal, so that a row's sum is never below 1
                z = tl.where(i[:, None] == j[None, :], 0.0, z)
            p = tl.exp2(z)
            total += tl.sum(p, 1)
        else:
            new_top = tl.maximum(top, tl.max(z, 1))
            safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = tl.exp2(top - safe_top)
            p = tl.exp2(z - safe_top[:, None])
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            top = new_top
        acc = tl.dot(_rounded(p, DTYPE), x_j, acc, input_precision="tf32x3")
    return acc, total, top


@triton.jit
def forward_kernel(
    F, X, HEIGHT, SIGMA, Y, LSE, f_b, f_t, f_h, x_b, x_t, x_h, T, H, window,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SELF: tl.constexpr, TWO: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """y and the log2 of each row's sum, for one block of queries."""
    bh = tl.program_id(1)
    batch, head = (bh // H).to(tl.int64), bh % H
    DTYPE: tl.constexpr = X.dtype.element_ty
    F += batch * f_b + head * f_h
    X += batch * x_b + head * x_h
    Y += batch * T * H * D + head * D
    HEIGHT += bh.to(tl.int64) * T
    i0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the longest rows start first
    i = i0 + tl.arange(0, BM)
    sigma = tl.load(SIGMA + head)
    scale = HALF_LOG2E / (sigma * sigma)
    f_i = _load_rows(F, i, T, f_t, D)
    height_i = _load_row(HEIGHT, i, T)
    acc = tl.zeros([BM, D], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    # Keys: the window's edge (masked), those that every row sees (not masked), the diagonal (masked). Without the
    # causal mask all of them masked: loops for the other side's parts too take more registers than there are.
    lo = tl.maximum(0, i0 - window + 1) // BN * BN
    diagonal, hi = i0 // BN * BN, tl.minimum(T, i0 + BM)
    if CAUSAL:
        inner = tl.minimum(tl.maximum(lo, tl.cdiv(tl.maximum(0, i0 + BM - window), BN) * BN), diagonal)
        acc, total, top = _forward_span(
            acc, total, top, f_i, height_i, i, scale, F, X, HEIGHT, f_t, x_t, lo, inner,
            T, window, D, BN, True, SELF, TWO, CAUSAL, DTYPE)  # fmt: skip
        acc, total, top = _forward_span(
            acc, total, top, f_i, height_i, i, scale, F, X, HEIGHT, f_t, x_t, inner, diagonal,
            T, window, D, BN, False, SELF, TWO, CAUSAL, DTYPE)  # fmt: skip
        lo = diagonal
    else:
        hi = tl.minimum(T, i0 + BM - 1 + window)
    acc, total, top = _forward_span(
        acc, total, top, f_i, height_i, i, scale, F, X, HEIGHT, f_t, x_t, lo, hi,
        T, window, D, BN, True, SELF, TWO, CAUSAL, DTYPE)  # fmt: skip
    safe = tl.where(total > 0.0, total, 1.0)
    lse = tl.log2(safe)
    if not SELF:
        lse = tl.where(total > 0.0, top + lse, float("inf"))  # a row without keys: exp2(z - inf) = 0 in the backward
    d = tl.arange(0, D)
    out = Y + i[:, None] * (H * D) + d[None, :]
    tl.store(out, _rounded(acc / safe[:, None], DTYPE), mask=(i < T)[:, None])
    tl.store(LSE + bh.to(tl.int64) * T + i, lse, mask=i < T)


@triton.jit
def _as_keys_span(
    acc, accf, back, f_b, x_b, height_b, b, scale, inverse, F, DY, LEVEL, DELTA, f_t, dy_t, lo, hi, T, window,
    D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, SELF: tl.constexpr, TWO: tl.constexpr,
    CAUSAL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Block b as keys and values of queries i: the value part, the key part, and sigma's gradient."""
    for i0 in tl.range(lo, hi, BN, disable_licm=True):
        i = i0 + tl.arange(0, BN)
        f_i = _load_rows(F, i, T, f_t, D)
        dy_i = _load_rows(DY, i, T, dy_t, D)
        level, delta = _load_row(LEVEL, i, T), _load_row(DELTA, i, T)
        dots = tl.dot(f_b, tl.trans(f_i), input_precision="tf32x3")  # transposed: [b, i]
        log_p = _log_weights(
            dots, level[None, :], height_b[:, None], scale, i[None, :], b[:, None], T, window, MASKED, SELF, CAUSAL
        )
        p = tl.exp2(log_p)
        dp = tl.dot(x_b, tl.trans(dy_i), input_precision="tf32x3")
        ds = _rounded(p * (dp - delta[None, :]) * inverse, DTYPE)
        back += tl.sum(ds.to(tl.float32), 1)
        acc = tl.dot(_rounded(p, DTYPE), dy_i, acc, input_precision="tf32x3")
        if TWO:
            accf = tl.dot(ds, f_i, accf, input_precision="tf32x3")
        else:
            acc = tl.dot(ds, f_i, acc, input_precision="tf32x3")
    return acc, accf, back


@triton.jit
def _as_queries_span(
    acc, accf, back, moved, f_b, dy_b, level_b, delta_b, b, scale, inverse, F, X, HEIGHT, f_t, x_t, lo, hi, T, window,
    D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, SELF: tl.constexpr, TWO: tl.constexpr,
    CAUSAL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Block b as queries of keys j: the query part."""
    for j0 in tl.range(lo, hi, BN, disable_licm=True):
        j = j0 + tl.arange(0, BN)
        f_j = _load_rows(F, j, T, f_t, D)
        x_j = f_j
        if TWO:
            x_j = _load_rows(X, j, T, x_t, D)
        height_j = _load_row(HEIGHT, j, T)
        dots = tl.dot(f_b, tl.trans(f_j), input_precision="tf32x3")
        log_p = _log_weights(
            dots, level_b[:, None], height_j[None, :], scale, b[:, None], j[None, :], T, window, MASKED, SELF, CAUSAL
        )
        p = tl.exp2(log_p)
        dp = tl.dot(dy_b, tl.trans(x_j), input_precision="tf32x3")
        ds = p * (dp - delta_b[:, None])
        # A row's ds sum to 0: log p does for the score, and is small wherever p is not.
        moved += tl.sum(ds * tl.where(p > 0.0, log_p, 0.0), 1)
        ds = _rounded(ds * inverse, DTYPE)
        back += tl.sum(ds.to(tl.float32), 1)
        if TWO:
            accf = tl.dot(ds, f_j, accf, input_precision="tf32x3")
        else:
            acc = tl.dot(ds, f_j, acc, input_precision="tf32x3")
    return acc, accf, back, moved


@triton.jit
def backward_kernel(
    F, X, HEIGHT, LEVEL, SIGMA, DY, DELTA, DX, DF, DSIGMA,
    f_b_, f_t, f_h, x_b_, x_t, x_h, dy_b_, dy_t, dy_h, T, H, window, n_shares,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SELF: tl.constexpr, TWO: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """dx (and df where the features are a tensor of their own) of one block, and its share of sigma's gradient."""
    bh = tl.program_id(1)
    batch, head = (bh // H).to(tl.int64), bh % H
    DTYPE: tl.constexpr = X.dtype.element_ty
    F += batch * f_b_ + head * f_h
    X += batch * x_b_ + head * x_h
    DY += batch * dy_b_ + head * dy_h
    HEIGHT += bh.to(tl.int64) * T
    LEVEL += bh.to(tl.int64) * T
    DELTA += bh.to(tl.int64) * T
    b0 = tl.program_id(0) * BM
    b = b0 + tl.arange(0, BM)
    sigma = tl.load(SIGMA + head)
    inverse = 1.0 / (sigma * sigma)
    scale = HALF_LOG2E * inverse
    f_b = _load_rows(F, b, T, f_t, D)
    x_b = f_b
    if TWO:
        x_b = _load_rows(X, b, T, x_t, D)
    height_b = _load_row(HEIGHT, b, T)
    acc = tl.zeros([BM, D], tl.float32)
    accf = acc
    if TWO:
        accf = tl.zeros([BM, D], tl.float32)
    back = tl.zeros([BM], tl.float32)  # sum of ds over both roles, taken times f at the end
    moved = tl.zeros([BM], tl.float32)  # sum of ds times score

    # Later queries: the diagonal (masked), those that see every key (not masked), the window's edge (masked). Without
    # the causal mask all of them masked, as in the forward.
    lo = tl.maximum(0, b0 - window + 1) // BN * BN
    start, hi = b0 // BN * BN, tl.minimum(T, b0 + BM - 1 + window)
    edge = lo
    if CAUSAL:
        clear = tl.minimum(tl.cdiv(b0 + BM, BN) * BN, tl.cdiv(hi, BN) * BN)
        edge = tl.maximum(clear, tl.minimum(b0 + window, T) // BN * BN)
        acc, accf, back = _as_keys_span(
            acc, accf, back, f_b, x_b, height_b, b, scale, inverse, F, DY, LEVEL, DELTA, f_t, dy_t, start, clear,
            T, window, D, BN, True, SELF, TWO, CAUSAL, DTYPE)  # fmt: skip
        acc, accf, back = _as_keys_span(
            acc, accf, back, f_b, x_b, height_b, b, scale, inverse, F, DY, LEVEL, DELTA, f_t, dy_t, clear, edge,
            T, window, D, BN, False, SELF, TWO, CAUSAL, DTYPE)  # fmt: skip
    acc, accf, back = _as_keys_span(
        acc, accf, back, f_b, x_b, height_b, b, scale, inverse, F, DY, LEVEL, DELTA, f_t, dy_t, edge, hi,
        T, window, D, BN, True, SELF, TWO, CAUSAL, DTYPE)  # fmt: skip

    # Earlier keys: the window's edge, those that every row sees, the diagonal.
    dy_b = _load_rows(DY, b, T, dy_t, D)
    level_b, delta_b = _load_row(LEVEL, b, T), _load_row(DELTA, b, T)
    if CAUSAL:
        inner = tl.minimum(tl.maximum(lo, tl.cdiv(tl.maximum(0, b0 + BM - window), BN) * BN), start)
        acc, accf, back, moved = _as_queries_span(
            acc, accf, back, moved, f_b, dy_b, level_b, delta_b, b, scale, inverse, F, X, HEIGHT, f_t, x_t,
            lo, inner, T, window, D, BN, True, SELF, TWO, CAUSAL, DTYPE)  # fmt: skip
        acc, accf, back, moved = _as_queries_span(
            acc, accf, back, moved, f_b, dy_b, level_b, delta_b, b, scale, inverse, F, X, HEIGHT, f_t, x_t,
            inner, start, T, window, D, BN, False, SELF, TWO, CAUSAL, DTYPE)  # fmt: skip
        lo, hi = start, tl.minimum(T, b0 + BM)
    acc, accf, back, moved = _as_queries_span(
        acc, accf, back, moved, f_b, dy_b, level_b, delta_b, b, scale, inverse, F, X, HEIGHT, f_t, x_t, lo, hi,
        T, window, D, BN, True, SELF, TWO, CAUSAL, DTYPE)  # fmt: skip

    d = tl.arange(0, D)
    out = batch * T * H * D + head * D + b[:, None] * (H * D) + d[None, :]
    # Read again (volatile: or it would be one load) rather than held in registers all the while.
    f_b = tl.load(F + b[:, None] * f_t + d[None, :], mask=(b < T)[:, None], other=0.0, volatile=True)
    pull = back[:, None] * f_b.to(tl.float32)
    if TWO:
        tl.store(DF + out, _rounded(accf - pull, DTYPE), mask=(b < T)[:, None])
    else:
        acc = acc - pull
    tl.store(DX + out, _rounded(acc, DTYPE), mask=(b < T)[:, None])
    share = -2.0 * LN2 * tl.sum(moved, 0) / sigma
    tl.store(DSIGMA + bh.to(tl.int64) * n_shares + tl.program_id(0), share)


# Candidates for (rows of a block, rows that it meets at a time, warps, pipeline stages); the autotuner times them on
# first use. Triton 3.9 compiles all for sm_90 without spills and within its shared memory (a test says so). float32
# products are made of three in TF32, which takes registers: blocks are small.
FORWARD = {
    (torch.bfloat16, 64): [(128, 64, 8, 3), (64, 64, 4, 3)],
    (torch.bfloat16, 128): [(128, 64, 8, 3), (64, 32, 4, 3)],
    (torch.float32, 64): [(64, 32, 4, 2)],
    (torch.float32, 128): [(16, 32, 4, 1)],
}
# Also by whether dx and df have an accumulator each: with rope they must, and in float32 it takes fewer registers.
BACKWARD = {
    (torch.bfloat16, 64, False): [(128, 64, 8, 1), (128, 32, 8, 2), (64, 32, 4, 2)],
    (torch.bfloat16, 64, True): [(128, 32, 8, 2), (64, 32, 4, 2)],
    (torch.bfloat16, 128, False): [(128, 64, 8, 1), (128, 32, 8, 2), (64, 32, 4, 2)],
    (torch.bfloat16, 128, True): [(128, 32, 8, 1)],
    (torch.float32, 64, True): [(64, 16, 4, 1)],
    (torch.float32, 128, True): [(16, 16, 8, 1)],
}


def backward_candidates(dtype: torch.dtype, D: int, apart: bool, causal: bool) -> list[tuple[int, int, int, int]]:
    """Without the causal mask every block is masked: 64 columns would not fit the registers."""
    return [candidate for candidate in BACKWARD[dtype, D, apart] if causal or candidate[1] < 64]


ROWS = 64  # a block of the kernels that only go over rows


@cache
def _tuned(kernel, candidates: tuple[tuple[int, int, int, int], ...]):
    configs = [
        triton.Config({"BM": rows, "BN": columns}, num_warps=warps, num_stages=stages)
        for rows, columns, warps, stages in candidates
    ]
    if INTERPRET.value:  # nothing to time; any one will do
        configs = configs[-1:]
    return triton.autotune(configs, key=["D", "SELF", "TWO", "CAUSAL"])(kernel)


def _rows(t: Tensor) -> Tensor:
    """The tensor itself when a head's channels lie side by side, as the kernels read them; a copy otherwise."""
    return t if t.stride(-1) == 1 else t.contiguous()


@torch.library.custom_op("gkachat::gka", mutates_args=())
def gka(
    x: Tensor, f: Tensor | None, sigma: Tensor, window: int, include_self: bool, causal: bool
) -> tuple[Tensor, Tensor]:
    """x and, where they differ, features f, (B, T, H, D); sigma (H,) float32 -> y, log2 of the row sums (B, H, T)."""
    B, T, H, D = x.shape
    x = _rows(x)
    f, two = (x, False) if f is None else (_rows(f), True)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    lse, height = x.new_empty(2, B, H, T, dtype=torch.float32)
    heights_kernel[(triton.cdiv(T, ROWS), B * H)](f, sigma, height, *f.stride()[:3], T, H, D=D, BLOCK=ROWS)
    _tuned(forward_kernel, tuple(FORWARD[x.dtype, D]))[lambda meta: (triton.cdiv(T, meta["BM"]), B * H)](
        f, x, height, sigma, y, lse, *f.stride()[:3], *x.stride()[:3], T, H, window,
        D=D, SELF=include_self, TWO=two, CAUSAL=causal,
    )  # fmt: skip
    return y, lse


@torch.library.custom_op("gkachat::gka_backward", mutates_args=())
def gka_backward(
    dy: Tensor, x: Tensor, f: Tensor | None, sigma: Tensor, y: Tensor, lse: Tensor,
    window: int, include_self: bool, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, f (empty where there is none) and sigma."""
    B, T, H, D = x.shape
    x, dy = _rows(x), _rows(dy)
    features = x if f is None else _rows(f)
    apart = f is not None or x.dtype == torch.float32
    candidates = backward_candidates(x.dtype, D, apart, causal)
    height, level, delta = lse.new_empty(3, *lse.shape)
    backward_rows_kernel[(triton.cdiv(T, ROWS), B * H)](
        features, sigma, y, dy, lse, height, level, delta, *features.stride()[:3], *dy.stride()[:3], T, H,
        D=D, BLOCK=ROWS,
    )  # fmt: skip
    dx = torch.empty_like(y)
    df = torch.empty_like(y) if apart else y.new_empty(0)
    # A share for each block, added up in a fixed order: deterministic. Zeros, since larger blocks leave some unwritten.
    shares = lse.new_zeros(B, H, triton.cdiv(T, min(rows for rows, *_ in candidates)))
    _tuned(backward_kernel, tuple(candidates))[lambda meta: (triton.cdiv(T, meta["BM"]), B * H)](
        features, x, height, level, sigma, dy, delta, dx, df, shares,
        *features.stride()[:3], *x.stride()[:3], *dy.stride()[:3], T, H, window, shares.size(2),
        D=D, SELF=include_self, TWO=apart, CAUSAL=causal,
    )  # fmt: skip
    if f is None and apart:
        dx, df = dx + df, y.new_empty(0)
    return dx, df, shares.sum((0, 2))


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
    f = ctx.saved_tensors[1]
    dx, df, dsigma = gka_backward(dy, *ctx.saved_tensors, ctx.window, ctx.include_self, ctx.causal)
    return dx, None if f is None else df, dsigma, None, None, None


gka.register_autograd(_backward, setup_context=_save)


def attend(qkv: QKV, *, window: int | None, causal: bool, include_self: bool) -> Tensor:
    """Gaussian attention whose queries and keys are one tensor of features, (B, T, H, D).

    Rotated features come as a tensor of their own: rotating them in the kernel takes more than a tile's shared memory.
    """
    f = None if qkv.k is qkv.v else qkv.k
    window = qkv.v.size(1) if window is None else window
    return gka(qkv.v, f, qkv.sigma.float(), window, include_self, causal)[0]
