"""Gaussian Kernel Attention with what it lacks beside softmax attention, still without a projection.

    q = norm(rope(conv(x)))    k = norm(rope(conv(x)))    v = conv(x)    s_ij = q_i.k_j / sigma^2

Of normalised features a Gaussian kernel's distance leaves the product. Published GKA finds tokens like itself. Here
convolutions let a token be found by what came before it, and the keys' start as delays, by 1, 2, 3, 1, .. tokens from
head to head: what is found is what followed a token like itself, the step of an induction head (arXiv 2209.11895), from
the first training step on. All of it is 12 C numbers a layer, no C x C matrix.

What was tried besides can be had, though a laptop's runs gain nothing by it (docs/experiments.md): features of the next
head's channels; adaptive kernel regression (Silverman 1986, section 5.3), where a query's bandwidth is its own, by
tau_i = exp(u.x_i), and points have weights b_j = w.x_j, so that s_ij = tau_i q_i.k_j / sigma^2 + b_j. A key's weight
takes the last of its channels, and the query's is 1: any softmax attention kernel then does. Without normalisation the
norm's part of the distance, -|k|^2 / (2 sigma^2), goes there too. Value embeddings, as softmax attention has them, are
parameters that are looked up.
Axes: B batch, T time, H heads, D head_dim, C channels.
"""

import math

import torch
from torch import Tensor, nn

from gkachat.attention.backends import decode_backend, softmax_backend
from gkachat.attention.cache import Keys, Step
from gkachat.attention.features import NoConv, Rope, ShortConv, apply_rope, rms_norm
from gkachat.attention.fused import softmax_weights
from gkachat.attention.linear import Groups, Keep, Linear, Look, ValueEmbeddings
from gkachat.config import GPTConfig

SHARPNESS = 1.2  # of unit features at the start, that of softmax attention's queries and keys


class GKAPlus(ValueEmbeddings):
    """See above, and layers.py for the interface."""

    cache_tensors = 2  # keys and values, made once; a few block inputs besides, for the convolutions

    def __init__(self, config: GPTConfig, index: int):
        super().__init__(config, index, config.plus.value_embeddings)
        self.config, self.window, plus = config, config.window(index), config.plus
        H, D = config.n_head, config.head_dim
        self.conv_q, self.conv_k, self.conv_v = (
            ShortConv(H, D, plus.taps) if wanted else NoConv(plus.taps)
            for wanted in (plus.conv_query, plus.conv_key, plus.conv_value)
        )
        self.log_sigma = nn.Parameter(torch.empty(H))
        self.bandwidth = nn.Parameter(torch.empty(H, D)) if plus.token_bandwidth else None
        self.key_weight = nn.Parameter(torch.empty(H, D)) if plus.key_weight else None
        self.c_proj = Linear(config.n_embd, config.n_embd)

    @property
    def cache_widths(self) -> tuple[int, ...]:
        return (self.config.head_dim, self.config.head_dim)

    @property
    def cache_recent(self) -> tuple[int, int]:
        """How many tensors of C numbers are kept of the last so many tokens."""
        return (1, self.config.plus.taps)

    def choose_backend(self, device: torch.device, dtype: torch.dtype) -> None:
        config = self.config
        self.backend = softmax_backend(device, dtype, config.head_dim, self.window, config.sequence_len)
        self.decoding = decode_backend(device, dtype, config.head_dim)

    def init_weights(self) -> None:
        nn.init.constant_(self.log_sigma, math.log(self.config.head_dim**0.25 / SHARPNESS))
        for conv in (self.conv_q, self.conv_k, self.conv_v):
            if isinstance(conv, ShortConv):
                conv.init_weights()
        if isinstance(self.conv_k, ShortConv) and self.config.plus.key_delays:
            self.conv_k.init_weights(range(1, self.config.plus.taps))
        for vectors in (self.bandwidth, self.key_weight):
            if vectors is not None:
                nn.init.zeros_(vectors)
        self.init_value_embedding()
        nn.init.zeros_(self.c_proj.weight)

    def parameter_groups(self) -> Groups:
        groups = {"matrices": [self.c_proj.weight], "log_sigma": [self.log_sigma]}
        convs = [conv.weight for conv in (self.conv_q, self.conv_k, self.conv_v) if isinstance(conv, ShortConv)]
        vectors = [vector for vector in (self.bandwidth, self.key_weight) if vector is not None]
        groups |= {name: found for name, found in (("convolutions", convs), ("head_vectors", vectors)) if found}
        return groups | self.value_groups()

    @property
    def sigma(self) -> Tensor:
        """(H,) bandwidths, in units of normalised features."""
        return self.log_sigma.exp()

    def _compared(self, x: Tensor, q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Queries and keys as a softmax kernel takes them, from those that were convolved; all (B, T, H, D)."""
        plus, inverse = self.config.plus, self.sigma.square().reciprocal()[:, None]
        q, k = self._features(q, rope), self._features(k, rope)
        bias = None
        if self.key_weight is not None:
            bias = (x * self.key_weight.to(x.dtype)).sum(dim=-1, keepdim=True)
        if not plus.normalize:
            height = -0.5 * inverse.to(x.dtype) * k[..., :-1].square().sum(dim=-1, keepdim=True)
            bias = height if bias is None else bias + height
        if self.bandwidth is not None:
            inverse = inverse * (x * self.bandwidth.to(x.dtype)).sum(dim=-1, keepdim=True).exp()
        q = q * inverse.to(x.dtype)
        if bias is not None:
            q, k = torch.cat((q[..., :-1], torch.ones_like(bias)), dim=-1), torch.cat((k[..., :-1], bias), dim=-1)
        return q, k

    def _features(self, t: Tensor, rope: Rope) -> Tensor:
        t = apply_rope(t, rope) if self.config.plus.rope else t
        return rms_norm(t) if self.config.plus.normalize else t

    def _heads(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.view(*x_BTC.shape[:2], self.config.n_head, self.config.head_dim)

    def _neighbour(self, x: Tensor) -> Tensor:
        return x.roll(-1, dims=2) if self.config.plus.neighbour else x

    def forward(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope, keep: Keep | None = None) -> Tensor:
        x = self._heads(x_BTC)
        f = self._neighbour(x)
        q, k = self._compared(x, self.conv_q(f), self.conv_k(f), rope)
        v = self.add_value_embedding(self.conv_v(x), x_BTC, idx_BT)
        if keep is not None:
            keep(k, v, x)
        return self.c_proj(self.backend.attend(q, k, v, window=self.window, scale=1.0).flatten(2))

    def kept(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope) -> tuple[Tensor, ...]:
        x = self._heads(x_BTC)
        f = self._neighbour(x)
        v = self.add_value_embedding(self.conv_v(x), x_BTC, idx_BT)
        return self._compared(x, f, self.conv_k(f), rope)[1], v, x

    def decode(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope, step: Step) -> Tensor:
        x = self._heads(x_BTC)
        [recent] = step.look_back(x)
        f = self._neighbour(recent)
        q, k = self._compared(x, self.conv_q.of(f), self.conv_k.of(f), rope)
        v = self.add_value_embedding(self.conv_v.of(recent), x_BTC, idx_BT)
        seen = [Keys(*span.tensors, span.mask) for span in step.extend(k, v)]
        return self.c_proj(self.decoding.attend(q, seen, 1.0).flatten(2))

    def look(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope) -> Look:
        """Distances as sigma alone measures them, before a query's own bandwidth and a key's weight."""
        x = self._heads(x_BTC)
        convolved = [conv(self._neighbour(x)) for conv in (self.conv_q, self.conv_k)]
        weights = softmax_weights(*self._compared(x, *convolved, rope), window=self.window, scale=1.0)
        width = x.size(-1) - (self.key_weight is not None or not self.config.plus.normalize)
        f = [self._features(t.float(), rope)[..., :width].transpose(1, 2) for t in convolved]
        distances = torch.cdist(*f, compute_mode="donot_use_mm_for_euclid_dist").square()
        return Look(weights, self.add_value_embedding(self.conv_v(x), x_BTC, idx_BT), distances)

    def statistics(self) -> dict[str, Tensor]:
        sigma = self.sigma.detach()
        return {"sigma": torch.stack((sigma.min(), sigma.median(), sigma.max())), "sigma_by_head": sigma}
