"""MultiheadGKA: Gaussian Kernel Attention in place of `nn.MultiheadAttention` or of a ViT's attention.

    block.attn = MultiheadGKA(192, 3)                          # timm: y_BTC = attn(x_BTC)
    layer.self_attn = MultiheadGKA(192, 3)                     # torch: y_BTC, weights = attn(x_BTC, x_BTC, x_BTC)

Axes: B batch, T time (query), S time (key), H heads, D head_dim, C channels.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gkachat.attention.base import Groups
from gkachat.attention.features import Rope, apply_rope, rms_norm, rope_table
from gkachat.attention.gka import GaussianKernelAttention
from gkachat.attention.kernels.choose import choose_padded_kernel
from gkachat.attention.linear import Linear, uniform_
from gkachat.attention.qkv import QKV
from gkachat.config import GKAConfig


@dataclass(frozen=True)
class LayerShape:
    """Width, heads, mask and kernel options of a GKA layer outside a model, under the names of a model's config."""

    n_embd: int
    n_head: int
    causal: bool
    limit: int | None
    gka: GKAConfig
    uses_attention_x0: ClassVar[bool] = False

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def sequence_len(self) -> int:
        """Return a length that the window does not span: the length of what comes is not known."""
        return (self.limit or 0) + 1

    def window(self, layer: int) -> int | None:
        return self.limit


class _NoFastPath:
    """Object where `nn.TransformerEncoder` looks for packed projections.

    Its `__torch_function__` makes torch run the layers one by one, on padded tensors, instead of its fused encoder.
    """

    @classmethod
    def __torch_function__(cls, *_):
        raise AssertionError("MultiheadGKA has no in_proj_weight")


class MultiheadGKA(GaussianKernelAttention):
    """Gaussian Kernel Attention as a module of its own, (B, T, C) -> (B, T, C), batch first.

    It is the layer of this package's GPT and ViT, whose weights it loads, and differs in two points: its output
    projection starts at random instead of 0, and it takes a mask of padding. It has no dropout and no bias.

    Args:
        embed_dim: channels C.
        num_heads: heads H, which divide C. Each compares and averages its own C / H channels.
        causal: whether a token sees only itself and earlier ones.
        window: number of visible positions, the token itself included: 0 <= i - j < window when causal,
            |i - j| < window otherwise. None: no limit.
        rope: rotate what is compared by position 0, 1, ..., T - 1. False, for models that add positions to the input.
        normalize: RMS-normalise each head's channels. The layer then does not depend on the scale of its input, and
            runs on the softmax kernels.
        qkv: learn a query, a key and a value projection, as softmax attention does; `normalize` and `rope` then act on
            queries and keys. False, as published: the input itself, split into heads, is all three.

    Raises:
        ValueError: for a shape that cannot be built.
    """

    batch_first, in_proj_bias, _qkv_same_embed_dim, in_proj_weight = (
        True,
        None,
        True,
        _NoFastPath(),
    )  # torch reads these

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        window: int | None = None,
        rope: bool = False,
        normalize: bool = False,
        qkv: bool = False,
    ):
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim: given {embed_dim}, expected a multiple of num_heads, given {num_heads}")
        if rope and embed_dim // num_heads % 2:
            raise ValueError(
                f"rope: given True for heads of {embed_dim // num_heads} channels, expected an even number"
            )
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(f"window: given {window!r}, expected a whole number of 1 or more, or None")
        super().__init__(LayerShape(embed_dim, num_heads, causal, window, GKAConfig(rope, normalize=normalize)), 0)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.c_qkv = Linear(embed_dim, 3 * embed_dim) if qkv else None
        self.shared_qk = not qkv
        self.init_weights()
        self.choose_kernels(self.c_proj.weight.device, self.c_proj.weight.dtype)

    @property
    def out_proj(self) -> Linear:
        """The output projection, by the name that `nn.MultiheadAttention` gives it."""
        return self.c_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Return the output (B, T, C); for (query, key, value), as `nn.MultiheadAttention` does, (output, weights).

        Args:
            query: (B, T, C), also under torch.autocast, whose dtype then is that of the output.
            key, value: None, or the query itself.
            key_padding_mask: (B, T): true for keys that are ignored, or floating numbers that are added to the scores
                of a key, -inf for one that is ignored. A token that sees no other key gets 0.
            need_weights: whether to return weights, (B, T, T), with key and value; None is in their place otherwise.
                They come from the definition, without gradient.
            average_attn_weights: average the weights over heads; False gives (B, H, T, T).
            attn_mask: None, or with `is_causal` the causal mask, which a causal layer applies anyway.
            is_causal: whether `attn_mask` is causal.

        Raises:
            ValueError: for other shapes, for keys of another text, and for other masks.
        """
        self._check(query, key, value, attn_mask, is_causal)
        x_BTC = query
        kind = x_BTC.device.type
        # Without this cast, each kernel would round where it is least precise.
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            x_BTC = x_BTC.to(torch.get_autocast_dtype(kind))
        if (x_BTC.device, x_BTC.dtype) != self.kernels_for:
            self.choose_kernels(x_BTC.device, x_BTC.dtype)
        rope = rope_table(x_BTC.size(1), self.config.head_dim, x_BTC.device) if self.config.gka.rope else None
        qkv, bias_BS = self.qkv(x_BTC, None, rope), None
        if key_padding_mask is None:
            y_BTHD = self.kernel.attend(qkv)
        else:
            bias_BS = key_bias(key_padding_mask, x_BTC.shape[:2], x_BTC.dtype)
            y_BTHD = self.padded_kernel.attend(qkv, bias_BS)
        y_BTC = self.c_proj(y_BTHD.flatten(2))
        if key is None:
            return y_BTC
        if not need_weights:
            return y_BTC, None
        weights_BHTS = self.attention_weights(x_BTC, None, rope, bias_BS).weights
        return y_BTC, weights_BHTS.mean(dim=1) if average_attn_weights else weights_BHTS

    def qkv(self, x_BTC: Tensor, idx_BT: None, rope: Rope | None) -> QKV:
        """Return the input, split into heads, as queries, keys and values, or its projections."""
        if self.c_qkv is None:
            return super().qkv(x_BTC, idx_BT, rope)
        q, k, v = (self.split_heads(part) for part in self.c_qkv(x_BTC).chunk(3, dim=-1))
        if self.unit_norm:
            q, k = rms_norm(q), rms_norm(k)
        return QKV(apply_rope(q, rope), apply_rope(k, rope), v, sigma=self.sigma)

    def choose_kernels(self, device: torch.device, dtype: torch.dtype) -> None:
        """Choose the kernels for inputs of a device and dtype. `forward` calls it when these change."""
        super().choose_kernels(device, dtype)
        self.padded_kernel = choose_padded_kernel(self.kernel_spec)
        self.kernels_for = device, dtype

    def init_weights(self) -> None:
        """Fill projections uniformly with standard deviation 1 / sqrt(C); bandwidths start at sqrt(D/2)."""
        super().init_weights()
        for projection in filter(None, (self.c_qkv, self.c_proj)):
            uniform_(projection.weight, self.embed_dim**-0.5)

    def parameter_groups(self) -> Groups:
        groups = super().parameter_groups()
        return groups if self.c_qkv is None else groups | {"matrices": [self.c_qkv.weight, *groups["matrices"]]}

    def _apply(self, fn, recurse: bool = True) -> "MultiheadGKA":
        """Choose the kernels anew after .to(), .cuda() and the like, before a compiler traces `forward`."""
        super()._apply(fn, recurse)
        self.choose_kernels(self.c_proj.weight.device, self.c_proj.weight.dtype)
        return self

    def _check(self, query, key, value, attn_mask, is_causal: bool) -> None:
        if query.ndim != 3 or query.size(-1) != self.embed_dim:
            raise ValueError(f"query: given shape {tuple(query.shape)}, expected (B, T, {self.embed_dim}), batch first")
        if not query.is_floating_point():
            raise ValueError(f"query: given {query.dtype}, expected floating numbers")
        if any(other is not None and other is not query for other in (key, value)) or (key is None) != (value is None):
            raise ValueError("key and value: expected the query itself: a text attends to itself, and to no other text")
        if is_causal and not self.config.causal:
            raise ValueError("is_causal: given True for a layer that sees the whole text; build it with causal=True")
        if attn_mask is not None and not is_causal:
            raise ValueError(
                "attn_mask: not supported; build the layer with causal=True or window=, and give is_causal=True with a "
                "causal mask"
            )

    def extra_repr(self) -> str:
        shape, options = self.config, self.config.gka
        return (
            f"{self.embed_dim}, {self.num_heads}, causal={shape.causal}, window={shape.limit}, rope={options.rope}, "
            f"normalize={options.normalize}, qkv={self.c_qkv is not None}"
        )


def key_bias(key_padding_mask: Tensor, shape_BS: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return what a mask of ignored keys, or of numbers for each key, adds to the scores: (B, S) in a dtype.

    Raises ValueError for a mask of another shape or of integers.
    """
    if key_padding_mask.shape != shape_BS:
        given = tuple(key_padding_mask.shape)
        raise ValueError(f"key_padding_mask: given shape {given}, expected (B, T), {tuple(shape_BS)}")
    if key_padding_mask.is_floating_point():
        return key_padding_mask.to(dtype)
    if key_padding_mask.dtype != torch.bool:
        raise ValueError(
            f"key_padding_mask: given {key_padding_mask.dtype}, expected bool, true for keys that are ignored (for a "
            "mask of 1 for tokens and 0 for padding, give mask == 0)"
        )
    return torch.zeros_like(key_padding_mask, dtype=dtype).masked_fill(key_padding_mask, -torch.inf)
