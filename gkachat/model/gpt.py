"""The model: embedding, blocks of attention and MLP, head. Which attention is decided once, when it is built.

    model = GPT(GPTConfig(depth=4, attention="gka", vocab_size=4096, sequence_len=256))
    loss = model(idx, targets)

Pre-norm transformer with parameter-free RMSNorm (also after the embedding), relu^2 MLP, no biases, an untied head with
soft-capped logits, and two learned scalars a layer: how much of the residual stream goes on, how much of the embedding
is mixed in again. Weights are kept in float32; activations flow in `compute_dtype`.
Axes: B batch, T time, C channels, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gkachat.attention.cache import Cache, Step
from gkachat.attention.features import Rope, rms_norm, rope_at, rope_table
from gkachat.attention.layers import ATTENTION
from gkachat.attention.linear import Groups, Keep, Linear, uniform_
from gkachat.config import GKAConfig, GPTConfig
from gkachat.model.loss import LOGIT_CAP, cap, capped_logits, head_loss

__all__ = ["GPT", "GKAConfig", "GPTConfig"]


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def init_weights(self) -> None:
        uniform_(self.c_fc.weight, 0.4 * self.c_fc.in_features**-0.5)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x_BTC)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, index: int):
        super().__init__()
        self.attn = ATTENTION[config.attention](config, index)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, idx_BT: Tensor | None, rope: Rope | None, keep: Keep | None = None) -> Tensor:
        x_BTC = x_BTC + self.attn(rms_norm(x_BTC), idx_BT, rope, keep)
        return x_BTC + self.mlp(rms_norm(x_BTC))

    def decode(self, x_BTC: Tensor, idx_BT: Tensor, rope: Rope, step: Step) -> Tensor:
        x_BTC = x_BTC + self.attn.decode(rms_norm(x_BTC), idx_BT, rope, step)
        return x_BTC + self.mlp(rms_norm(x_BTC))


class Transformer(nn.Module):
    """What models of such blocks share, whatever goes in and comes out: `self.blocks`, and what these run on."""

    def __init__(self) -> None:
        super().__init__()
        self.recompute_blocks = False  # in the backward, instead of keeping what is inside them

    def prepare(self, compute_dtype: torch.dtype) -> None:
        """Everything that follows from dtype and device: the kernels that attention runs on."""
        self.compute_dtype, device = compute_dtype, next(self.parameters()).device
        for block in self.blocks:
            block.attn.choose_backend(device, compute_dtype)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Transformer":
        """What .to() and its like run: kernels and tables follow the weights."""
        super()._apply(fn, recurse)
        self.prepare(self.compute_dtype)
        return self

    def backends(self) -> dict[str, list[int]]:
        """What attention runs on and why, and in which layers."""
        layers: dict[str, list[int]] = {}
        for index, block in enumerate(self.blocks):
            layers.setdefault(f"{block.attn.backend.name} ({block.attn.backend.reason})", []).append(index)
        return layers

    def statistics(self) -> dict[str, list[list[float]]]:
        """Least, median and largest of what each layer's attention finds worth watching, a row a layer."""
        found: dict[str, list[Tensor]] = {}
        for block in self.blocks:
            for name, values in block.attn.statistics().items():
                found.setdefault(name, []).append(values)
        return {name: torch.stack(values).tolist() for name, values in found.items()}

    def parameter_groups(self) -> Groups:
        """All parameters by what they are: what the optimizer tells apart and the accounts list."""
        groups = self._outer_groups()
        for block in self.blocks:
            groups["matrices"] += [block.mlp.c_fc.weight, block.mlp.c_proj.weight]
            for name, parameters in block.attn.parameter_groups().items():
                groups.setdefault(name, []).extend(parameters)
        assert sum(map(len, groups.values())) == len(list(self.parameters())), "a parameter belongs to no group"
        return groups

    def _through(self, block: Block, *inputs: Tensor | Rope | None) -> Tensor:
        if self.recompute_blocks:
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)


class GPT(Transformer):
    """Autoregressive transformer. Builds on any device, also `torch.device("meta")`; weights follow torch's seed."""

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.residual_scale = nn.Parameter(torch.empty(config.depth))
        self.x0_mix = nn.Parameter(torch.empty(config.depth))
        self.prepare(compute_dtype)
        self.init_weights()

    def prepare(self, compute_dtype: torch.dtype) -> None:
        """Rotation tables besides."""
        super().prepare(compute_dtype)
        cos, sin = rope_table(self.config.sequence_len, self.config.head_dim, self.wte.weight.device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every block starts as the identity: output projections are zero."""
        nn.init.normal_(self.wte.weight, std=0.8)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        self.residual_scale.copy_(torch.linspace(1.15, 1.05, self.config.depth))
        self.x0_mix.copy_(torch.linspace(0.20, 0.05, self.config.depth))
        for block in self.blocks:
            block.attn.init_weights()
            block.mlp.init_weights()

    def _outer_groups(self) -> Groups:
        return {
            "embedding": [self.wte.weight],
            "lm_head": [self.lm_head.weight],
            "matrices": [],
            "residual_scale": [self.residual_scale],
            "x0_mix": [self.x0_mix],
        }

    def example_batch(self, rows: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the largest shape there is."""
        idx = torch.zeros(rows, self.config.sequence_len, dtype=torch.long, device=self.wte.weight.device)
        return idx, idx

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) in float32, or with targets (B, T) the mean loss in nats over those that are not -1.

        Raises ValueError when idx is longer than sequence_len.
        """
        T = idx.size(1)
        if self.config.sequence_len < T:
            raise ValueError(f"idx: given {T} tokens, expected at most sequence_len {self.config.sequence_len}")
        rope = (self.cos[:T], self.sin[:T])
        x_BTC = x0_BTC = rms_norm(self.wte(idx).to(self.compute_dtype))
        for index, block in enumerate(self.blocks):
            x_BTC = self._through(block, self._mixed(index, x_BTC, x0_BTC), idx, rope)
        x_BTC = rms_norm(x_BTC)
        if targets is None:
            return capped_logits(x_BTC, self.lm_head.weight)
        return head_loss(x_BTC.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def _mixed(self, index: int, x_BTC: Tensor, x0_BTC: Tensor) -> Tensor:
        """The residual stream as a block is given it."""
        scale, mix = self.residual_scale[index].to(x_BTC.dtype), self.x0_mix[index].to(x_BTC.dtype)
        return scale * x_BTC + mix * x0_BTC

    def make_cache(self, rows: int, length: int, **options) -> Cache:
        """For `decode`; see Cache for the options."""
        attention, device = self.blocks[0].attn, self.wte.weight.device
        return Cache(
            self.config, attention.cache_widths, attention.cache_recent, rows, length,
            dtype=self.compute_dtype, device=device, **options,
        )  # fmt: skip

    def prefill(self, idx: Tensor, cache: Cache) -> None:
        """Read idx (B, T) into a new cache of B rows, made with `block` as long as `length`, with `forward`'s kernels.

        Gives no logits, and so spares the last block all but what is kept of it. Where texts were padded at their end,
        set cache.lengths[row] to their own lengths afterwards: what lies beyond is not seen, and written over.
        """
        T = idx.size(1)
        rope = (self.cos[:T], self.sin[:T])
        x_BTC = x0_BTC = rms_norm(self.wte(idx).to(self.compute_dtype))
        for index, (block, buffers) in enumerate(zip(self.blocks, cache.layers, strict=True)):

            def keep(*tensors: Tensor, buffers: list[Tensor] = buffers) -> None:
                for buffer, tensor in zip(buffers, tensors, strict=True):
                    buffer[:, :, :T] = tensor.transpose(1, 2)

            x_BTC = self._mixed(index, x_BTC, x0_BTC)
            if index < self.config.depth - 1:
                x_BTC = block(x_BTC, idx, rope, keep)
            else:
                keep(*block.attn.kept(rms_norm(x_BTC), idx, rope))
        for row in range(idx.size(0)):
            cache.lengths[row] = T

    def decode(self, idx: Tensor, cache: Cache, rows: slice, every: bool = False) -> Tensor:
        """Go on with some rows of a cache by T tokens each, idx (B, T).

        Returns the logits of the last of them, (B, V) in float32; with `every` of all, (B, T, V).
        """
        return self.decode_step(idx, cache.step(rows, idx.size(1)), every)

    def decode_step(self, idx: Tensor, step: Step, every: bool = False) -> Tensor:
        """The same for a step that the cache was asked for before."""
        rope = rope_at(step.positions, self.config.head_dim)
        x_BTC = x0_BTC = rms_norm(self.wte(idx).to(self.compute_dtype))
        for index, block in enumerate(self.blocks):
            x_BTC = block.decode(self._mixed(index, x_BTC, x0_BTC), idx, rope, step)
        return cap(self.lm_head(rms_norm(x_BTC if every else x_BTC[:, -1]) / LOGIT_CAP))
