"""Inputs of the kernels: the queries, keys and values of new tokens, and the cached keys and values."""

from typing import NamedTuple

from torch import Tensor

from gkachat.attention.features import Rope, rotate, short_conv


class Taps(NamedTuple):
    """Keys and values as short convolutions of one tensor, which the cache keeps in their place.

    k_j = sum_n key_weight_n x_(j-n),  v_j = sum_n value_weight_n x_(j-n)
    """

    x: Tensor
    """(B, T, H, D): that tensor at the new tokens."""
    key_weight: Tensor
    """(N, H, D)"""
    value_weight: Tensor
    """(N, H, D)"""


class QKV(NamedTuple):
    """Queries, keys and values of T tokens, each (B, T, H, D).

    Scores are `scale * q.k`; with `sigma` they are -|q - k|^2 / (2 sigma^2).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float = 1.0
    sigma: Tensor | None = None
    """(H,) float32 bandwidths, in the units of q and k."""
    unrotated_k: Tensor | None = None
    """Keys before their rotation. Where given, the cache keeps these in place of `k` and rotates them whenever it reads
    them, so that keys and unrotated values can share one tensor."""
    taps: Taps | None = None
    """What keys and values are convolutions of. Where given, the cache keeps that in place of both."""
    key_bias: Tensor | None = None
    """(B, T, H, 1) float32, added to the scores of each key. In training, the last channels of q and k add it."""
    running_sum: Tensor | None = None
    """(B, T, H, 1) float32, the part of `key_bias` that is a running sum over the text, from the first of these tokens
    on. The cache adds what it was before them."""

    @property
    def cached_k(self) -> Tensor:
        """The keys as the cache keeps them; the same object as `v` where one tensor serves as keys and values."""
        if self.taps is not None:
            return self.taps.x
        return self.k if self.unrotated_k is None else self.unrotated_k


class KVSlice(NamedTuple):
    """Cached keys and values that T new tokens may attend to.

    Rows are B, or 1 where all rows of the batch share them; S is the number of cache slots.
    """

    k: Tensor
    """(B or 1, H, S, D); (B or 1, H, N - 1 + S, D) of what keys and values are convolutions of, where qkv has taps."""
    v: Tensor
    """(B or 1, H, S, D); the same object as `k` where one tensor serves as both."""
    mask: Tensor
    """(B, 1, T, S), added to the scores: 0 where the key is seen, minus infinity elsewhere."""
    key_norms: Tensor | None = None
    """(B or 1, H, S, 1) float32, |k|^2. Half of it is subtracted from q.k, as a Gaussian kernel demands."""
    rope: Rope | None = None
    """(cos, sin), each (B or 1, 1, S, D/2), for keys that were cached unrotated; None for rotated keys."""
    key_bias: Tensor | None = None
    """(B or 1, H, S, 1) float32, added to the scores of each key, where the layer forgets."""

    def rotated_keys(self) -> Tensor:
        """Return the keys after their rotation, (B or 1, H, S, D)."""
        return self.k if self.rope is None else rotate(self.k, *self.rope)

    def convolved(self, taps: Taps) -> "KVSlice":
        """Return the slice with the keys and values that the taps make of it."""
        x_BSHD, S = self.k.transpose(1, 2), self.mask.size(-1)
        k, v = (short_conv(x_BSHD, w)[:, -S:].transpose(1, 2) for w in (taps.key_weight, taps.value_weight))
        return self._replace(k=k, v=v)
