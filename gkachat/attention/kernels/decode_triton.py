"""Attention of one new token a row to cached ones, fused in Triton and split over the keys. Imported only where used.

A step reads the cache once and does little with it, so bytes are what counts. A key costs a head at d20 (D = 128,
bfloat16) 2 D + 4 = 260 of them with GKA, which compares and averages one tensor and keeps a float32 norm, and 4 D = 512
with softmax; a mask of 4, and tables of 4 D with rope, are shared by all heads and come from the device's L2 cache.
With one query a product of matrices has nothing to share: it is done with plain sums, in float32.

Rows times heads are few programs for a device, so keys are split among more of them (Flash-Decoding, Dao et al. 2023).
A program walks over its keys a tile at a time, and every row of the tile is a softmax of its own until the end: no sums
across threads on the way but that of q.k. What a program found is a mean and the log2 of its sum of weights, and a
mean of those, weighed by these, is the answer: the same again, with splits for keys.

Axes: B rows, T new tokens, K cached ones, H heads, D head_dim; a, b: the two halves of a head's channels, which rope
rotates against each other.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkachat.attention.kernels import decode
from gkachat.attention.kernels.gaussian_triton import _rounded, _rows
from gkachat.attention.qkv import QKV, KVSlice

LOG2E = tl.constexpr(1.4426950408889634)  # exponentials are taken in base 2
HIDDEN = tl.constexpr(float("-inf"))
TILE = 4096  # channels of a tile, 32 keys of 128: up to 128 registers a thread, so four programs on a multiprocessor
SPLITS = 16  # a tile's rows in the kernel that puts splits together
PROGRAMS = 16  # wanted for each multiprocessor, so that the last ones to end are a small share


@triton.jit
def _halves(base, rows, stride, seen, D: tl.constexpr, HALF: tl.constexpr):
    """(rows, D/2) twice, of those that are seen; the others are zeros and not read."""
    d = tl.arange(0, HALF)
    at = base + rows[:, None] * stride + d[None, :]
    seen = seen[:, None] & (d < D // 2)[None, :]
    return tl.load(at, mask=seen, other=0.0), tl.load(at + D // 2, mask=seen, other=0.0)


@triton.jit
def _taken_in(acc_a, acc_b, total, top, z, a, b):
    """Each row's own softmax goes on by one key, of base-2 score z and values a, b."""
    new_top = tl.maximum(top, z)
    safe_top = tl.where(new_top == HIDDEN, 0.0, new_top)
    shrink, p = tl.exp2(top - safe_top), tl.exp2(z - safe_top)
    acc_a = acc_a * shrink[:, None] + p[:, None] * a.to(tl.float32)
    acc_b = acc_b * shrink[:, None] + p[:, None] * b.to(tl.float32)
    return acc_a, acc_b, total * shrink + p, new_top


@triton.jit
def _together(acc_a, acc_b, total, top):
    """The mean over all rows' keys, in halves, and log2 of the sum of their weights: 0, -infinity for no key."""
    best = tl.max(top, 0)
    share = tl.exp2(top - tl.where(best == HIDDEN, 0.0, best))
    weight = tl.sum(total * share, 0)
    safe = tl.where(weight > 0.0, weight, 1.0)
    share = (share / safe)[:, None]
    return tl.sum(acc_a * share, 0), tl.sum(acc_b * share, 0), best + tl.log2(safe)


@triton.jit(do_not_specialize=["K", "mask_b", "first", "n_splits"])  # they change from step to step
def split_kernel(
    Q, KEYS, VALUES, MASK, NORMS, COS, SIN, SCALE, MEAN, WEIGHT,
    q_b, q_h, k_b, k_h, k_k, v_b, v_h, v_k, mask_b, norm_b, norm_h, norm_k, rope_b, K, per_split, first, n_splits,
    D: tl.constexpr, HALF: tl.constexpr, BN: tl.constexpr, ONE: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """What one split of a span's keys comes to for one row and head. ONE: keys are the values; NORMS, COS may be None.

    Heads are next to each other in the grid, then rows: they find masks, tables and a shared prefix in the L2 cache.
    """
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    KEYS += batch * k_b + head * k_h
    VALUES += batch * v_b + head * v_h
    MASK += batch * mask_b
    scale = SCALE
    if PER_HEAD:
        scale = tl.load(SCALE + head)
    scale = scale * LOG2E
    d, one = tl.arange(0, HALF), tl.arange(0, 1)
    qa, qb = _halves(Q + batch * q_b + head * q_h, one, 0, one == 0, D, HALF)
    qa, qb = qa.to(tl.float32), qb.to(tl.float32)
    acc_a = tl.zeros([BN, HALF], tl.float32)
    acc_b = tl.zeros([BN, HALF], tl.float32)
    total = tl.zeros([BN], tl.float32)
    top = tl.full([BN], HIDDEN, tl.float32)
    k = split * per_split + tl.arange(0, BN)
    following = tl.load(MASK + k, mask=k < K, other=HIDDEN)
    for k0 in range(split * per_split, tl.minimum((split + 1) * per_split, K), BN):
        k, z = k0 + tl.arange(0, BN), following
        following = tl.load(MASK + k + BN, mask=k + BN < K, other=HIDDEN)  # a tile ahead: what is loaded waits for it
        seen = z != HIDDEN
        if tl.max(z, 0) != HIDDEN:  # all loads before anything waits for one
            if NORMS is not None:
                norms = tl.load(NORMS + batch * norm_b + head * norm_h + k * norm_k, mask=seen, other=0.0)
            a, b = _halves(KEYS, k, k_k, seen, D, HALF)
            va, vb = a, b
            if not ONE:
                va, vb = _halves(VALUES, k, v_k, seen, D, HALF)
            a, b = a.to(tl.float32), b.to(tl.float32)
            if COS is not None:
                at = batch * rope_b + k[:, None] * (D // 2) + d[None, :]
                inside = seen[:, None] & (d < D // 2)[None, :]
                cos, sin = tl.load(COS + at, mask=inside, other=0.0), tl.load(SIN + at, mask=inside, other=0.0)
                a, b = a * cos + b * sin, b * cos - a * sin
            score = tl.sum(a * qa + b * qb, 1)
            if NORMS is not None:
                score -= 0.5 * norms
            acc_a, acc_b, total, top = _taken_in(acc_a, acc_b, total, top, score * scale + z, va, vb)
    mean_a, mean_b, weight = _together(acc_a, acc_b, total, top)
    at = (batch * tl.num_programs(0) + head) * n_splits + first + split
    tl.store(MEAN + at * D + d, mean_a, mask=d < D // 2)
    tl.store(MEAN + at * D + D // 2 + d, mean_b, mask=d < D // 2)
    tl.store(WEIGHT + at, weight)


@triton.jit(do_not_specialize=["n_splits"])
def combine_kernel(MEAN, WEIGHT, Y, n_splits, D: tl.constexpr, HALF: tl.constexpr, BN: tl.constexpr):
    """One row's and head's y from all splits of all spans."""
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    MEAN += at * n_splits * D
    WEIGHT += at * n_splits
    acc_a = tl.zeros([BN, HALF], tl.float32)
    acc_b = tl.zeros([BN, HALF], tl.float32)
    total = tl.zeros([BN], tl.float32)
    top = tl.full([BN], HIDDEN, tl.float32)
    for s0 in range(0, n_splits, BN):
        s = s0 + tl.arange(0, BN)
        z = tl.load(WEIGHT + s, mask=s < n_splits, other=HIDDEN)
        a, b = _halves(MEAN, s, D, z != HIDDEN, D, HALF)
        acc_a, acc_b, total, top = _taken_in(acc_a, acc_b, total, top, z, a, b)
    y_a, y_b, _ = _together(acc_a, acc_b, total, top)
    d = tl.arange(0, HALF)
    tl.store(Y + at * D + d, _rounded(y_a, Y.dtype.element_ty), mask=d < D // 2)
    tl.store(Y + at * D + D // 2 + d, _rounded(y_b, Y.dtype.element_ty), mask=d < D // 2)


def shape(head_dim: int) -> tuple[int, int]:
    """Half of the head_dim as a power of two, and the keys of a tile."""
    half = 1 << (head_dim // 2 - 1).bit_length()
    return half, max(16, min(128, TILE // (2 * half)))


def attend(qkv: QKV, slices: Sequence[KVSlice], multiprocessors: int = 132) -> Tensor:
    """Softmax attention of one new token per row, (B, 1, H, D); several new tokens run on decode.attend.

    head_dim is even and at most 256; the dtype is bfloat16, float16 or float32. Launches depend on shapes alone.
    """
    B, T, H, D = qkv.q.shape
    if T > 1:
        return decode.attend(qkv, slices)
    scale = qkv.scale if qkv.sigma is None else qkv.sigma.square().reciprocal()
    half, tile = shape(D)
    wanted = -(-PROGRAMS * multiprocessors // (B * H))  # splits
    plan, n_splits = [], 0
    for part in slices:
        tiles = max(1, -(-part.k.size(2) // tile))
        each = -(-tiles // min(tiles, wanted))
        plan.append((part, each * tile, n_splits, -(-tiles // each)))
        n_splits += -(-tiles // each)
    mean = qkv.q.new_empty(B, H, n_splits, D, dtype=torch.float32)
    weight = qkv.q.new_empty(B, H, n_splits, dtype=torch.float32)
    q = _rows(qkv.q)
    for part, per_split, first, splits in plan:
        one = part.k is part.v
        keys = _rows(part.k).expand(B, -1, -1, -1)
        values = keys if one else _rows(part.v).expand(B, -1, -1, -1)
        mask = _rows(part.mask)
        norm_strides = (0, 0, 0) if part.key_norms is None else part.key_norms.expand(B, -1, -1, -1).stride()[:3]
        cos, sin = (None, None) if part.rope is None else (t.contiguous().expand(B, -1, -1, -1) for t in part.rope)
        split_kernel[(H, B, splits)](
            q, keys, values, mask, part.key_norms, cos, sin, scale, mean, weight,
            q.stride(0), q.stride(2), *keys.stride()[:3], *values.stride()[:3], mask.stride(0), *norm_strides,
            0 if cos is None else cos.stride(0), keys.size(2), per_split, first, n_splits,
            D=D, HALF=half, BN=tile, ONE=one, PER_HEAD=isinstance(scale, Tensor),
        )  # fmt: skip
    y = qkv.q.new_empty(B, 1, H, D)
    combine_kernel[(H, B)](mean, weight, y, n_splits, D=D, HALF=half, BN=SPLITS)
    return y
