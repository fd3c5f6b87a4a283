"""Key/value cache: the keys and values that decoding keeps of the tokens read so far.

    cache = model.make_cache(rows=8, length=2048, block=256)
    logits = model(idx, cache=cache.step(slice(0, 8), idx.size(1)), logits_to_keep=1)

Each row of a cache is a text with a length of its own. Position p lies in slot p % slots, so that a layer with a window
keeps only that window and one block of new tokens. A cache can continue a prefix: a cache of one row that all rows
share without a copy.
Axes: B rows of a step, T new tokens, S cache slots, H heads, D head_dim, C channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gkachat.attention.features import Rope, rope_at
from gkachat.attention.qkv import QKV, KVSlice
from gkachat.config import GPTConfig


class LayerCacheSpec(NamedTuple):
    """Specification of what one layer keeps of each token; `Attention.cache_spec` gives that of an attention layer."""

    window: int | None = None
    """Visible positions, the token itself included; None: all of the past."""
    has_keys: bool = False
    """Whether the layer keeps keys and values."""
    shares_kv: bool = False
    """Whether keys and values are one tensor."""
    key_norms: bool = False
    """Whether |k|^2 is kept beside the keys."""
    lookback: int = 0
    """Number of earlier inputs that the layer reads."""
    taps: int = 1
    """Number of tokens that a key and a value are convolutions of. Above 1, the cache keeps one tensor that both are
    made of, whose earlier tokens are also those that `lookback` asks for."""
    forgets: bool = False
    """Whether a bias per key and head is kept, which has a running sum over the text as a part."""


class Cache:
    """Key/value cache of every layer, for a batch of rows with their own lengths."""

    def __init__(
        self,
        config: GPTConfig,
        specs: list[LayerCacheSpec],
        rows: int,
        length: int,
        *,
        block: int,
        prefix: "Cache | None" = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        """Allocate room for `rows` texts.

        Args:
            specs: what each layer keeps.
            length: tokens of each row, those of the prefix not counted.
            block: largest number of tokens that a step adds to a row.
            prefix: a cache of one row that every row continues.
        """
        self.specs, self.prefix, self.length, self.block = specs, prefix, length, block
        self.device, self.dtype = torch.device(device), dtype
        self.head_dim = config.head_dim
        self.first = 0 if prefix is None else prefix.lengths[0]  # position of a row's first token in this cache
        self.lengths = [self.first] * rows
        self.layers: list[dict[str, Tensor]] = []
        for spec in specs:
            halo = spec.taps - 1
            slots = min(length, spec.window + block - 1 + halo) if spec.window else length
            shape = (rows, config.n_head, slots)
            buffers = {}
            if spec.has_keys:
                buffers["k"] = torch.zeros(*shape[:2], halo + slots, config.head_dim, dtype=dtype, device=device)
            if spec.forgets:  # in bfloat16 a running sum would lose the differences between neighbours
                wide = torch.promote_types(dtype, torch.float32)
                buffers["key_bias"] = torch.zeros(*shape, 1, dtype=wide, device=device)
                recent = self._n_recent(lookback=1)
                buffers["running_sum"] = torch.zeros(rows, recent, config.n_head, dtype=wide, device=device)
            if spec.has_keys and not spec.shares_kv:
                buffers["v"] = torch.zeros_like(buffers["k"])
            if spec.key_norms:
                buffers["key_norms"] = torch.zeros(*shape, 1, dtype=torch.float32, device=device)
            if spec.lookback and not halo:
                recent = self._n_recent(spec.lookback)
                buffers["x"] = torch.zeros(rows, recent, config.n_embd, dtype=dtype, device=device)
            self.layers.append(buffers)
        self._start(slice(0, rows))

    def _n_recent(self, lookback: int) -> int:
        """Return how many tokens a buffer holds whose newest `lookback` are read with new tokens.

        Where one block holds the whole text, `lengths` may be set back to any token, and the buffer keeps them all.
        """
        return self.length if self.block >= self.length else min(self.length, lookback + 1)

    @property
    def n_bytes(self) -> int:
        """Bytes of all buffers, those of the prefix not counted."""
        return sum(buffer.nbytes for buffers in self.layers for buffer in buffers.values())

    def bytes_of(self, length: int) -> int:
        """Return the bytes that a row of `length` tokens fills, those of the prefix not counted.

        A layer with a window overwrites its oldest tokens, and so stops growing.
        """
        buffers = [buffer[0] for buffers in self.layers for buffer in buffers.values()]  # (H, S, D), (S, C) or (S, H)
        return sum(buffer.nbytes // (n := buffer.size(-2)) * min(length, n) for buffer in buffers)

    def step(self, rows: slice, T: int, prefill: bool = False) -> "CacheStep":
        """Make room for T new tokens in each of the rows; their lengths grow at once.

        `prefill` promises that the rows are empty, so that the training kernel can be used. Raises ValueError for more
        than `block` tokens, or a prefill of rows that are not empty.
        """
        if self.block < T:
            raise ValueError(f"cache: given {T} tokens at once, expected at most {self.block}")
        lengths = self.lengths[rows]
        if prefill and any(lengths):
            raise ValueError(f"cache: prefill of rows that hold {lengths} tokens, expected empty rows")
        for row in range(*rows.indices(len(self.lengths))):
            if self.lengths[row] == self.first:
                self._start(slice(row, row + 1))
            self.lengths[row] += T
        longest = max(lengths) + T - self.first
        return CacheStep(self, rows, torch.tensor(lengths, device=self.device), T, longest, prefill)

    def _start(self, rows: slice) -> None:
        """Put the last tokens of the prefix, or zeros, before the first slot of layers with taps."""
        for index, (spec, buffers) in enumerate(zip(self.specs, self.layers, strict=True)):
            if halo := spec.taps - 1:
                before = buffers["k"][rows, :, :halo]
                if self.prefix is None:
                    before.zero_()
                else:
                    before.copy_(self.prefix.step(slice(0, 1), 0).layer(index).earlier_inputs().transpose(1, 2))

    def move(self, source: int, target: int) -> None:
        """Copy one row over another."""
        for buffers in self.layers:
            for buffer in buffers.values():
                buffer[target] = buffer[source]
        self.lengths[target] = self.lengths[source]


class CacheStep:
    """One step of a cache: T new tokens for each of some rows, which pass through all layers.

    Shapes depend on `rows`, T and `longest` alone and never on the numbers in `lengths`, so that a step can be
    recorded as a CUDA graph.
    """

    def __init__(self, cache: Cache, rows: slice, lengths: Tensor, T: int, longest: int, prefill: bool = False):
        """Prepare T new tokens for each of the rows.

        Args:
            lengths: (B,) tokens of each row before this step.
            longest: upper bound of the slots in use after this step.
        """
        self.cache, self.rows, self.longest, self.is_prefill = cache, rows, longest, prefill
        self.lengths = lengths[:, None]  # (B, 1)
        self.positions = self.lengths + torch.arange(T, device=cache.device)  # (B, T)
        self.row_index = torch.arange(len(cache.lengths), device=cache.device)[rows, None]  # (B, 1)
        self._views: dict[tuple, tuple[Tensor, Tensor, Rope | None]] = {}
        self._slots: dict[int, Tensor] = {}
        self._halo_slots: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._before: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def slots_read(self, slots: int) -> int:
        """Return how many slots of a buffer the new tokens read: those in use, or all of them.

        A CPU copies a part of a buffer before it multiplies it in bfloat16. All of it takes 0.4 of the time.
        """
        copies = self.cache.device.type == "cpu" and self.cache.dtype == torch.bfloat16
        return slots if self.longest >= slots or (copies and 2 * self.longest >= slots) else self.longest

    def layer(self, index: int) -> "LayerCache":
        """Return the part of this step that one layer reads and writes."""
        return LayerCache(self, index)

    def slots(self, n: int) -> Tensor:
        """Return the slots (B, T) of the new tokens in a buffer of n slots, computed once for all layers."""
        if n not in self._slots:
            self._slots[n] = (self.positions - self.cache.first) % n
        return self._slots[n]

    def halo_slots(self, n: int, halo: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return where tokens lie in a buffer of n slots behind a halo, computed once for all layers.

        The halo holds what lies before the first slot: what precedes the text and, once slots wrap, a copy of the last
        slots. Returned are the places of the `halo` tokens before the new ones (B, halo), of the new ones (B, T), and
        of their copies (B, T). The copy of a token that is not in the last slots is the token itself.
        """
        if (n, halo) not in self._halo_slots:
            before = self.lengths - self.cache.first + torch.arange(-halo, 0, device=self.cache.device)
            before = torch.where(before < 0, before, before % n) + halo
            new = self.slots(n) + halo
            self._halo_slots[n, halo] = before, new, new % n
        return self._halo_slots[n, halo]

    def before(self, n: int, lookback: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the positions before the new tokens, their slots in a buffer of n, and whether the text has them.

        Shapes are (B, lookback), (B, lookback) and (B, lookback, 1). Computed once for all layers.
        """
        if (n, lookback) not in self._before:
            positions = self.lengths + torch.arange(-lookback, 0, device=self.cache.device)
            self._before[n, lookback] = positions, (positions - self.cache.first) % n, (positions >= 0)[..., None]
        return self._before[n, lookback]

    def view(
        self, window: int | None, slots: int, of_prefix: bool, rotated: bool
    ) -> tuple[Tensor, Tensor, Rope | None]:
        """Return positions, mask and rotation tables of the slots in use, computed once for all layers that share them.

        Positions are (B or 1, S). The mask (B, 1, T, S) is 0 where a new token sees the key, and minus infinity
        elsewhere. The tables, (B or 1, 1, S, D/2), are None unless keys are rotated when they are read.
        """
        key = (window, slots, of_prefix, rotated)
        if key not in self._views:
            cache = self.cache.prefix if of_prefix else self.cache
            first, device = cache.first, self.cache.device
            if of_prefix:
                n, newest = slots, torch.full((1, 1), cache.lengths[0] - first - 1, device=device)
            else:
                n, newest = self.slots_read(slots), self.positions[:, -1:] - first
            # Latest position that lies in each slot.
            positions = newest - (newest - torch.arange(n, device=device)) % slots + first
            distance = self.positions[:, :, None] - positions[:, None, :]
            seen = (distance >= 0) & (positions >= first)[:, None, :]
            if window is not None:
                seen &= distance < window
            mask = torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)
            rope = rope_at(positions[:, None], self.cache.head_dim) if rotated else None
            self._views[key] = positions, mask[:, None], rope
        return self._views[key]


class LayerCache:
    """Cache of one layer during a step. `append` writes the new tokens; `slices` returns what they may attend to."""

    def __init__(self, step: CacheStep, index: int):
        self.step, self.cache, self.index = step, step.cache, index
        self.buffers, self.spec = step.cache.layers[index], step.cache.specs[index]
        self.is_prefill, self.rotates_keys, self.halo = step.is_prefill, False, self.spec.taps - 1

    @property
    def slots(self) -> int:
        """Number of tokens whose keys the layer holds."""
        return self.buffers["k"].size(2) - self.halo

    def with_lookback(self, x: Tensor) -> Tensor:
        """Return the new inputs (B, T, ...) behind the `lookback` earlier ones, (B, lookback + T, ...), and store them.

        Inputs before the text are zeros. Without lookback, x is returned as it is. Those of layers with taps lie among
        the keys, and `append` stores them.
        """
        if not self.spec.lookback:
            return x
        if self.halo:
            return torch.cat((self.earlier_inputs(), x), dim=1)
        past = self._recent("x", self.spec.lookback)
        self._keep_recent("x", x)
        return torch.cat((past, x), dim=1)

    def _recent(self, name: str, lookback: int) -> Tensor:
        """Return what a buffer (rows, slots, n) has of the tokens before the new ones, (B, lookback, n).

        What precedes a text is zeros.
        """
        cache, buffer = self.cache, self.buffers[name]
        before, slots, in_text = self.step.before(buffer.size(1), lookback)
        past = buffer[self.step.row_index, slots]
        if (prefix := cache.prefix) is not None:
            shared = prefix.layers[self.index][name][0]
            past = torch.where((before >= cache.first)[..., None], past, shared[(before - prefix.first) % len(shared)])
        return past * in_text

    def _keep_recent(self, name: str, x: Tensor) -> None:
        """Store the latest of the new tokens' x (B, T, n) in a buffer (rows, slots, n)."""
        buffer = self.buffers[name]
        slots = buffer.size(1)
        buffer[self.step.row_index, self.step.slots(slots)[:, -slots:]] = x[:, -slots:]

    def earlier_inputs(self) -> Tensor:
        """Return what a layer with taps keeps of the `halo` tokens before the new ones, (B, halo, H, D)."""
        before, _, _ = self.step.halo_slots(self.slots, self.halo)
        return self.buffers["k"][self.step.row_index, :, before]

    def append(self, qkv: QKV) -> None:
        """Write keys and values of the new tokens, and what else the layer needs of each key."""
        k, self.rotates_keys = qkv.cached_k, qkv.unrotated_k is not None
        new = {"k": k, "v": qkv.v}
        if "key_norms" in self.buffers:
            new["key_norms"] = k.float().square().sum(dim=-1, keepdim=True)  # a rotation keeps the norm
        if "key_bias" in self.buffers:
            assert qkv.running_sum is not None, "QKV: given no running_sum, expected it beside key_bias (`forgets`)"
            sum_before = self._recent("running_sum", 1)
            self._keep_recent("running_sum", qkv.running_sum.squeeze(-1) + sum_before)
            new["key_bias"] = qkv.key_bias + sum_before[..., None]
        rows, n = self.step.row_index, self.slots
        slots = k_slots = self.step.slots(n)
        if self.halo:
            _, k_slots, copies = self.step.halo_slots(n, self.halo)
            if n < self.cache.length:  # slots that wrap
                self.buffers["k"][rows, :, copies] = k
        for name, tensor in new.items():
            if name in self.buffers:
                self.buffers[name][rows, :, k_slots if name == "k" else slots] = tensor

    def slices(self, include_self: bool) -> list[KVSlice]:
        """Return the cached keys and values that the new tokens may attend to: of the prefix, if any, and of the rows.

        `append` must have written the new tokens before.
        """
        slices, step = [], self.step
        if (prefix := self.cache.prefix) is not None:
            buffers = prefix.layers[self.index]
            slots = min(buffers["k"].size(2) - self.halo, prefix.lengths[0])
            slices.append(self._slice(buffers, slice(None), slots, slots, of_prefix=True))
        own = self._slice(self.buffers, step.rows, step.slots_read(self.slots), self.slots, of_prefix=False)
        if not include_self:
            positions, _, _ = step.view(self.spec.window, self.slots, False, self.rotates_keys)
            is_self = positions[:, None, None, :] == step.positions[:, None, :, None]
            own = own._replace(mask=own.mask.masked_fill(is_self, -torch.inf))
        return [*slices, own]

    def _slice(self, buffers: dict[str, Tensor], rows: slice, n: int, slots: int, of_prefix: bool) -> KVSlice:
        """Return the keys and values in the first n slots of the buffers."""
        names = "v", "key_norms", "key_bias"
        k = buffers["k"][rows, :, : self.halo + n]
        v, norms, bias = (buffers[name][rows, :, :n] if name in buffers else None for name in names)
        _, mask, rope = self.step.view(self.spec.window, slots, of_prefix, self.rotates_keys)
        return KVSlice(k, k if v is None else v, mask, norms, rope, bias)
