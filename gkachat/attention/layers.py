"""The attention layers a model chooses from. One interface:

    layer = ATTENTION[config.attention](config, index)
    layer.choose_backend(device, dtype)
    y_BTC = layer(x_BTC, idx_BT, rope)

x_BTC is the block input after the pre-norm, idx_BT the tokens, rope the tables for T positions. `decode` takes a step
of a cache besides, which holds what came before; `kept` is what a cache holds of these tokens, and `forward` hands it
to `keep` where that is given. Each layer knows its window, initialises itself, sorts its parameters
into the groups that the optimizer and the accounts work with, and tells what is worth watching (`statistics`: least,
median and largest of each).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkachat.attention.backends import decode_backend, gka_backend, softmax_backend
from gkachat.attention.cache import Keys, Step
from gkachat.attention.features import Rope, apply_rope, rms_norm
from gkachat.config import GPTConfig

QK_SCALE = 1.2  # sharpens the logits of unit queries and keys
GATE_CHANNELS = 12  # block-input channels that the value gates look at

Groups = dict[str, list[nn.Parameter]]
Keep = Callable[..., None]  # given what decoding keeps of some tokens, each (B, T, H, width)


class Linear(nn.Linear):
    """A matrix without bias, kept in its own dtype and multiplied in that of its input."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def uniform_(weight: Tensor, std: float) -> None:
    """Fill from a uniform distribution around 0 with the given standard deviation."""
    nn.init.uniform_(weight, -math.sqrt(3) * std, math.sqrt(3) * std)


class SoftmaxAttention(nn.Module):
    """Scaled dot-product attention with rotary positions, normalised queries and keys, and gated value embeddings.

    Value embeddings, where the config has them on every other layer and always the last, add a learned vector per
    token to the values, gated per head by 3 sigmoid(W x[:12]).
    """

    cache_tensors = 2  # C numbers each that decoding keeps for a token and layer: keys, values

    def __init__(self, config: GPTConfig, index: int):
        super().__init__()
        C = config.n_embd
        self.config, self.window = config, config.window(index)
        self.c_q, self.c_k, self.c_v, self.c_proj = (Linear(C, C) for _ in range(4))
        has_value_embedding = config.value_embeddings and (config.depth - 1 - index) % 2 == 0
        self.value_embedding = nn.Embedding(config.vocab_size, C) if has_value_embedding else None
        self.value_gate = Linear(GATE_CHANNELS, config.n_head) if has_value_embedding else None

    @property
    def cache_widths(self) -> tuple[int, ...]:
        return (self.config.head_dim, self.config.head_dim)

    def choose_backend(self, device: torch.device, dtype: torch.dtype) -> None:
        config = self.config
        self.backend = softmax_backend(device, dtype, config.head_dim, self.window, config.sequence_len)
        self.decoding = decode_backend(device, dtype, config.head_dim)

    def init_weights(self) -> None:
        std = self.c_q.in_features**-0.5
        for module in (self.c_q, self.c_k, self.c_v, self.value_embedding, self.value_gate):
            if module is not None:
                uniform_(module.weight, std)
        nn.init.zeros_(self.c_proj.weight)

    def parameter_groups(self) -> Groups:
        groups: Groups = {"matrices": [m.weight for m in (self.c_q, self.c_k, self.c_v, self.c_proj)]}
        if self.value_embedding is not None:
            groups["value_embeddings"] = [self.value_embedding.weight]
            groups["value_gates"] = [self.value_gate.weight]
        return groups

    def kept(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys and values, (B, T, H, D)."""
        heads = (*x_BTC.shape[:2], self.config.n_head, self.config.head_dim)
        k, v = self.c_k(x_BTC).view(heads), self.c_v(x_BTC).view(heads)
        if self.value_embedding is not None:
            gate = 3 * torch.sigmoid(self.value_gate(x_BTC[..., :GATE_CHANNELS]))
            v = v + gate[..., None] * self.value_embedding(idx_BT).to(v.dtype).view(heads)
        return QK_SCALE * rms_norm(apply_rope(k, rope)), v

    def _queries(self, x_BTC: Tensor, rope: Rope) -> Tensor:
        q = self.c_q(x_BTC).view(*x_BTC.shape[:2], self.config.n_head, self.config.head_dim)
        return QK_SCALE * rms_norm(apply_rope(q, rope))

    def forward(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope, keep: Keep | None = None) -> Tensor:
        q, (k, v) = self._queries(x_BTC, rope), self.kept(x_BTC, idx_BT, rope)
        if keep is not None:
            keep(k, v)
        y = self.backend.attend(q, k, v, window=self.window, scale=self.config.head_dim**-0.5)
        return self.c_proj(y.flatten(2))

    def decode(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope, step: Step) -> Tensor:
        q, kept = self._queries(x_BTC, rope), self.kept(x_BTC, idx_BT, rope)
        seen = [Keys(*span.tensors, span.mask) for span in step.extend(*kept)]
        return self.c_proj(self.decoding.attend(q, seen, self.config.head_dim**-0.5).flatten(2))

    def statistics(self) -> dict[str, Tensor]:
        return {}


class GaussianKernelAttention(nn.Module):
    """Gaussian Kernel Attention (arXiv 2605.02144): no query, key or value projection, one bandwidth per head.

    Bandwidths start at sqrt(D/2), where independent unit features weigh exp(-2) against a token's own 1, and are
    learned as their logarithm, in float32, so that they stay above 0.
    """

    cache_tensors = 1  # the block input serves as keys and as values; a head's squared norm is kept besides

    def __init__(self, config: GPTConfig, index: int):
        super().__init__()
        self.config, self.window = config, config.window(index)
        self.log_sigma = nn.Parameter(torch.empty(config.n_head))
        self.c_proj = Linear(config.n_embd, config.n_embd)

    @property
    def cache_widths(self) -> tuple[int, ...]:
        return (self.config.head_dim, 1)

    def choose_backend(self, device: torch.device, dtype: torch.dtype) -> None:
        config = self.config
        self.backend = gka_backend(device, dtype, config.head_dim, self.window, config.sequence_len, config.gka)
        self.decoding = decode_backend(device, dtype, config.head_dim)

    def init_weights(self) -> None:
        nn.init.constant_(self.log_sigma, 0.5 * math.log(self.config.head_dim / 2))
        nn.init.zeros_(self.c_proj.weight)

    def parameter_groups(self) -> Groups:
        return {"matrices": [self.c_proj.weight], "log_sigma": [self.log_sigma]}

    @property
    def sigma(self) -> Tensor:
        """(H,) bandwidths, in the units of the block input."""
        return self.log_sigma.exp()

    def kept(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope) -> tuple[Tensor, ...]:
        """The block input (with gka.normalize, normalised) alone; rotations are made anew."""
        x = x_BTC.view(*x_BTC.shape[:2], self.config.n_head, self.config.head_dim)
        x = rms_norm(x) if self.config.gka.normalize else x
        return x, x.float().square().sum(dim=-1, keepdim=True)  # a rotation leaves the norm

    def forward(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope, keep: Keep | None = None) -> Tensor:
        if keep is not None:
            keep(*self.kept(x_BTC, idx_BT, rope))
        x_BTHD = x_BTC.view(*x_BTC.shape[:2], self.config.n_head, self.config.head_dim)
        return self.c_proj(self.backend.attend(x_BTHD, self.sigma, rope).flatten(2))

    def decode(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope, step: Step) -> Tensor:
        options = self.config.gka
        x, norm = self.kept(x_BTC, idx_BT, rope)
        seen = []
        for span in step.extend(x, norm):
            (values, norms), mask = span.tensors, span.mask
            if not options.include_self:
                mask = mask.masked_fill(
                    span.positions[:, None, None, :] == step.positions[:, None, :, None], -torch.inf
                )
            rotation = step.rope(span, values.size(-1)) if options.rope else None
            seen.append(Keys(values, values, mask, norms, rotation))
        q = apply_rope(x, rope) if options.rope else x
        return self.c_proj(self.decoding.attend(q, seen, self.sigma.square().reciprocal()).flatten(2))

    def statistics(self) -> dict[str, Tensor]:
        sigma = self.sigma.detach()
        return {"sigma": torch.stack((sigma.min(), sigma.median(), sigma.max()))}


ATTENTION = {"softmax": SoftmaxAttention, "gka": GaussianKernelAttention}
