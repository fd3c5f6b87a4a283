"""The attention layers a model chooses from. One interface:

    layer = ATTENTION[config.attention](config, index)
    layer.choose_backend(device, dtype)
    y_BTC = layer(x_BTC, idx_BT, rope)

x_BTC is the block input after the pre-norm, idx_BT the tokens (None where nothing looks them up), rope the tables for T
positions (None: they are told otherwise). `decode` takes a step of a cache besides, which holds what came before;
`kept` is what a cache holds of these tokens, and `forward` hands it to `keep` where that is given. Each layer knows its
window, initialises itself, sorts its parameters into the groups that the optimizer and the accounts work with, and
tells what is worth watching (`statistics`: numbers by name). `look` is `forward` written down plainly up to c_proj: the
weights themselves, for looking at.
"""

import math

import torch
from torch import Tensor, nn

from gkachat.attention.backends import decode_backend, gka_backend, softmax_backend
from gkachat.attention.cache import Keys, Step
from gkachat.attention.features import NoConv, Rope, ShortConv, apply_rope, rms_norm
from gkachat.attention.fused import softmax_weights
from gkachat.attention.gka_plus import GKAPlus
from gkachat.attention.linear import Groups, Keep, Linear, Look, ValueEmbeddings, uniform_
from gkachat.attention.operator import kernel_weights
from gkachat.config import ATTENTIONS, GPTConfig

QK_SCALE = 1.2  # sharpens the logits of unit queries and keys
TAPS = 4  # of short convolutions


class SoftmaxAttention(ValueEmbeddings):
    """Scaled dot-product attention with rotary positions, normalised queries and keys, and gated value embeddings."""

    cache_tensors = 2  # C numbers each that decoding keeps for a token and layer: keys, values

    def __init__(self, config: GPTConfig, index: int):
        super().__init__(config, index, config.uses_value_embeddings)
        C = config.n_embd
        self.config, self.window = config, config.window(index)
        self.c_q, self.c_k, self.c_v, self.c_proj = (Linear(C, C) for _ in range(4))
        self.convs = nn.ModuleList(
            ShortConv(config.n_head, config.head_dim, TAPS) if config.short_conv else NoConv(1) for _ in range(3)
        )

    @property
    def cache_widths(self) -> tuple[int, ...]:
        return (self.config.head_dim, self.config.head_dim)

    @property
    def cache_recent(self) -> tuple[int, int]:
        return (3, TAPS) if self.config.short_conv else (0, 1)

    def choose_backend(self, device: torch.device, dtype: torch.dtype) -> None:
        config = self.config
        self.backend = softmax_backend(device, dtype, config.head_dim, self.window, config.sequence_len, config.causal)
        self.decoding = decode_backend(device, dtype, config.head_dim)

    def init_weights(self) -> None:
        std = self.c_q.in_features**-0.5
        for module in (self.c_q, self.c_k, self.c_v):
            uniform_(module.weight, std)
        self.init_value_embedding()
        if self.config.short_conv:
            for conv, delays in zip(self.convs, ((0,), range(1, TAPS), (0,)), strict=True):
                conv.init_weights(delays)  # as gka_plus has them
        nn.init.zeros_(self.c_proj.weight)

    def parameter_groups(self) -> Groups:
        groups: Groups = {"matrices": [m.weight for m in (self.c_q, self.c_k, self.c_v, self.c_proj)]}
        if self.config.short_conv:
            groups["convolutions"] = [conv.weight for conv in self.convs]
        return groups | self.value_groups()

    def _projected(self, x_BTC: Tensor) -> list[Tensor]:
        heads = (*x_BTC.shape[:2], self.config.n_head, self.config.head_dim)
        return [c(x_BTC).view(heads) for c in (self.c_q, self.c_k, self.c_v)]

    def _compared(self, q: Tensor, k: Tensor, v: Tensor, x_BTC: Tensor, idx_BT: Tensor, rope: Rope) -> list[Tensor]:
        v = self.add_value_embedding(v, x_BTC, idx_BT)
        return [*(QK_SCALE * rms_norm(apply_rope(t, rope)) for t in (q, k)), v]

    def kept(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []
        self._attended(x_BTC, idx_BT, rope, lambda *tensors: kept.extend(tensors))
        return tuple(kept)

    def _attended(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope, keep: Keep | None) -> list[Tensor]:
        projected = self._projected(x_BTC)
        convolved = [conv(t) for conv, t in zip(self.convs, projected, strict=True)]
        q, k, v = self._compared(*convolved, x_BTC, idx_BT, rope)
        if keep is not None:
            keep(k, v, *(projected if self.config.short_conv else ()))
        return [q, k, v]

    def forward(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope, keep: Keep | None = None) -> Tensor:
        q, k, v = self._attended(x_BTC, idx_BT, rope, keep)
        y = self.backend.attend(q, k, v, window=self.window, scale=self.config.head_dim**-0.5)
        return self.c_proj(y.flatten(2))

    def decode(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope, step: Step) -> Tensor:
        projected = self._projected(x_BTC)
        recent = step.look_back(*projected) if self.config.short_conv else projected
        convolved = [conv.of(t) for conv, t in zip(self.convs, recent, strict=True)]
        q, k, v = self._compared(*convolved, x_BTC, idx_BT, rope)
        seen = [Keys(*span.tensors, span.mask) for span in step.extend(k, v)]
        return self.c_proj(self.decoding.attend(q, seen, self.config.head_dim**-0.5).flatten(2))

    def look(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope) -> Look:
        q, k, v = self._attended(x_BTC, idx_BT, rope, None)
        scale, causal = self.config.head_dim**-0.5, self.config.causal
        return Look(softmax_weights(q, k, window=self.window, scale=scale, causal=causal), v, None)

    def statistics(self) -> dict[str, Tensor]:
        return {}


class GaussianKernelAttention(nn.Module):
    """Gaussian Kernel Attention (arXiv 2605.02144): no query, key or value projection, one bandwidth per head.

    Bandwidths start at sqrt(D/2), where independent unit features weigh exp(-2) against a token's own 1, and are
    learned as their logarithm, in float32, so that they stay above 0.
    """

    cache_tensors = 1  # the block input serves as keys and as values; a head's squared norm is kept besides
    cache_recent = (0, 1)

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
        self.backend = gka_backend(
            device, dtype, config.head_dim, self.window, config.sequence_len, config.gka, config.causal
        )
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

    def look(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope) -> Look:
        (x, _), options = self.kept(x_BTC, idx_BT, rope), self.config.gka
        rotation = rope if options.rope else None
        weights, distances = kernel_weights(
            x, self.sigma, self.window, self.config.causal, rotation, options.include_self
        )
        return Look(weights, x, distances)

    def statistics(self) -> dict[str, Tensor]:
        sigma = self.sigma.detach()
        return {"sigma": torch.stack((sigma.min(), sigma.median(), sigma.max())), "sigma_by_head": sigma}


ATTENTION = {"softmax": SoftmaxAttention, "gka": GaussianKernelAttention, "gka_plus": GKAPlus}


def register(name: str, layer: type[nn.Module]) -> None:
    """Let configs name one more attention (docs/attention.md). ValueError for a name that is taken."""
    if name in ATTENTION:
        raise ValueError(f"attention {name!r}: there is one already, expected another name than {', '.join(ATTENTION)}")
    ATTENTION[name] = layer
    ATTENTIONS[name] = f"{layer.__module__}:{layer.__qualname__}"
