"""The base class of every attention: one forward for training, prefill, decoding and inspection.

    layer = attention_class(config.attention)(config, index)
    layer.choose_kernels(device, dtype)
    y_BTC = layer(x_BTC, idx_BT, rope, x0_BTC=x0_BTC)            # training
    y_BTC = layer(x_BTC, idx_BT, rope, cache, x0_BTC)            # prefill and decoding

A subclass defines little more than `qkv`, which turns the block input, or its learned sum with the embedding, into
queries, keys and values. docs/attention.md has a complete example.
Axes: B batch, T time (query), S time (key), H heads, D head_dim, C channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gkachat.attention.cache import LayerCache, LayerCacheSpec
from gkachat.attention.features import Rope
from gkachat.attention.kernels import reference
from gkachat.attention.kernels.choose import KernelSpec, choose_decode_kernel, choose_kernel, plain_kernels
from gkachat.attention.linear import Linear
from gkachat.attention.qkv import QKV
from gkachat.config import GPTConfig

Groups = dict[str, list[nn.Parameter]]
"""Parameters by the name of their group, such as "matrices". Optimizers and parameter counts work by group."""


class AttentionWeights(NamedTuple):
    """Attention weights of a text, computed by the definition."""

    weights: Tensor
    """(B, H, T, S) float32. A row sums to 1, or to 0 where it has no key."""
    values: Tensor
    """(B, S, H, D). The layer's output is `weights @ values` through `output` and c_proj."""
    distances: Tensor | None
    """(B, H, T, S) float32: squared distances between queries and keys, for layers that have a bandwidth."""


class Attention(nn.Module):
    """One attention layer with its output projection. Subclasses define `qkv`."""

    shares_kv = False
    """Whether one cached tensor serves as keys and values: `qkv.cached_k is qkv.v`, or both come from `qkv.taps.x`."""
    gaussian = False
    """Whether scores are -|q - k|^2 / (2 sigma^2) with the sigma that `qkv` gives. Fused kernels exist for these.

    Softmax kernels, which ignore `sigma` and `include_self`, run a layer that neither sets `gaussian` nor overrides
    `scores`.
    """
    shared_qk = True
    """Whether queries and keys are one tensor, in a layer that sets `gaussian`. The fused kernel wants it."""
    unit_norm = False
    """Whether all queries and keys have the same norm. Gaussian scores are then q.k / sigma^2, with no bias per key."""
    include_self = True
    """Whether a token attends to itself."""
    backend = "auto"
    """Name of the kernel for Gaussian scores. auto chooses the fastest one that can run."""
    lookback = 0
    """Number of earlier inputs that `qkv` needs, as short convolutions do."""
    taps = 1
    """Number of tokens that each key and value convolves, in a layer whose `qkv` gives `taps`."""
    forgets = False
    """Whether `qkv` has biases of keys, of which a running sum over the text is a part."""

    def __init__(self, config: GPTConfig, index: int):
        super().__init__()
        self.config, self.window = config, config.window(index)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        reads_x0 = config.uses_attention_x0 and index > 0  # the first layer's stream is the embedding
        self.input_mix = nn.Parameter(torch.empty(2)) if reads_x0 else None

    def mixed(self, x_BTC: Tensor, x0_BTC: Tensor | None) -> Tensor:
        """Return the learned sum of the block input and the embedding, or without `input_mix` the block input.

        Raises ValueError where the layer reads the embedding and is not given it.
        """
        if self.input_mix is None:
            return x_BTC
        if x0_BTC is None:
            raise ValueError("x0_BTC: given None, expected the embedding, which this layer reads (model.attention_x0)")
        x_share, x0_share = self.input_mix.to(x_BTC.dtype)
        return x_share * x_BTC + x0_share * x0_BTC

    def inputs(self, x_BTC: Tensor) -> Tensor:
        """Return what `qkv` reads of each token, (B, T, ...): what `mixed` returns, or what a subclass makes of it."""
        return x_BTC

    def qkv(self, x_BTC: Tensor, idx_BT: Tensor | None, rope: Rope | None) -> QKV:
        """Return queries, keys and values of the last T tokens.

        Args:
            x_BTC: `inputs` of the tokens. While decoding, those of `lookback` earlier tokens stand in front of them.
            idx_BT: token ids, T of them; None in image models.
            rope: (cos, sin) of the T positions; None in image models.
        """
        raise AssertionError(f"{type(self).__name__} must define qkv")

    def scores(self, q_BHTD: Tensor, k_BHSD: Tensor, qkv: QKV) -> Tensor:
        """Return the scores (B, H, T, S) in float32, by the definition.

        A subclass with another comparison overrides this method. It then runs on plain PyTorch instead of the fused
        kernels.
        """
        if self.unit_norm:  # the kernels drop the norms too, which only matters for keys of zeros (before the text)
            qkv = qkv._replace(scale=qkv.sigma.square().reciprocal()[:, None, None], sigma=None)
        return reference.scores(q_BHTD, k_BHSD, qkv)

    def forward(
        self,
        x_BTC: Tensor,
        idx_BT: Tensor | None,
        rope: Rope | None,
        cache: LayerCache | None = None,
        x0_BTC: Tensor | None = None,
    ) -> Tensor:
        """Return what the layer adds to the residual stream, (B, T, C).

        With a cache, the new tokens are written to it, and attend to the cached tokens as well.

        Args:
            x_BTC: block input, the normalised residual stream.
            x0_BTC: embedding after its norm and smear, for layers that read it too (`input_mix`).
        """
        inputs = self.inputs(self.mixed(x_BTC, x0_BTC))
        if cache is None:
            y_BTHD = self.kernel.attend(self.qkv(inputs, idx_BT, rope))
        else:
            qkv = self.qkv(cache.with_lookback(inputs), idx_BT, rope)
            cache.append(qkv)
            if cache.is_prefill:  # there is no past: the training kernel attends within the new tokens
                y_BTHD = self.kernel.attend(qkv)
            else:
                y_BTHD = self.decode_kernel.attend(qkv, cache.slices(self.include_self))
        return self.c_proj(self.output(y_BTHD, x_BTC).flatten(2))

    def output(self, y_BTHD: Tensor, x_BTC: Tensor) -> Tensor:
        """Return what `c_proj` reads, (B, T, H, D): the mean of the values, or what a subclass makes of it."""
        return y_BTHD

    @torch.no_grad()
    def attention_weights(
        self,
        x_BTC: Tensor,
        idx_BT: Tensor | None,
        rope: Rope | None,
        key_bias_BS: Tensor | None = None,
        x0_BTC: Tensor | None = None,
    ) -> AttentionWeights:
        """Return the weights that `forward` applies to whole texts, for inspection.

        `key_bias_BS` is added to the scores of each key, -inf for one that is ignored.
        """
        qkv = self.qkv(self.inputs(self.mixed(x_BTC, x0_BTC)), idx_BT, rope)
        q_BHTD, k_BHSD = reference.queries_and_keys(qkv)
        mask = reference.visible(x_BTC.size(1), self.window, self.config.causal, self.include_self, x_BTC.device)
        scores_BHTS = self.scores(q_BHTD, k_BHSD, qkv)
        if key_bias_BS is not None:
            bias_B11S = key_bias_BS[:, None, None]
            scores_BHTS, mask = scores_BHTS + bias_B11S, mask & (bias_B11S > -torch.inf)
        weights = reference.weights(scores_BHTS, mask)
        return AttentionWeights(weights, qkv.v, self.squared_distances(q_BHTD, k_BHSD, qkv))

    def squared_distances(self, q_BHTD: Tensor, k_BHSD: Tensor, qkv: QKV) -> Tensor | None:
        """Return |q_i - k_j|^2, (B, H, T, S), in the units of the bandwidth; None for a layer without a bandwidth."""
        return None if qkv.sigma is None else reference.squared_distances(q_BHTD, k_BHSD)

    def choose_kernels(self, device: torch.device, dtype: torch.dtype) -> None:
        """Choose the training kernel and the decode kernel, once. Called whenever the model moves to a device."""
        if type(self).scores is not Attention.scores:
            self.kernel, self.decode_kernel = plain_kernels(self.scores, self.kernel_spec)
        else:
            self.kernel = choose_kernel(self.kernel_spec, device, dtype)
            self.decode_kernel = choose_decode_kernel(self.config.head_dim, device, dtype)

    @property
    def kernel_spec(self) -> KernelSpec:
        """The properties of the layer that decide which kernel runs it."""
        config = self.config
        return KernelSpec(
            head_dim=config.head_dim,
            sequence_len=config.sequence_len,
            window=self.window,
            causal=config.causal,
            include_self=self.include_self,
            gaussian=self.gaussian,
            shared_qk=self.shared_qk,
            unit_norm=self.unit_norm,
            backend=self.backend,
        )

    def kernel_lines(self) -> list[str]:
        """Return "kernel (reason)" of each choice that training prints."""
        return [f"{self.kernel.name} ({self.kernel.reason})"]

    @property
    def cache_spec(self) -> LayerCacheSpec:
        """Specification of what the cache keeps of each token: norms of keys only where Gaussian scores need them."""
        key_norms = self.gaussian and not self.unit_norm
        return LayerCacheSpec(self.window, True, self.shares_kv, key_norms, self.lookback, self.taps, self.forgets)

    def split_heads(self, x_BTC: Tensor) -> Tensor:
        """Reshape (B, T, C) to (B, T, H, D)."""
        return x_BTC.view(*x_BTC.shape[:2], self.config.n_head, self.config.head_dim)

    def init_weights(self) -> None:
        """Initialize every parameter. The block starts as the identity: its output projection is zero."""
        nn.init.zeros_(self.c_proj.weight)
        if self.input_mix is not None:
            nn.init.constant_(self.input_mix, 0.5)

    def parameter_groups(self) -> Groups:
        """Return every parameter of the layer once, by group."""
        groups = {"matrices": [self.c_proj.weight]}
        return groups if self.input_mix is None else groups | {"input_mix": [self.input_mix]}

    def statistics(self) -> dict[str, Tensor]:
        """Return numbers to log, by name; each is a tensor of one dimension."""
        return {}
