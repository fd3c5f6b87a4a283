"""Attention by its definition, in plain PyTorch. Every kernel is tested against it, and inspection uses it.

It computes in float32 at least (float64 stays float64) and forms all T x S scores.
Axes: B batch, T time (query), S time (key), H heads, D head_dim.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gkachat.attention.qkv import QKV, KVSlice

Scores = Callable[[Tensor, Tensor, QKV], Tensor]
"""(q_BHTD, k_BHSD, qkv) -> scores (B, H, T, S)."""


def visible(
    T: int, window: int | None, causal: bool = True, include_self: bool = True, device: torch.device | None = None
) -> Tensor:
    """Return the (T, S) mask that is true where query i sees key j."""
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


def queries_and_keys(qkv: QKV) -> tuple[Tensor, Tensor]:
    """Return queries and keys as (B, H, T, D), in float32 or wider."""
    return _widen(qkv.q).transpose(1, 2), _widen(qkv.k).transpose(1, 2)


def squared_distances(q_BHTD: Tensor, k_BHSD: Tensor) -> Tensor:
    """Return |q_i - k_j|^2, (B, H, T, S). The faster |q|^2 + |k|^2 - 2 q.k would lose its digits to cancellation."""
    return torch.cdist(q_BHTD, k_BHSD, compute_mode="donot_use_mm_for_euclid_dist").square()


def scores(q_BHTD: Tensor, k_BHSD: Tensor, qkv: QKV) -> Tensor:
    """Return scores (B, H, T, S): `scale * q.k`, or with sigma -|q - k|^2 / (2 sigma^2)."""
    if qkv.sigma is None:
        return qkv.scale * q_BHTD @ k_BHSD.mT
    return -squared_distances(q_BHTD, k_BHSD) / (2 * qkv.sigma.to(q_BHTD.dtype).square()[:, None, None])


def weights(scores_BHTS: Tensor, mask: Tensor) -> Tensor:
    """Return the softmax over the visible keys, (B, H, T, S). A row without a key has weights of 0."""
    keyless = ~mask.any(dim=-1, keepdim=True)
    weights_BHTS = scores_BHTS.masked_fill(~mask, -torch.inf).masked_fill(keyless, 0).softmax(dim=-1)
    return weights_BHTS.masked_fill(keyless, 0)


def attend(qkv: QKV, *, window: int | None, causal: bool, include_self: bool, scores: Scores = scores) -> Tensor:
    """Return the attention of T tokens to each other, (B, T, H, D) in the dtype of the values."""
    q_BHTD, k_BHSD = queries_and_keys(qkv)
    mask = visible(qkv.q.size(1), window, causal, include_self, qkv.q.device)
    weights_BHTS = weights(scores(q_BHTD, k_BHSD, qkv), mask)
    return (weights_BHTS @ _widen(qkv.v).transpose(1, 2)).transpose(1, 2).to(qkv.v.dtype)


def attend_cached(qkv: QKV, slices: list[KVSlice], *, scores: Scores = scores) -> Tensor:
    """Return the attention of T new tokens to cached ones, (B, T, H, D) in the dtype of the values."""
    B = qkv.q.size(0)
    if qkv.taps is not None:
        slices = [part.convolved(qkv.taps) for part in slices]
    q_BHTD = _widen(qkv.q).transpose(1, 2)
    k = torch.cat([_widen(part.rotated_keys()).expand(B, -1, -1, -1) for part in slices], dim=2)
    v = torch.cat([_widen(part.v).expand(B, -1, -1, -1) for part in slices], dim=2)
    mask = torch.cat([part.mask.expand(B, -1, -1, -1) for part in slices], dim=3) == 0
    scores_BHTS = scores(q_BHTD, k, qkv)
    if slices[0].key_bias is not None:
        scores_BHTS = scores_BHTS + torch.cat([part.key_bias.expand(B, -1, -1, -1) for part in slices], dim=2).mT
    return (weights(scores_BHTS, mask) @ v).transpose(1, 2).to(qkv.v.dtype)


def _widen(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
