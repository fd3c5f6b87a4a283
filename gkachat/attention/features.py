"""Features that attention compares: RMS norm, rotary positions, short convolutions over time.

Axes: B batch, T time, H heads, D head_dim.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gkachat.attention.forget_gate import with_bias
from gkachat.machine import no_triton

ROPE_BASE = 100_000.0

Rope = tuple[Tensor, Tensor]
"""(cos, sin), each (T, D/2), or (B, T, D/2) where each row has positions of its own."""


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a dtype, and x itself where it has that dtype already.

    In torch 2.11, which the benchmarks support, a `.to()` that does nothing makes a compiled autograd.Function lose its
    gradient.
    """
    return x if x.dtype == dtype else x.to(dtype)


def rms_norm(x: Tensor, gain_H: Tensor | None = None) -> Tensor:
    """Divide the last axis by its root mean square, and multiply each head of (B, T, H, D) by its gain, if given."""
    return rms_norm_and_scale(x, gain_H)[0]


def rms_norm_and_scale(x: Tensor, gain_H: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return `rms_norm(x)` and what it multiplied x by, (..., 1) in float32 or wider, without gradient."""
    # For a token, an autograd.Function takes a third as long as the operations in it.
    return _RMSNorm.apply(x, gain_H) if torch.is_grad_enabled() else _normalised(x, gain_H)


def _normalised(x: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
    wide_x = cast(x, torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True)
    scale = (norm.square() / x.size(-1) + torch.finfo(wide_x.dtype).eps).rsqrt()
    if gain is not None:
        scale = scale * cast(gain, scale.dtype)[..., None]
    return cast(wide_x * scale, x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    """RMS norm that saves its output, which the next operation saves anyway, and one number per row.

    torch's own rms_norm saves its input, in float32 on a CPU, and takes 2 to 3 times as long there. The gain joins that
    number, so that it costs no pass over x. Inputs are widened at once: a CPU takes longer for products of two dtypes.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
        y, scale = _normalised(x, gain)
        ctx.save_for_backward(y, scale, gain)
        ctx.mark_non_differentiable(scale)
        return y, scale

    @staticmethod
    def backward(ctx, dy: Tensor, _: None) -> tuple[Tensor, Tensor | None]:
        y, scale, gain = ctx.saved_tensors
        wide_dy, wide_y = cast(dy, scale.dtype), cast(y, scale.dtype)
        along, dgain = (wide_dy * wide_y).sum(dim=-1, keepdim=True) / y.size(-1), None
        if gain is not None:  # y / gain has the norm that the formula needs, once for each y
            along = along / gain[:, None]
            dgain = cast(along.sum(dim=(0, 1, 3)) * y.size(-1), gain.dtype)
            along = along / gain[:, None]
        return cast(torch.addcmul(wide_dy, wide_y, along, value=-1) * scale, y.dtype), dgain


def rope_table(seq_len: int, head_dim: int, device: torch.device | str | None = None) -> Rope:
    """Return (cos, sin) of positions 0 to seq_len - 1, each (T, D/2) float32."""
    return rope_at(torch.arange(seq_len, device=device), head_dim)


def rope_at(positions: Tensor, head_dim: int) -> Rope:
    """Return (cos, sin) of any positions (..., T), each (..., T, D/2) float32.

    Angles are position times base^(-2i/D) (RoFormer, arXiv 2104.09864).
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions.float()[..., None] * ROPE_BASE ** (-channels / head_dim)
    return angles.cos(), angles.sin()


def apply_rope(x_BTHD: Tensor, rope: Rope | None) -> Tensor:
    """Rotate the channels of each token by its position. With None, return x as it is.

    Channels i and i + D/2 form a pair (a, b) -> (a cos + b sin, b cos - a sin), which is nanochat's direction.
    """
    return x_BTHD if rope is None else rotate(x_BTHD, *(table.unsqueeze(-2) for table in rope))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., D) by tables that broadcast against half of it."""
    return _Rotation.apply(x, cos, sin) if torch.is_grad_enabled() else _rotated(x, cos, sin, 1)


class _Rotation(torch.autograd.Function):
    """Rotation in three products. Autograd would make four, and concatenate halves, in both directions."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(dy, *ctx.saved_tensors, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Rotate by the angles (direction 1) or back (-1), in the tables' precision."""
    wide_x = cast(x, torch.promote_types(x.dtype, cos.dtype))  # a CPU takes longer for products of two dtypes
    y = wide_x * torch.cat((cos, cos), dim=-1)
    (a, b), (y_a, y_b) = wide_x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    y_a.addcmul_(b, sin, value=direction)
    y_b.addcmul_(a, sin, value=-direction)
    return cast(y, x.dtype)


class ShortConv(nn.Module):
    """Convolution over the last four tokens, channel by channel: y_t = sum_n w_n x_(t-n), with 0 before the text."""

    TAPS = 4
    KEY_DELAYS = (1, 2, 3)  # initial delays of keys, from head to head

    def __init__(self, n_head: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(self.TAPS, n_head, head_dim))

    def init_weights(self, delays: Sequence[int] = (0,)) -> None:
        """Set the weights so that y_t = x_(t - delay). Heads take the delays in turns."""
        nn.init.zeros_(self.weight)
        for head in range(self.weight.size(1)):
            nn.init.ones_(self.weight[delays[head % len(delays)], head])

    def forward(self, x_BTHD: Tensor, T: int) -> Tensor:
        """Return the convolution at the last T tokens, (B, T, H, D). Earlier tokens serve only as the past of these."""
        return short_conv(x_BTHD, self.weight)[:, -T:]


def short_conv(x_BTHD: Tensor, weight_NHD: Tensor) -> Tensor:
    """Return y_t = sum_n w_n x_(t-n) with 0 before the first token, (B, T, H, D)."""
    return _ShortConv.apply(x_BTHD, weight_NHD.to(x_BTHD.dtype))


class _ShortConv(torch.autograd.Function):
    """Convolution tap by tap, in place. On a CPU it is several times as fast as torch's depthwise convolution."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = x * weight[0]
        for n in range(1, min(len(weight), x.size(1))):
            y[:, n:].addcmul_(x[:, :-n], weight[n])
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dx, dw = dy * weight[0], torch.zeros_like(weight)
        dw[0] = (dy * x).sum(dim=(0, 1))
        for n in range(1, min(len(weight), x.size(1))):
            dx[:, :-n].addcmul_(dy[:, n:], weight[n])
            dw[n] = (dy[:, n:] * x[:, :-n]).sum(dim=(0, 1))
        return dx, dw


def convolved_features(
    x_BSHD: Tensor, weights: tuple[Tensor, Tensor, Tensor], gain_H: Tensor, bias_BTH1: Tensor, T: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q = gain norm(conv(x)), k = norm(conv(x)) and v = conv(x) of the last T tokens, each (B, T, H, D).

    The weights are (N, H, D). Those of q and k are 0 in the last channels, which get the bias of the keys
    (`with_bias`). Also returns what the norm multiplied the keys by, (B, T, H, 1), without gradient.
    """
    if T == 1 and x_BSHD.size(1) == len(weights[0]) and not torch.is_grad_enabled():
        return _features_of_a_token(x_BSHD, weights, gain_H)
    q, k, v = (short_conv(x_BSHD, weight)[:, -T:] for weight in weights)
    k, key_scales = rms_norm_and_scale(k)
    return *with_bias(rms_norm(q, gain_H), k, bias_BTH1), v, key_scales


def _features_of_a_token(
    x_BNHD: Tensor, weights: tuple[Tensor, Tensor, Tensor], gain_H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `convolved_features` returns, in few operations: for a single token their number decides the time.

    The bias is left out. A token that stands alone has no other key to compare, and a cache has the biases of its keys.
    """
    convolved = (torch.stack(weights).to(x_BNHD.dtype)[:, None] * x_BNHD.flip(1)).sum(dim=2, keepdim=True)
    gains = torch.stack((gain_H, torch.ones_like(gain_H)))[:, None, None]
    (q, k), (_, key_scales) = (pair.unbind() for pair in rms_norm_and_scale(convolved[:2], gains))
    return q, k, convolved[2], key_scales


class Features(NamedTuple):
    """A function that computes convolved features, its name, and why it was chosen."""

    name: str
    reason: str
    compute: Callable[..., tuple[Tensor, ...]]
    """Takes what `convolved_features` takes, and returns the same."""


def choose_features(head_dim: int, device: torch.device, dtype: torch.dtype) -> Features:
    """Return the fastest function for convolved features on a device, for activations of a dtype."""
    obstacles = list(filter(None, [no_triton(device)]))
    obstacles += [f"the dtype is {dtype}"] if dtype not in (torch.bfloat16, torch.float32) else []
    obstacles += [f"heads have {head_dim} channels, more than 256"] if head_dim > 256 else []
    obstacles += ["triton is not installed"] if importlib.util.find_spec("triton") is None else []
    if obstacles:
        return Features("torch", f"no triton kernel: {'; '.join(obstacles)}", convolved_features)
    from gkachat.attention import features_triton

    reason = "convolutions and norms in one pass"
    return Features("triton", reason, features_triton.convolved_features)
