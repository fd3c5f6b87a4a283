"""What decoding keeps of the tokens so far, and attention to it.

A cache has rows, each a text with a length of its own. A layer keeps a buffer (rows, H, slots, width) for each of its
`cache_widths`: D, or 1 for numbers in float32; and, of as many tensors as `cache_recent` says, the last few tokens.
Position p lies in slot p % slots: a layer with a window keeps no more than that window and a block of new tokens. A
cache can go on from a prefix, a cache of one row that all rows share without a copy.
Axes: B rows, T new tokens, K cached ones, H heads, D head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gkachat.attention.features import Rope, rope_at, rotate
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
    key: tuple
    """Spans of the same one have the same positions and mask."""


@dataclass
class Keys:
    """What `attend` makes of a span."""

    keys: Tensor
    """(B or 1, H, K, D)"""
    values: Tensor
    """The same shape; where keys and values are one, the same object."""
    mask: Tensor
    """(B, 1, T, K)"""
    norms: Tensor | None = None
    """(B or 1, H, K, 1), float32: squared lengths of the keys, half of which is taken from their products."""
    rope: Rope | None = None
    """Tables (B or 1, 1, K, D/2) that the keys are yet to be rotated with."""


class Cache:
    """Of all layers of a model."""

    def __init__(
        self,
        config: GPTConfig,
        widths: Sequence[int],
        recent: tuple[int, int],
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

        `recent`: how many tensors are kept of how many last tokens. `slide`: what sees all of the past sees the last
        sequence_len tokens instead, and there is no end.
        """
        self.prefix, self.block, self.device = prefix, block, device
        self.first = 0 if prefix is None else prefix.lengths[0]  # position of a row's first token here
        self.lengths = [self.first] * rows
        self.windows = [config.window(layer) for layer in range(config.depth)]
        if slide:
            self.windows = [window or config.sequence_len for window in self.windows]
        self.recent, self.taps = recent

        def buffer(width: int, slots: int) -> Tensor:
            kind = torch.float32 if width == 1 else dtype
            return torch.zeros(rows, config.n_head, slots, width, dtype=kind, device=device)

        few = length if block >= length else min(length, self.taps)  # all that is read at once: texts may end anywhere
        self.layers = [
            [
                *(buffer(width, min(length, window + block - 1) if window else length) for width in widths),
                *(buffer(config.head_dim, few) for _ in range(self.recent)),
            ]
            for window in self.windows
        ]

    @property
    def n_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def step(self, rows: slice, n_new: int) -> "Step":
        """Make place for `n_new` tokens in each of the rows; they count from now on."""
        if n_new > self.block:
            raise ValueError(f"given {n_new} tokens at once, expected at most {self.block}")
        before = self.lengths[rows]
        for row in range(*rows.indices(len(self.lengths))):
            self.lengths[row] += n_new
        longest = max(before) + n_new - self.first
        return Step(self, rows, torch.tensor(before, device=self.device), n_new, longest)

    def move(self, source: int, target: int) -> None:
        """Put one row in the place of another."""
        for layer in self.layers:
            for tensor in layer:
                tensor[target] = tensor[source]
        self.lengths[target] = self.lengths[source]


class Step:
    """New tokens of some rows on their way through the layers."""

    def __init__(self, cache: Cache, rows: slice, before: Tensor, n_new: int, longest: int):
        """`before` (B,): how long the rows were; `longest`: so many slots at most are in use, these tokens included.

        Nothing here depends on the numbers in `before` but other numbers: shapes, and with them a recorded graph, stay.
        """
        self.cache, self.rows, self.longest, self.index = cache, rows, longest, 0
        self.positions = before[:, None] + torch.arange(n_new, device=cache.device)  # (B, T)
        self._rows = torch.arange(len(cache.lengths), device=cache.device)[rows, None]
        self._seen: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._ropes: dict[tuple, Rope] = {}

    def rope(self, span: Span, head_dim: int) -> Rope:
        """Tables (B or 1, 1, K, D/2) for a span's positions, made once for all layers that share them."""
        if span.key not in self._ropes:
            self._ropes[span.key] = rope_at(span.positions[:, None], head_dim)
        return self._ropes[span.key]

    def look_back(self, *new: Tensor) -> list[Tensor]:
        """Keep the next layer's recent tensors, each (B, T, H, D), and give each with the taps - 1 tokens before it,
        (B, taps - 1 + T, H, D), 0 before the text. Comes before `extend`."""
        cache, found = self.cache, []
        before = self.positions[:, :1] + torch.arange(1 - cache.taps, 0, device=cache.device)
        for number, tensor in enumerate(new, -len(new)):
            buffer = cache.layers[self.index][number]
            slots = buffer.size(2)
            past = buffer[self._rows, :, (before - cache.first) % slots]
            if (prefix := cache.prefix) is not None:
                shared = prefix.layers[self.index][number]
                shared = shared[0].transpose(0, 1)[(before - prefix.first) % shared.size(2)]
                past = torch.where((before >= cache.first)[..., None, None], past, shared)
            found.append(torch.cat((past * (before >= 0)[..., None, None], tensor), dim=1))
            at = (self.positions[:, -slots:] - cache.first) % slots
            buffer[self._rows, :, at] = tensor[:, -slots:]
        return found

    def extend(self, *new: Tensor) -> list[Span]:
        """Keep the next layer's new tensors, each (B, T, H, width), and give all that they may look at."""
        cache, layer = self.cache, self.index
        self.index += 1
        buffers, window = cache.layers[layer][: len(new)], cache.windows[layer]
        spans, slots = [], buffers[0].size(2)
        for buffer, tensor in zip(buffers, new, strict=True):
            buffer[self._rows, :, (self.positions - cache.first) % slots] = tensor
        if (prefix := cache.prefix) is not None:
            kept = min(prefix.layers[layer][0].size(2), prefix.lengths[0])
            shared = [tensor[:, :, :kept] for tensor in prefix.layers[layer][: len(new)]]
            spans.append(self._span(shared, window, kept, prefix))
        kept = [tensor[self.rows, :, : self.longest] for tensor in buffers]
        return [*spans, self._span(kept, window, slots, cache)]

    def _span(self, tensors: list[Tensor], window: int | None, slots: int, cache: Cache) -> Span:
        """Positions in the first of a buffer's slots, and the mask that hides what a new token does not see."""
        key = (window, slots, cache is self.cache)
        if key not in self._seen:  # the same for all layers of a window
            first, slot = cache.first, torch.arange(tensors[0].size(2), device=self.cache.device)
            if cache is self.cache:
                newest = self.positions[:, -1:] - first
            else:  # a prefix, which stands still
                newest = torch.full((1, 1), cache.lengths[0] - first - 1, device=self.cache.device)
            positions = newest - (newest - slot) % slots + first  # the latest that fell into a slot
            distance = self.positions[:, :, None] - positions[:, None, :]
            visible = (distance >= 0) & (positions >= first)[:, None, :]
            if window is not None:
                visible &= distance < window
            mask = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -torch.inf)
            self._seen[key] = positions, mask[:, None]
        return Span(tensors, *self._seen[key], key)


def attend(q: Tensor, seen: Sequence[Keys], scale: float | Tensor) -> Tensor:
    """Softmax attention of new tokens, q (B, T, H, D): scores are scale (q.k - |k|^2 / 2), the latter with norms only.

    `scale` is one number or (H,). Returns (B, T, H, D); 0 for a token that sees nothing.
    """
    B, T, H, D = q.shape
    q = q.transpose(1, 2)
    scale = scale[:, None, None] if isinstance(scale, Tensor) else scale
    scores = []
    for span in seen:
        k = span.keys if span.rope is None else rotate(span.keys, *span.rope)
        if k.size(0) < B:  # one product for all rows
            shared = q.transpose(0, 1).reshape(H, B * T, D) @ k[0].mT
            products = shared.view(H, B, T, -1).transpose(0, 1)
        else:
            products = q @ k.mT
        add = span.mask if span.norms is None else span.mask - (0.5 * scale * span.norms).mT
        scores.append(products.float() * scale + add)
    together = torch.cat(scores, dim=-1) if len(scores) > 1 else scores[0]
    highest = together.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (together - highest).exp()
    weights = (weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).to(q.dtype)
    y = 0
    for part, span in zip(weights.split([score.size(-1) for score in scores], dim=-1), seen, strict=True):
        if (v := span.values).size(0) < B:
            y = y + (part.transpose(0, 1).reshape(H, B * T, -1) @ v[0]).view(H, B, T, D).transpose(0, 1)
        else:
            y = y + part @ v
    return y.transpose(1, 2)
