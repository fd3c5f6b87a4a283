"""Where new tokens and cached ones lie in their texts: rotations, masks, convolutions, and the cache of recent inputs.

Shapes: B batch, T new tokens, S tokens in the cache and new, H heads, D head_dim, C channels.
MIT License, the gkachat developers.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .configuration_gkachat import TAPS, GkachatConfig

RECENT = 64  # tokens whose inputs the cache keeps for convolutions; speculative decoding takes back up to 60
BLOCK = 128  # queries that attend together where there is a window
ROPE_BASE = 100_000.0


class RecentInputs(DynamicLayer):
    """Cache layer with the inputs of each row's newest tokens, without padding, (B, 1, RECENT, C).

    Smear and convolutions read the tokens before a new one. These layers lie behind those of the attention.
    """

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:  # older versions of transformers give the length that is left
            raise ValueError("cache: cannot be cropped to a length; speculative decoding needs a newer transformers")
        if self.is_initialized and -tokens_to_remove > RECENT - TAPS:
            raise ValueError(f"cache: asked to take back {-tokens_to_remove} tokens, expected at most {RECENT - TAPS}")
        super().crop(tokens_to_remove)


class Span(NamedTuple):
    """Queries that attend to a range of keys."""

    queries: slice
    keys: slice
    visible: Tensor | None
    """(B or 1, 1, queries, keys) bool; None: each query sees all keys up to its own."""
    keyless: Tensor | None
    """(B or 1, 1, queries, 1) bool: queries that see no key. `visible` lets them see themselves."""


class Positions:
    """Positions of the new tokens and of the keys in their texts: rotations, masks and the tokens before each token.

    Keys are the latest S tokens and end with the newest. Positions count a row's tokens without its padding, wherever
    that is: also between two turns, where a row of the batch ended early. Raises ValueError for inputs that do not fit
    together.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        n_past: int,
        padding_mask: Tensor | None,
        position_ids: Tensor | None,
        config: GkachatConfig,
        device: torch.device,
    ):
        B, T = shape
        self.n_new, self.config, self.is_token, self.has_holes = T, config, None, False
        self.positions = torch.arange(n_past + T, device=device)[None]
        if padding_mask is not None:
            if padding_mask.shape != (B, n_past + T):
                raise ValueError(f"attention_mask: given {tuple(padding_mask.shape)}, expected {(B, n_past + T)}")
            is_token = padding_mask.bool().to(device)
            if not is_token.all():
                starts = is_token & ~F.pad(is_token, (1, 0))[:, :-1]
                self.is_token, self.has_holes = is_token, bool((starts.sum(dim=-1) > 1).any())
                self.positions = (is_token.cumsum(dim=-1) - 1).clamp(min=0)
        if position_ids is not None and (T > 1 or self.has_holes):
            self._check(position_ids.to(device), n_past)
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        self._spans: dict[tuple, list[Span]] = {}

    def _check(self, position_ids: Tensor, n_past: int) -> None:
        """Only distances matter, so the ids of a row may be shifted: from the cached tokens, by the padding before."""
        if position_ids.size(-1) != self.n_new:
            raise ValueError(f"position_ids: given {tuple(position_ids.shape)}, expected {self.n_new} for each row")
        shift = position_ids - self.positions[:, -self.n_new :]
        is_token = torch.ones_like(shift, dtype=torch.bool)
        if self.is_token is not None:
            is_token = is_token & self.is_token[:, -self.n_new :]
        first = shift.take_along_dim(is_token.int().argmax(dim=-1, keepdim=True), dim=-1)
        expected = torch.zeros_like(first) if n_past and self.has_holes else first
        if ((shift != expected) & is_token).any():
            raise ValueError(
                "position_ids: expected consecutive ones for the tokens that the attention mask shows; texts packed "
                "into one row are not supported"
            )

    def to(self, device: torch.device, non_blocking: bool = False) -> "Positions":
        """Return the positions on another device, where a model is split over several."""
        if torch.device(device) == self.positions.device:
            return self
        moved = object.__new__(Positions)
        vars(moved).update(vars(self), _tables={}, _spans={})
        moved.positions = self.positions.to(device, non_blocking=non_blocking)
        moved.is_token = None if self.is_token is None else self.is_token.to(device, non_blocking=non_blocking)
        return moved

    def rotate(self, x_BHSD: Tensor) -> Tensor:
        """Rotate channel i against channel i + D/2 by the positions of the latest S tokens."""
        S, D = x_BHSD.shape[-2:]
        if S not in self._tables:
            channels = torch.arange(0, D, 2, dtype=torch.float32, device=self.positions.device)
            angles = self.positions[:, None, -S:, None].float() * ROPE_BASE ** (-channels / D)
            cos, sin = angles.cos(), angles.sin()
            self._tables[S] = torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)
        cos, sin = self._tables[S]
        return (x_BHSD * cos + x_BHSD.roll(D // 2, dims=-1) * sin).to(x_BHSD.dtype)

    def before(self, x_BTC: Tensor, n: int, recent: RecentInputs | None) -> list[Tensor]:
        """Return the inputs 1 to n tokens before each new token, (B, T, C) each, and store the newest in the cache.

        What precedes a text is zeros.
        """
        B, T, C = x_BTC.shape
        if recent is None or not recent.is_initialized:
            past = x_BTC.new_zeros(B, n, C)
        else:
            past = F.pad(recent.keys[:, 0], (0, 0, max(0, n - recent.keys.size(2)), 0))
        P = past.size(1)
        if self.is_token is None:
            known = torch.cat((past, x_BTC), dim=1)
            before = [known[:, P - delay : P - delay + T] for delay in range(1, n + 1)]
        else:  # move padding to the front of each row
            is_token = self.is_token[:, -T:]
            known = torch.cat((past, x_BTC.masked_fill(~is_token[..., None], 0)), dim=1)
            kept = F.pad(is_token, (P, 0), value=True)
            order, place = without_padding(kept)
            known, place = known.take_along_dim(order[..., None], dim=1), place[:, P:, None]
            before = [known.take_along_dim((place - delay).clamp(min=0), dim=1) for delay in range(1, n + 1)]
        if recent is not None:
            if not recent.is_initialized:
                recent.lazy_initialization(known, known)
            recent.keys = known[:, None, -RECENT:]
            recent.values = recent.keys[..., :0]
        return before

    def mask(self, x_BHSD: Tensor) -> Tensor:
        """Return what the latest S tokens have, with zeros at padding."""
        if self.is_token is None:
            return x_BHSD
        return x_BHSD.masked_fill(~self.is_token[:, None, -x_BHSD.size(2) :, None], 0)

    def convolve(self, x_BHSD: Tensor, weights: list[Tensor], n: int) -> list[Tensor]:
        """Return convolutions of the latest S tokens at the last n of them, (B, H, n, D).

        Padding must be zeros, and becomes zeros: what a row gives does not depend on holes in other rows.
        """
        S, n_before = x_BHSD.size(2), TAPS - 1
        if not self.has_holes:
            n_missing = max(0, n_before + n - S)
            x = F.pad(x_BHSD, (0, 0, n_missing, 0)) if n_missing else x_BHSD
            return [self.mask(y) for y in convolutions(x, weights)]
        order, place = without_padding(F.pad(self.is_token[:, -S:], (n_before, 0)))
        x = F.pad(x_BHSD, (0, 0, n_before, 0)).take_along_dim(order[:, None, :, None], dim=2)
        place = (place[:, None, -n:, None] - n_before).clamp(min=0)
        return [self.mask(y.take_along_dim(place, dim=2)) for y in convolutions(x, weights)]

    def spans(self, S: int, window: int | None, has_causal_kernel: bool, in_blocks: bool) -> list[Span]:
        """Return which keys the new tokens attend to, computed once for all layers that are alike.

        With a window, queries attend in blocks that see few keys: time and memory grow with T times the window.
        """
        key = (S, window, has_causal_kernel, in_blocks)
        if key not in self._spans:
            window = None if window is not None and window >= S else window
            T = self.n_new
            size = BLOCK if in_blocks and window is not None and not self.has_holes else T
            self._spans[key] = [
                self._span(start, min(start + size, T), S, window, has_causal_kernel) for start in range(0, T, size)
            ]
        return self._spans[key]

    def _span(self, start: int, end: int, S: int, window: int | None, has_causal_kernel: bool) -> Span:
        offset = S - self.n_new  # keys before the new tokens
        first = 0 if window is None or self.has_holes else max(0, offset + start - window + 1)
        queries, keys = slice(start, end), slice(first, offset + end)
        include_self = self.config.attention != "gka" or self.config.gka_include_self
        sees_all = end - start == 1 or (window is None and has_causal_kernel and start == offset == 0)
        if sees_all and self.is_token is None and include_self:
            return Span(queries, keys, None, None)
        positions, is_key = self.positions[:, -S:], None if self.is_token is None else self._keys(S)[:, None]
        distance = positions[:, offset + start : offset + end, None] - positions[:, None, keys]
        visible = distance >= (0 if include_self else 1)
        if window is not None:
            visible = visible & (distance < window)
        if is_key is None and include_self:
            return Span(queries, keys, visible[:, None], None)
        if is_key is not None:
            visible = visible & is_key[..., keys]
        keyless = ~visible.any(dim=-1, keepdim=True)
        slots = torch.arange(S, device=positions.device)
        is_self = slots[offset + start : offset + end, None] == slots[keys]
        return Span(queries, keys, (visible | (keyless & is_self))[:, None], keyless[:, None])

    def _keys(self, S: int) -> Tensor:
        """Return which of the latest S slots are keys, (B, S): no padding, and none whose convolution lacks tokens."""
        is_key = self.is_token[:, -S:]
        if self.config.attention == "gka_conv":
            n_before = is_key.cumsum(dim=-1) - 1
            is_whole = (n_before == self.positions[:, -S:]) | (n_before >= TAPS - 1)
            is_whole[:, -self.n_new :] = True  # a token sees itself
            is_key = is_key & is_whole
        return is_key


def without_padding(is_token_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices (B, S) that move padding to the front of each row, and where each token lies then."""
    S, n = is_token_BS.size(1), is_token_BS.sum(dim=-1, keepdim=True)
    return is_token_BS.int().argsort(dim=-1, stable=True), is_token_BS.cumsum(dim=-1) + S - n - 1


def convolutions(x_BHSD: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Return y_t = sum_n w_n x_(t-n) for each of the weights, (B, H, S - N + 1, D): all tokens but the first N - 1.

    Both forms add, and so round, in one order. A key's norm is part of its bias, and is taken out again a call later.
    """
    S = x_BHSD.size(2)
    if S == TAPS + 1:  # decoding a token, where the number of operations decides the time
        by_tap = torch.stack(weights).permute(0, 2, 3, 1)[:, None, :, None] * x_BHSD.unfold(2, TAPS, 1).flip(-1)
        return list(sum(by_tap.unbind(dim=-1)))
    parts = [x_BHSD[:, :, TAPS - 1 - n : S - n] for n in range(TAPS)]
    return [sum(x * w[:, None] for x, w in zip(parts, weight, strict=True)) for weight in weights]
