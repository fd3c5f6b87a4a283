"""What decoding keeps of the tokens so far, and attention to it.

A cache has rows, each a text with a length of its own. A layer keeps a buffer (rows, H, slots, width) for each of its
`cache_widths`: D, or 1 for numbers in float32. Position p lies in slot p % slots: a layer with a window keeps no more
than that window and a block of new tokens. A cache can go on from a prefix, a cache of one row that all rows share
without a copy.
Axes: B rows, T new tokens, K cached ones, H heads, D head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gkachat.attention.features import Rope, rope_at
from gkachat.config import GPTConfig


@dataclass
class Span:
    """Cached tokens that the new ones may look at."""

    tensors: list[Tensor]
    """Each (B, H, K, width), or (1, H, K, width) where all rows share them."""
    positions: Tensor
    """(B or 1, K)"""
    mask: Tensor
    """(B, 1, T, K): what is added to scores, 0 or minus infinity."""


class Cache:
    """Of all layers of a model."""

    def __init__(
        self,
        config: GPTConfig,
        widths: Sequence[int],
        rows: int,
        length: int,
        *,
        block: int,
        slide: bool = False,
        prefix: "Cache | None" = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        """Room for `rows` texts of `length` tokens each, the prefix not counted, of which `block` are added at a time.

        `slide`: what sees all of the past sees the last sequence_len tokens instead, and there is no end.
        """
        self.prefix, self.block, self.device = prefix, block, device
        self.first = 0 if prefix is None else prefix.lengths[0]  # position of a row's first token here
        self.lengths = [self.first] * rows
        self.windows = [config.window(layer) for layer in range(config.depth)]
        if slide:
            self.windows = [window or config.sequence_len for window in self.windows]
        self.layers = [
            [
                torch.zeros(
                    rows, config.n_head, slots, width, dtype=torch.float32 if width == 1 else dtype, device=device
                )
                for width in widths
            ]
            for slots in (min(length, window + block - 1) if window else length for window in self.windows)
        ]

    @property
    def n_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def step(self, rows: slice, n_new: int) -> "Step":
        """Make place for `n_new` tokens in each of the rows; they count from now on."""
        if n_new > self.block:
            raise ValueError(f"given {n_new} tokens at once, expected at most {self.block}")
        step = Step(self, rows, n_new)
        for row in range(*rows.indices(len(self.lengths))):
            self.lengths[row] += n_new
        return step

    def move(self, source: int, target: int) -> None:
        """Put one row in the place of another."""
        for layer in self.layers:
            for tensor in layer:
                tensor[target] = tensor[source]
        self.lengths[target] = self.lengths[source]


class Step:
    """New tokens of some rows on their way through the layers."""

    def __init__(self, cache: Cache, rows: slice, n_new: int):
        self.cache, self.rows, self.index = cache, rows, 0
        before = cache.lengths[rows]
        self.longest = max(before) + n_new - cache.first
        self.before = torch.tensor(before, device=cache.device)
        self.positions = self.before[:, None] + torch.arange(n_new, device=cache.device)  # (B, T)
        self._seen: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._ropes: dict[int, Rope] = {}

    def rope(self, span: Span, head_dim: int) -> Rope:
        """Tables (B or 1, 1, K, D/2) for a span's positions, made once for all layers that share them."""
        key = id(span.positions)
        if key not in self._ropes:
            self._ropes[key] = rope_at(span.positions[:, None], head_dim)
        return self._ropes[key]

    def extend(self, *new: Tensor) -> list[Span]:
        """Keep the next layer's new tensors, each (B, T, H, width), and give all that they may look at."""
        cache, layer = self.cache, self.index
        self.index += 1
        buffers, window = cache.layers[layer], cache.windows[layer]
        spans, slots = [], buffers[0].size(2)
        rows = torch.arange(len(cache.lengths), device=cache.device)[self.rows, None]
        for buffer, tensor in zip(buffers, new, strict=True):
            buffer[rows, :, (self.positions - cache.first) % slots] = tensor
        if cache.prefix is not None:
            prefix = cache.prefix
            kept = min(prefix.layers[layer][0].size(2), prefix.lengths[0])
            positions, mask = self._look(window, kept, prefix.first, prefix.lengths)
            spans.append(Span([tensor[:, :, :kept] for tensor in prefix.layers[layer]], positions, mask))
        kept = min(slots, self.longest)
        positions, mask = self._look(window, slots, cache.first, None, kept)
        spans.append(Span([tensor[self.rows, :, :kept] for tensor in buffers], positions, mask))
        return spans

    def _look(
        self, window: int | None, slots: int, first: int, lengths: Sequence[int] | None, kept: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Positions in the first `kept` slots of a buffer, and the mask that hides what a new token does not see."""
        key = (window, slots, lengths is None)
        if key not in self._seen:  # the same for all layers of a window
            slot = torch.arange(slots if kept is None else kept, device=self.cache.device)
            if lengths is None:
                newest = self.positions[:, -1:] - first
            else:
                newest = torch.tensor([[lengths[0] - first - 1]], device=self.cache.device)
            positions = newest - (newest - slot) % slots + first  # the latest that fell into a slot
            distance = self.positions[:, :, None] - positions[:, None, :]
            visible = (distance >= 0) & (positions >= first)[:, None, :]
            if window is not None:
                visible &= distance < window
            mask = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -torch.inf)
            self._seen[key] = positions, mask[:, None]
        return self._seen[key]


def attend(q: Tensor, spans: Sequence[tuple[Tensor, Tensor, Tensor]], scale: float) -> Tensor:
    """Softmax attention of new tokens to spans.

    Args:
        q: (B, T, H, D).
        spans: keys, values (B or 1, H, K, D) and what is added to the scores, (B, 1 or H, T, K).

    Returns (B, T, H, D); 0 for a token that sees nothing.
    """
    B, T, H, D = q.shape
    q = q.transpose(1, 2)
    scores = []
    for k, _, add in spans:
        if k.size(0) < B:  # one product for all rows
            shared = q.transpose(0, 1).reshape(H, B * T, D) @ k[0].mT
            products = shared.view(H, B, T, -1).transpose(0, 1)
        else:
            products = q @ k.mT
        scores.append(products.float() * scale + add)
    together = torch.cat(scores, dim=-1) if len(scores) > 1 else scores[0]
    highest = together.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (together - highest).exp()
    weights = (weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).to(q.dtype)
    y = 0
    for part, (_, v, _) in zip(weights.split([score.size(-1) for score in scores], dim=-1), spans, strict=True):
        if v.size(0) < B:
            y = y + (part.transpose(0, 1).reshape(H, B * T, -1) @ v[0]).view(H, B, T, D).transpose(0, 1)
        else:
            y = y + part @ v
    return y.transpose(1, 2)
