"""Attention of a few new tokens to cached ones, in PyTorch: the decode kernel that runs everywhere.

Axes: B rows, T new tokens, S cached ones, H heads, D head_dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gkachat.attention.qkv import QKV, KVSlice


def attend(qkv: QKV, slices: Sequence[KVSlice]) -> Tensor:
    """Return softmax attention of the new queries to the keys of all slices, (B, T, H, D).

    Scores are scale (q.k - |k|^2 / 2), the second term only where a slice has key norms, and `scale` is 1 / sigma^2
    where qkv has a bandwidth. A token that sees no key gets 0.
    """
    B, T, H, D = qkv.q.shape
    q = qkv.q.transpose(1, 2)
    scale = qkv.scale if qkv.sigma is None else qkv.sigma.square().reciprocal()[:, None, None]
    scores = []
    for part in slices:
        k = part.rotated_keys()
        if k.size(0) < B:  # shared by all rows: one product
            shared = q.transpose(0, 1).reshape(H, B * T, D) @ k[0].mT
            products = shared.view(H, B, T, -1).transpose(0, 1)
        else:
            products = q @ k.mT
        bias = part.mask if part.key_norms is None else part.mask - (0.5 * scale * part.key_norms).mT
        scores.append(products.float() * scale + bias)
    all_scores = torch.cat(scores, dim=-1) if len(scores) > 1 else scores[0]
    row_max = all_scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (all_scores - row_max).exp()
    weights = (weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).to(q.dtype)
    y = 0
    for part, w in zip(slices, weights.split([score.size(-1) for score in scores], dim=-1), strict=True):
        if (v := part.v).size(0) < B:
            y = y + (w.transpose(0, 1).reshape(H, B * T, -1) @ v[0]).view(H, B, T, D).transpose(0, 1)
        else:
            y = y + w @ v
    return y.transpose(1, 2)
