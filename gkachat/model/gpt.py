"""The GPT, in reading order: MLP, block, and the model with its embedding and head.

    model = GPT(GPTConfig(depth=4, attention="gka", vocab_size=4096, sequence_len=256))
    loss = model(idx, targets)

The model is nanochat's (commit 92d63d4): a pre-norm transformer with parameter-free RMSNorm (also after the embedding),
a relu^2 MLP, no biases, and an untied head with soft-capped logits. Each embedding gets a share of the previous one
(smear). In front of each block, the residual stream and the embedding are added again, each times a learned scalar. At
the end, a share of the residual stream after the middle layer is subtracted (backout). The config names the attention.
With `attention_x0`, the default of gka_conv, attention after the first layer reads the embedding too.
Weights stay in float32; activations have `compute_dtype`.
Axes: B batch, T time, C channels, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gkachat.attention import attention_class
from gkachat.attention.base import Groups
from gkachat.attention.cache import Cache, CacheStep, LayerCache, LayerCacheSpec
from gkachat.attention.features import Rope, rms_norm, rope_at, rope_table
from gkachat.attention.linear import Embedding, Linear, uniform_
from gkachat.config import GPTConfig
from gkachat.model.loss import LOGIT_CAP, choose_head_loss, soft_cap


class Smear(nn.Module):
    """Adds a share of the previous token's embedding to each token's, gated by sigmoid(W x[:24])."""

    GATE_CHANNELS = 24

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = Linear(min(self.GATE_CHANNELS, config.n_embd), 1)
        self.share = nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        """Start without any smear: the share is 0."""
        nn.init.uniform_(self.gate.weight, 0.0, 0.02)
        nn.init.zeros_(self.share)

    def forward(self, x_BTC: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Return the smeared embeddings. With a cache, the embedding before the new tokens comes from it."""
        with_past_BTC = F.pad(x_BTC, (0, 0, 1, 0)) if cache is None else cache.with_lookback(x_BTC)
        gate_BT1 = self.share.to(x_BTC.dtype) * torch.sigmoid(self.gate(x_BTC[..., : self.gate.weight.size(1)]))
        return x_BTC + gate_BT1 * with_past_BTC[:, :-1]


def squared_relu(x: Tensor) -> Tensor:
    """Return relu(x)^2."""
    return _SquaredReLU.apply(x)


class _SquaredReLU(torch.autograd.Function):
    """Squared ReLU whose backward is one product. Autograd would make four passes over the widest tensor of a block."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.addcmul(dy.new_zeros(()), dy, positive, value=2)


class MLP(nn.Module):
    """Two matrices with a squared ReLU between them, 4 C wide."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def init_weights(self) -> None:
        """Fill the first matrix uniformly, with standard deviation 0.4 / sqrt(C); the second is zero."""
        uniform_(self.c_fc.weight, 0.4 * self.c_fc.in_features**-0.5)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.c_proj(squared_relu(self.c_fc(x_BTC)))


class Block(nn.Module):
    """Attention and MLP, each on the normalised residual stream and added to it. Attention may read the embedding."""

    def __init__(self, config: GPTConfig, index: int):
        super().__init__()
        self.attn = attention_class(config.attention)(config, index)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTC: Tensor,
        idx_BT: Tensor | None,
        rope: Rope | None,
        cache: LayerCache | None = None,
        x0_BTC: Tensor | None = None,
    ) -> Tensor:
        x_BTC = x_BTC + self.attn(rms_norm(x_BTC), idx_BT, rope, cache, x0_BTC)
        return x_BTC + self.mlp(rms_norm(x_BTC))


class Transformer(nn.Module):
    """Base class of GPT and ViT, which consist of these blocks. Subclasses set `self.blocks`."""

    def __init__(self) -> None:
        super().__init__()
        self.recompute_blocks = False  # activation checkpointing: recompute each block in the backward

    def prepare(self, compute_dtype: torch.dtype) -> None:
        """Choose the attention kernels, which depend on dtype and device."""
        self.compute_dtype, device = compute_dtype, next(self.parameters()).device
        for block in self.blocks:
            block.attn.choose_kernels(device, compute_dtype)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Transformer":
        """Call `prepare` after .to(), .cuda() and the like, so that kernels and tables follow the weights."""
        super()._apply(fn, recurse)
        self.prepare(self.compute_dtype)
        return self

    def kernels(self) -> dict[str, list[int]]:
        """Return {"kernel (reason)": indices of the layers that use it}."""
        layers: dict[str, list[int]] = {}
        for index, block in enumerate(self.blocks):
            for kernel in block.attn.kernel_lines():
                layers.setdefault(kernel, []).append(index)
        return layers

    def kernel_lines(self) -> list[str]:
        """Return a line for each kernel that was chosen: what it computes, its name and the reason."""
        return [f"layers {', '.join(map(str, layers))}: {kernel}" for kernel, layers in self.kernels().items()]

    def statistics(self) -> dict[str, list[list[float]]]:
        """Return what the attention layers log, by name, one row per layer."""
        found: dict[str, list[Tensor]] = {}
        for block in self.blocks:
            for name, values in block.attn.statistics().items():
                found.setdefault(name, []).append(values)
        return {name: torch.stack(values).tolist() for name, values in found.items()}

    def parameter_groups(self) -> Groups:
        """Return every parameter once, by the group that decides its optimizer and learning rate."""
        groups = self._outer_groups()
        for block in self.blocks:
            groups["matrices"] += [block.mlp.c_fc.weight, block.mlp.c_proj.weight]
            for name, parameters in block.attn.parameter_groups().items():
                groups.setdefault(name, []).extend(parameters)
        assert sum(map(len, groups.values())) == len(list(self.parameters())), "a parameter belongs to no group"
        return groups

    def _run_block(self, block: Block, *inputs: Tensor | Rope | LayerCache | None) -> Tensor:
        if self.recompute_blocks:
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)


class GPT(Transformer):
    """Autoregressive transformer. It can be built on any device; torch's seed determines the weights.

    On the "meta" device nothing is computed: that would take torch seconds, to import its compiler.
    """

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.residual_scale = nn.Parameter(torch.empty(config.depth))
        self.x0_mix = nn.Parameter(torch.empty(config.depth))
        self.smear = Smear(config) if config.smear else None
        self.backout = nn.Parameter(torch.empty(1)) if config.backout_layer is not None else None
        self.prepare(compute_dtype)
        if not self.wte.weight.is_meta:
            self.init_weights()

    def prepare(self, compute_dtype: torch.dtype) -> None:
        """Choose the attention kernels and the head's loss, and compute the rotation tables."""
        super().prepare(compute_dtype)
        self.head_loss = choose_head_loss(self.wte.weight.device, compute_dtype)
        if self.wte.weight.is_meta:
            return
        cos, sin = rope_table(self.config.sequence_len, self.config.head_dim, self.wte.weight.device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize every weight. Each block starts as the identity, since its output projections are zero."""
        nn.init.normal_(self.wte.weight, std=0.8)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        self.residual_scale.copy_(torch.linspace(1.15, 1.05, self.config.depth))
        self.x0_mix.copy_(torch.linspace(0.20, 0.05, self.config.depth))
        if self.smear is not None:
            self.smear.init_weights()
        if self.backout is not None:
            nn.init.constant_(self.backout, 0.2)
        for block in self.blocks:
            block.attn.init_weights()
            block.mlp.init_weights()

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: CacheStep | None = None,
        logits_to_keep: int | None = None,
    ) -> Tensor:
        """Return logits (B, T, V) in float32, or with targets (B, T) the mean loss in nats over those that are not -1.

        Args:
            idx: (B, T) token ids.
            cache: step of a cache that holds the tokens before idx (`make_cache(...).step(...)`). The step adds idx.
            logits_to_keep: compute the logits of this many last tokens; None: of all.

        Raises:
            ValueError: idx is longer than sequence_len.
        """
        T = idx.size(1)
        if cache is not None:
            rope = rope_at(cache.positions, self.config.head_dim)
        elif self.config.sequence_len < T:
            raise ValueError(f"idx: given {T} tokens, expected at most sequence_len {self.config.sequence_len}")
        else:
            rope = (self.cos[:T], self.sin[:T])
        x_BTC = rms_norm(self.wte(idx).to(self.compute_dtype))
        if self.smear is not None:
            x_BTC = self.smear(x_BTC, None if cache is None else cache.layer(self.config.depth))
        x0_BTC = x_BTC
        for index, block in enumerate(self.blocks):
            scale, mix = self.residual_scale[index].to(x_BTC.dtype), self.x0_mix[index].to(x_BTC.dtype)
            x_BTC = scale * x_BTC + mix * x0_BTC
            x_BTC = self._run_block(block, x_BTC, idx, rope, None if cache is None else cache.layer(index), x0_BTC)
            if index == self.config.backout_layer:
                middle_BTC = x_BTC
        if self.backout is not None:
            x_BTC = x_BTC - self.backout.to(x_BTC.dtype) * middle_BTC
        if logits_to_keep is not None:
            x_BTC = x_BTC[:, T - logits_to_keep :]
        x_BTC = rms_norm(x_BTC)
        if targets is None:
            # Dividing by the cap takes C numbers per token here, and V in the logits.
            return soft_cap(self.lm_head(x_BTC / LOGIT_CAP))
        return self.head_loss.compute(x_BTC.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def kernel_lines(self) -> list[str]:
        return [*super().kernel_lines(), f"head loss: {self.head_loss.name} ({self.head_loss.reason})"]

    def make_cache(self, rows: int, length: int, **options) -> Cache:
        """Return an empty cache for this model; the options are those of Cache."""
        specs, device = [block.attn.cache_spec for block in self.blocks], self.wte.weight.device
        if self.smear is not None:
            specs.append(LayerCacheSpec(lookback=1))
        return Cache(self.config, specs, rows, length, dtype=self.compute_dtype, device=device, **options)

    def example_batch(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the largest shape that training uses."""
        idx = torch.zeros(rows, self.config.sequence_len, dtype=torch.long, device=self.wte.weight.device)
        return idx, idx

    def _outer_groups(self) -> Groups:
        groups = {
            "embedding": [self.wte.weight],
            "lm_head": [self.lm_head.weight],
            "matrices": [],
            "residual_scale": [self.residual_scale],
            "x0_mix": [self.x0_mix],
        }
        if self.smear is not None:
            groups["smear"] = [self.smear.gate.weight, self.smear.share]
        if self.backout is not None:
            groups["backout"] = [self.backout]
        return groups
