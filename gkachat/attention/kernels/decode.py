"""Attention of a few new tokens to cached ones, in PyTorch: the decode kernel that runs everywhere.

Axes: B rows, T new tokens, S cached ones, H heads, D head_dim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gkachat.attention.qkv import QKV, KVSlice

# New tokens from which on all keys and values are made, rather than the cache read by tap. On a CPU, with 256 and 1,024
# cached tokens, reading by tap takes 0.1 to 0.5 of the time for one token; the two are level between 16 and 32.
MATERIALIZE = 24


def attend(qkv: QKV, slices: Sequence[KVSlice], queries_first: bool = False) -> Tensor:
    """Return softmax attention of the new queries to the keys of all slices, (B, T, H, D).

    Scores are scale (q.k - |k|^2 / 2), the second term only where a slice has key norms, and `scale` is 1 / sigma^2
    where qkv has a bandwidth. Where a slice has biases of keys, these are added. A token that sees no key gets 0.

    With taps, keys and values are convolutions of what the slices hold. Since q.(w x) = (w q).x, a query becomes one
    for each tap, and nothing but their scores is added up over neighbours: the cache is read as it is.

    `queries_first` is whether products in bfloat16 are q k^T rather than k q^T: the faster one depends on the CPU.
    """
    T, taps = qkv.q.size(1), qkv.taps
    if taps is not None and T >= MATERIALIZE:
        slices, taps = [part.convolved(taps) for part in slices], None
    q = qkv.q.transpose(1, 2)
    scale = qkv.scale if qkv.sigma is None else qkv.sigma.square().reciprocal()[:, None, None]
    scores = []
    for part in slices:
        if taps is None:
            products = _products(q, part.rotated_keys(), queries_first)
        else:
            products = _tap_products(q, part, taps.key_weight, queries_first)
        bias = part.mask if part.key_norms is None else part.mask - (0.5 * scale * part.key_norms).mT
        bias = bias if part.key_bias is None else bias + part.key_bias.mT
        scores.append(products.float() * scale + bias)
    all_scores = torch.cat(scores, dim=-1) if len(scores) > 1 else scores[0]
    # The weight of a token that sees no key goes to a last key that has no value.
    weights = F.pad(all_scores, (0, 1), value=torch.finfo(torch.float32).min).softmax(dim=-1)[..., :-1].to(q.dtype)
    y = 0
    for part, w in zip(slices, weights.split([score.size(-1) for score in scores], dim=-1), strict=True):
        y = y + (_sums(w, part.v) if taps is None else _tap_sums(w, part, taps.value_weight))
    return y.transpose(1, 2)


def _products(q: Tensor, k: Tensor, queries_first: bool) -> Tensor:
    """Return q.k, (B, H, T, S); rows that share the keys share one product.

    In bfloat16 a CPU copies a right side that it cannot multiply as it lies, for several times what the product takes:
    with AMX all keys, and otherwise a part of a buffer.
    """
    if k.size(0) == q.size(0):
        keys_first = k.dtype == torch.bfloat16 and not (queries_first and k.is_contiguous())
        return (k @ q.mT).mT if keys_first else q @ k.mT
    B, H, T, D = q.shape
    return (k[0] @ q.transpose(0, 1).reshape(H, B * T, D).mT).view(H, -1, B, T).permute(2, 0, 3, 1)


def _sums(w: Tensor, v: Tensor) -> Tensor:
    """Return the sums of values by weights (B, H, T, S), (B, H, T, D); rows that share the values share one product."""
    if v.size(0) == w.size(0):
        return w @ v
    B, H, T, S = w.shape
    return (w.transpose(0, 1).reshape(H, B * T, S) @ v[0]).view(H, B, T, -1).transpose(0, 1)


def _tap_products(q: Tensor, part: KVSlice, key_weight: Tensor, queries_first: bool) -> Tensor:
    """Return q.k in float32, (B, H, T, S), of keys that are convolutions of what the slice holds."""
    N, S = len(key_weight), part.mask.size(-1)
    by_tap = q[:, :, :, None] * key_weight.to(q.dtype).transpose(0, 1)[:, None]  # (B, H, T, N, D)
    products = _products(by_tap.flatten(2, 3), part.k, queries_first).float()
    products = products.unflatten(2, (-1, N))  # (B, H, T, N, N - 1 + S)
    scores = products[..., 0, N - 1 :]
    for n in range(1, N):  # tap n of a key has the token n before it
        scores = scores + products[..., n, N - 1 - n : N - 1 - n + S]
    return scores


def _tap_sums(w: Tensor, part: KVSlice, value_weight: Tensor) -> Tensor:
    """Return the sums of values by weights, (B, H, T, D), where values are convolutions of what the slice holds."""
    N, S = len(value_weight), w.size(-1)
    by_tap = F.pad(w, (N - 1, N - 1)).unfold(-1, N - 1 + S, 1)  # (B, H, T, N, N - 1 + S), newest tap first
    sums = _sums(by_tap.flatten(2, 3), part.v).unflatten(2, (-1, N))  # (B, H, T, N, D)
    return (sums * value_weight.to(w.dtype).transpose(0, 1)[:, None]).sum(dim=-2)
