"""A vision transformer (DeiT, arXiv 2012.12877) of the language model's blocks, whose attention sees the whole image.

    model = ViT(ViTConfig(attention="gka", image_size=8, patch_size=2, colours=1, classes=10))
    loss = model(images, classes)

A matrix embeds each patch, a class token goes in front, learned positions are added, and the head reads the class token
after the last block. Blocks are those of gpt.py: RMSNorm without parameters, relu^2, no biases.
Axes: B batch, T patches and class token, C channels, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkachat.attention.base import Groups
from gkachat.attention.features import rms_norm
from gkachat.attention.linear import Linear, uniform_
from gkachat.model.gpt import Block, Transformer
from gkachat.model.stats import ModelStats
from gkachat.vision_config import ViTConfig


class ViT(Transformer):
    """Image classifier. Builds on any device, also `torch.device("meta")`; torch's seed decides the weights."""

    def __init__(self, config: ViTConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.label_smoothing = config, 0.0
        C = config.n_embd
        self.patches = Linear(config.colours * config.patch_size**2, C)
        self.class_token = nn.Parameter(torch.empty(C))
        self.positions = nn.Parameter(torch.empty(config.sequence_len, C))
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.head = Linear(C, config.classes)
        self.prepare(compute_dtype)
        if not self.positions.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw initial weights. Every block starts as the identity."""
        uniform_(self.patches.weight, self.patches.in_features**-0.5)
        nn.init.normal_(self.class_token, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.head.weight, std=0.001)
        for block in self.blocks:
            block.attn.init_weights()
            block.mlp.init_weights()

    def _outer_groups(self) -> Groups:
        positions = [self.positions, self.class_token]
        return {"matrices": [self.patches.weight], "positions": positions, "lm_head": [self.head.weight]}

    def example_batch(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return images and targets of the largest shape, to measure memory with."""
        config, device = self.config, self.positions.device
        images = torch.zeros(rows, config.colours, config.image_size, config.image_size, device=device)
        return images, torch.full((rows, config.classes), 1 / config.classes, device=device)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits (B, K) in float32, or with targets the mean cross-entropy in nats.

        Args:
            images: (B, colours, image_size, image_size).
            targets: classes (B,), or probabilities of classes (B, K).

        Raises ValueError for images of another shape.
        """
        config, (B, *shape) = self.config, images.shape
        if shape != [config.colours, config.image_size, config.image_size]:
            raise ValueError(f"images: given {shape}, expected {config.colours} x {config.image_size} squared each")
        P, n = config.patch_size, config.image_size // config.patch_size
        patches = images.to(self.compute_dtype).view(B, config.colours, n, P, n, P).permute(0, 2, 4, 1, 3, 5)
        x_BTC = self.patches(patches.reshape(B, n * n, -1))
        x_BTC = torch.cat((self.class_token.to(x_BTC.dtype).expand(B, 1, -1), x_BTC), dim=1)
        x_BTC = x_BTC + self.positions.to(x_BTC.dtype)
        for index, block in enumerate(self.blocks):
            # Stochastic depth (arXiv 1603.09382), linear in depth. Kept blocks grow by 1 / (1 - p): equal mean.
            dropped = config.drop_path * index / max(1, config.depth - 1) if self.training else 0.0
            after_BTC = self._run_block(block, x_BTC, None, None)
            if dropped:
                kept_B11 = (torch.rand(B, 1, 1, device=x_BTC.device) >= dropped).to(x_BTC.dtype) / (1 - dropped)
                after_BTC = x_BTC + kept_B11 * (after_BTC - x_BTC)
            x_BTC = after_BTC
        logits_BK = self.head(rms_norm(x_BTC[:, 0])).float()
        if targets is None:
            return logits_BK
        return F.cross_entropy(logits_BK, targets, label_smoothing=self.label_smoothing)


def model_stats(config: ViTConfig) -> ModelStats:
    """Count parameters and training FLOPs, as model.stats does for language models. Nothing is allocated.

    A token is a patch or the class token. The head's FLOPs, spent once an image, are spread over its tokens.
    """
    with torch.device("meta"):
        model = ViT(config)
    groups = {name: sum(p.numel() for p in group) for name, group in model.parameter_groups().items()}
    T = config.sequence_len
    return ModelStats(
        params={"total": sum(groups.values()), **groups},
        flops_per_token=round(6 * (groups["matrices"] + groups["lm_head"] / T) + 12 * config.n_embd * T * config.depth),
        cache_bytes_per_token=0,
    )
