"""Attention of one new token per row to cached ones, in Triton: the decode kernel on a GPU, split over the keys.

Imported only where it is used. A decode step reads the cache once and computes little, so that bytes decide its time.
At d20 (D 128, bfloat16) a key costs each head 2 D + 4 = 260 bytes with gka and gka_conv, whose keys and values are one
tensor with a float32 norm or bias, and 4 D = 512 with softmax. All heads use the same mask, 4 bytes, and with rope the
same tables, 4 D, which come from the L2 cache. One query shares no loads in a matrix product, so plain float32 sums
take its place.

Rows times heads are few programs for a GPU. Keys are therefore split among more programs (Flash-Decoding, Dao et al.
2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). A program reads its keys tile by tile. Each row of the
tile has a softmax of its own until the end, so that only q.k needs sums across threads. A program ends with a mean of
values and the log2 of its sum of weights. A second kernel combines these means in the same way.
Axes: B rows, S cached tokens, H heads, D head_dim. a and b are the halves of a head's channels that rope rotates.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkachat.attention.kernels import decode
from gkachat.attention.kernels.gaussian_triton import contiguous_channels, on_device_of_first
from gkachat.attention.kernels.gaussian_triton_kernels import rounded
from gkachat.attention.qkv import QKV, KVSlice

LOG2E = tl.constexpr(1.4426950408889634)  # exponentials are taken in base 2
TILE = 4096  # numbers in a tile, 32 keys of 128: at most 128 registers a thread let four programs share an SM
SPLITS = 16  # splits that the combining kernel takes at a time
PROGRAMS_PER_SM = 16  # so many that waiting for the last ones costs little


@triton.jit
def _load_halves(base, rows, stride, visible, D: tl.constexpr, HALF: tl.constexpr):
    """Load two halves, each (rows, D/2). Rows that are not visible are zeros and are not read."""
    d = tl.arange(0, HALF)
    offset = base + rows[:, None] * stride + d[None, :]
    visible = visible[:, None] & (d < D // 2)[None, :]
    return tl.load(offset, mask=visible, other=0.0), tl.load(offset + D // 2, mask=visible, other=0.0)


@triton.jit
def _convolved(
    X, KEY_TAPS, VALUE_TAPS, k, stride_s, stride_n, visible, D: tl.constexpr, HALF: tl.constexpr, BN: tl.constexpr,
    N_TAPS: tl.constexpr,
):  # fmt: skip
    """Return halves of keys and of values, from what both are convolutions of, in float32.

    A row is loaded once for each tap, and comes from device memory once.
    """
    a = tl.zeros([BN, HALF], tl.float32)
    b, va, vb, one = a, a, a, tl.arange(0, 1)
    for n in tl.static_range(N_TAPS):
        xa, xb = _load_halves(X, k + (N_TAPS - 1 - n), stride_s, visible, D, HALF)
        wa, wb = _load_halves(KEY_TAPS + n * stride_n, one, 0, one == 0, D, HALF)
        ua, ub = _load_halves(VALUE_TAPS + n * stride_n, one, 0, one == 0, D, HALF)
        xa, xb = xa.to(tl.float32), xb.to(tl.float32)
        a, b = a + wa.to(tl.float32) * xa, b + wb.to(tl.float32) * xb
        va, vb = va + ua.to(tl.float32) * xa, vb + ub.to(tl.float32) * xb
    return a, b, va, vb


@triton.jit
def _add_keys(acc_a, acc_b, row_sum, row_max, z, a, b):
    """Add one key to each row's own softmax; z is its base-2 score, a and b are the halves of its values."""
    new_max = tl.maximum(row_max, z)
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale, p = tl.exp2(row_max - safe_max), tl.exp2(z - safe_max)
    acc_a = acc_a * rescale[:, None] + p[:, None] * a.to(tl.float32)
    acc_b = acc_b * rescale[:, None] + p[:, None] * b.to(tl.float32)
    return acc_a, acc_b, row_sum * rescale + p, new_max


@triton.jit
def _merge_rows(acc_a, acc_b, row_sum, row_max):
    """Return the mean of all rows' values, in halves, and log2 of their sum of weights; 0 and -inf without a key."""
    total_max = tl.max(row_max, 0)
    scale = tl.exp2(row_max - tl.where(total_max == float("-inf"), 0.0, total_max))
    total = tl.sum(row_sum * scale, 0)
    safe_total = tl.where(total > 0.0, total, 1.0)
    scale = (scale / safe_total)[:, None]
    return tl.sum(acc_a * scale, 0), tl.sum(acc_b * scale, 0), total_max + tl.log2(safe_total)


@triton.jit(do_not_specialize=["S", "stride_mb", "first_split", "n_splits"])  # these change from step to step
def split_kernel(
    Q, KEYS, VALUES, MASK, NORMS, BIASES, KEY_TAPS, VALUE_TAPS, COS, SIN, SIGMA, MEAN, LSE,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_mb,
    stride_nb, stride_nh, stride_ns, stride_rb, H, S, keys_per_split, first_split, n_splits,
    D: tl.constexpr, HALF: tl.constexpr, BN: tl.constexpr, SHARED_KV: tl.constexpr, SCALE: tl.constexpr,
    N_TAPS: tl.constexpr,
):  # fmt: skip
    """Write the mean of one split of a slice's keys for one row and head, and log2 of its sum of weights.

    SHARED_KV: keys are the values. NORMS, BIASES, COS and SIN may be None. SCALE is used where SIGMA is None. With
    N_TAPS above 1, KEYS holds what keys and values are convolutions of, N_TAPS - 1 tokens more than there are keys.
    BIASES are added to the scores; they and NORMS have the same strides. Heads are neighbours in the grid, then rows,
    so that they find masks, tables and a shared prefix in the L2 cache.
    """
    row_and_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = row_and_head // H, row_and_head % H
    KEYS += batch * stride_kb + head * stride_kh
    VALUES += batch * stride_vb + head * stride_vh
    MASK += batch * stride_mb
    scale = LOG2E * SCALE
    if SIGMA is not None:
        sigma = tl.load(SIGMA + head)
        scale = LOG2E / (sigma * sigma)
    d, one = tl.arange(0, HALF), tl.arange(0, 1)
    qa, qb = _load_halves(Q + batch * stride_qb + head * stride_qh, one, 0, one == 0, D, HALF)
    qa, qb = qa.to(tl.float32), qb.to(tl.float32)
    acc_a = tl.zeros([BN, HALF], tl.float32)
    acc_b = tl.zeros([BN, HALF], tl.float32)
    row_sum = tl.zeros([BN], tl.float32)
    row_max = tl.full([BN], float("-inf"), tl.float32)
    k = split * keys_per_split + tl.arange(0, BN)
    next_mask = tl.load(MASK + k, mask=k < S, other=float("-inf"))
    for k0 in range(split * keys_per_split, tl.minimum((split + 1) * keys_per_split, S), BN):
        k, z = k0 + tl.arange(0, BN), next_mask
        # The mask is loaded a tile ahead, since the other loads wait for it.
        next_mask = tl.load(MASK + k + BN, mask=k + BN < S, other=float("-inf"))
        visible = z != float("-inf")
        if tl.max(z, 0) != float("-inf"):  # all loads are issued before the first is waited for
            if NORMS is not None:
                norms = tl.load(NORMS + batch * stride_nb + head * stride_nh + k * stride_ns, mask=visible, other=0.0)
            if BIASES is not None:
                biases = tl.load(BIASES + batch * stride_nb + head * stride_nh + k * stride_ns, mask=visible, other=0.0)
            if N_TAPS > 1:
                a, b, va, vb = _convolved(
                    KEYS, KEY_TAPS + head * D, VALUE_TAPS + head * D, k, stride_ks, H * D, visible, D, HALF, BN, N_TAPS
                )
            else:
                a, b = _load_halves(KEYS, k, stride_ks, visible, D, HALF)
                va, vb = a, b
            if not SHARED_KV:
                va, vb = _load_halves(VALUES, k, stride_vs, visible, D, HALF)
            a, b = a.to(tl.float32), b.to(tl.float32)
            if COS is not None:
                offset = batch * stride_rb + k[:, None] * (D // 2) + d[None, :]
                inside = visible[:, None] & (d < D // 2)[None, :]
                cos = tl.load(COS + offset, mask=inside, other=0.0)
                sin = tl.load(SIN + offset, mask=inside, other=0.0)
                a, b = a * cos + b * sin, b * cos - a * sin
            score = tl.sum(a * qa + b * qb, 1)
            if NORMS is not None:
                score -= 0.5 * norms
            if BIASES is not None:
                z += LOG2E * biases
            acc_a, acc_b, row_sum, row_max = _add_keys(acc_a, acc_b, row_sum, row_max, score * scale + z, va, vb)
    mean_a, mean_b, lse = _merge_rows(acc_a, acc_b, row_sum, row_max)
    offset = row_and_head * n_splits + first_split + split
    tl.store(MEAN + offset * D + d, mean_a, mask=d < D // 2)
    tl.store(MEAN + offset * D + D // 2 + d, mean_b, mask=d < D // 2)
    tl.store(LSE + offset, lse)


@triton.jit(do_not_specialize=["n_splits"])
def combine_kernel(MEAN, LSE, Y, n_splits, D: tl.constexpr, HALF: tl.constexpr, BN: tl.constexpr):
    """Write y of one row and head from all splits of all slices."""
    offset = tl.program_id(0).to(tl.int64)
    MEAN += offset * n_splits * D
    LSE += offset * n_splits
    acc_a = tl.zeros([BN, HALF], tl.float32)
    acc_b = tl.zeros([BN, HALF], tl.float32)
    row_sum = tl.zeros([BN], tl.float32)
    row_max = tl.full([BN], float("-inf"), tl.float32)
    for s0 in range(0, n_splits, BN):
        s = s0 + tl.arange(0, BN)
        z = tl.load(LSE + s, mask=s < n_splits, other=float("-inf"))
        a, b = _load_halves(MEAN, s, D, z != float("-inf"), D, HALF)
        acc_a, acc_b, row_sum, row_max = _add_keys(acc_a, acc_b, row_sum, row_max, z, a, b)
    y_a, y_b, _ = _merge_rows(acc_a, acc_b, row_sum, row_max)
    d = tl.arange(0, HALF)
    tl.store(Y + offset * D + d, rounded(y_a, Y.dtype.element_ty), mask=d < D // 2)
    tl.store(Y + offset * D + D // 2 + d, rounded(y_b, Y.dtype.element_ty), mask=d < D // 2)


def tile_shape(head_dim: int, n_taps: int = 1) -> tuple[int, int]:
    """Return half of head_dim rounded up to a power of two, and the number of keys in a tile.

    With taps, keys and values are sums in registers beside those of the tile, which is half as large for that.
    """
    half = 1 << (head_dim // 2 - 1).bit_length()
    return half, max(16, min(128, TILE // (2 * half))) // (1 if n_taps == 1 else 2)


def attend(qkv: QKV, slices: Sequence[KVSlice], multiprocessors: int = 132) -> Tensor:
    """Softmax attention of one new token per row, (B, 1, H, D); several new tokens run on decode.attend.

    head_dim is even and at most 256; the dtype is bfloat16, float16 or float32. S times D stays below 2^31, other sizes
    are free. Launches depend on shapes alone.
    """
    if qkv.q.size(1) > 1:
        return decode.attend(qkv, slices)
    tensors = [
        (
            part.k, None if part.v is part.k else part.v, part.mask, part.key_norms, part.key_bias,
            *(part.rope or (None, None)),
        )
        for part in slices
    ]  # fmt: skip
    taps = (None, None) if qkv.taps is None else (qkv.taps.key_weight, qkv.taps.value_weight)
    return decode_attention(qkv.q, *map(list, zip(*tensors, strict=True)), *taps, qkv.sigma, qkv.scale, multiprocessors)


# An operator of its own, since torch.compile would write the kernels anew. It prints a global -inf as a name that does
# not exist, types a Python number as float64, and fails to order the launches where S is a symbol.
@torch.library.custom_op("gkachat::decode_attention", mutates_args=())
@on_device_of_first
def decode_attention(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor | None],
    masks: list[Tensor],
    key_norms: list[Tensor | None],
    key_biases: list[Tensor | None],
    cos: list[Tensor | None],
    sin: list[Tensor | None],
    key_taps: Tensor | None,
    value_taps: Tensor | None,
    sigma: Tensor | None,
    scale: float,
    multiprocessors: int,
) -> Tensor:
    """Launch the kernels; the lists have an entry for each slice, and no values where keys are the values."""
    B, _, H, D = q.shape
    n_taps = 1 if key_taps is None else len(key_taps)
    half, tile = tile_shape(D, n_taps)
    max_splits = -(-PROGRAMS_PER_SM * multiprocessors // (B * H))
    launches, n_splits = [], 0
    for part in zip(keys, values, masks, key_norms, key_biases, cos, sin, strict=True):
        tiles = max(1, -(-part[2].size(3) // tile))
        tiles_per_split = -(-tiles // min(tiles, max_splits))
        launches.append((part, tiles_per_split * tile, n_splits, -(-tiles // tiles_per_split)))
        n_splits += -(-tiles // tiles_per_split)
    mean = q.new_empty(B, H, n_splits, D, dtype=torch.float32)
    lse = q.new_empty(B, H, n_splits, dtype=torch.float32)
    q, sigma = contiguous_channels(q), None if sigma is None else sigma.contiguous()
    key_taps, value_taps = (None if taps is None else taps.contiguous() for taps in (key_taps, value_taps))
    for (k, v, mask, norms, biases, cos_S, sin_S), keys_per_split, first_split, splits in launches:
        k = contiguous_channels(k).expand(B, -1, -1, -1)
        shared_kv = v is None
        v = k if shared_kv else contiguous_channels(v).expand(B, -1, -1, -1)
        mask = contiguous_channels(mask)
        strides = {t.expand(B, -1, -1, -1).stride()[:3] for t in (norms, biases) if t is not None} or {(0, 0, 0)}
        assert len(strides) == 1, f"norms and biases of keys: given strides {strides}, expected equal ones"
        if cos_S is not None:
            cos_S, sin_S = (table.contiguous().expand(B, -1, -1, -1) for table in (cos_S, sin_S))
        split_kernel[(B * H, splits)](  # the first dimension has room for 2^31 programs, the others for 2^16
            q, k, v, mask, norms, biases, key_taps, value_taps, cos_S, sin_S, sigma, mean, lse,
            q.stride(0), q.stride(2), *k.stride()[:3], *v.stride()[:3], mask.stride(0), *strides.pop(),
            0 if cos_S is None else cos_S.stride(0), H, mask.size(3), keys_per_split, first_split, n_splits,
            D=D, HALF=half, BN=tile, SHARED_KV=shared_kv, SCALE=scale, N_TAPS=n_taps,
        )  # fmt: skip
    y = q.new_empty(B, 1, H, D)
    combine_kernel[(B * H,)](mean, lse, y, n_splits, D=D, HALF=half, BN=SPLITS)
    return y


@decode_attention.register_fake
def _(q, *others):
    return torch.empty_like(q, memory_format=torch.contiguous_format)
