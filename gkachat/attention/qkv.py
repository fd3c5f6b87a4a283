"""Inputs of the kernels: the queries, keys and values of new tokens, and the cached keys and values."""

from typing import NamedTuple

from torch import Tensor

from gkachat.attention.features import Rope, rotate


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

    @property
    def cached_k(self) -> Tensor:
        """The keys as the cache keeps them; the same object as `v` where one tensor serves as keys and values."""
        return self.k if self.unrotated_k is None else self.unrotated_k


class KVSlice(NamedTuple):
    """Cached keys and values that T new tokens may attend to.

    Rows are B, or 1 where all rows of the batch share them; S is the number of cache slots.
    """

    k: Tensor
    """(B or 1, H, S, D)"""
    v: Tensor
    """(B or 1, H, S, D); the same object as `k` where one tensor serves as both."""
    mask: Tensor
    """(B, 1, T, S), added to the scores: 0 where the key is seen, minus infinity elsewhere."""
    key_norms: Tensor | None = None
    """(B or 1, H, S, 1) float32, |k|^2. Half of it is subtracted from q.k, as a Gaussian kernel demands."""
    rope: Rope | None = None
    """(cos, sin), each (B or 1, 1, S, D/2), for keys that were cached unrotated; None for rotated keys."""

    def rotated_keys(self) -> Tensor:
        """Return the keys after their rotation, (B or 1, H, S, D)."""
        return self.k if self.rope is None else rotate(self.k, *self.rope)
