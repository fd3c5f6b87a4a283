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


def rms_norm(x: Tensor) -> Tensor:
    """Divide the last axis by its root mean square."""
    # For a token, an autograd.Function takes a third as long as the operations in it.
    return _RMSNorm.apply(x) if torch.is_grad_enabled() else _normalised(x)[0]


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x divided by its root mean square, and the factor, (..., 1) in float32 at least."""
    wide_x = cast(x, torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True)
    scale = (norm.square() / x.size(-1) + torch.finfo(wide_x.dtype).eps).rsqrt()
    return cast(wide_x * scale, x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    """RMS norm that saves its output, which the next operation saves anyway, and one number per row.

    torch's own rms_norm saves its input, in float32 on a CPU, and takes 2 to 3 times as long there. Inputs are widened
    at once: a CPU takes longer for products of two dtypes.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y, scale = _normalised(x)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        wide_dy, wide_y = cast(dy, scale.dtype), cast(y, scale.dtype)
        along = (wide_dy * wide_y).sum(dim=-1, keepdim=True) / y.size(-1)
        return cast(torch.addcmul(wide_dy, wide_y, along, value=-1) * scale, y.dtype)


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
    x_BSHD: Tensor, weights: tuple[Tensor, Tensor, Tensor], gain_H: Tensor, running_sum_BTH1: Tensor, T: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q = gain conv(x), k = conv(x) and v = conv(x) of the last T tokens, each (B, T, H, D), and biases of keys.

    The bias of a key, (B, T, H, 1), is the running sum less gain |k|^2 / 2, which a Gaussian kernel subtracts from q.k.
    The weights are (N, H, D). Those of q and k are 0 in the last channels. These add the bias to the scores, and its
    gradient flows through them (`with_bias`). Where a single token is decoded they stay 0.
    """
    w_q, w_k, w_v = weights
    w_q = w_q.to(x_BSHD.dtype) * gain_H[:, None]  # rounded first: weights stored in bfloat16 give the same q
    if T == 1 and x_BSHD.size(1) == len(w_q) and not torch.is_grad_enabled():
        # The cache has the biases of all keys. For a single token, the number of operations decides the time.
        q, k, v = (torch.stack((w_q, w_k, w_v)).to(x_BSHD.dtype)[:, None] * x_BSHD.flip(1)).sum(dim=2, keepdim=True)
        return q, k, v, running_sum_BTH1 - _half_square(k, gain_H)
    q, k, v = (short_conv(x_BSHD, weight)[:, -T:] for weight in (w_q, w_k, w_v))
    bias_BTH1 = running_sum_BTH1 - _half_square(k, gain_H)
    return *with_bias(q, k, bias_BTH1), v, bias_BTH1.detach()


def _half_square(k_BTHD: Tensor, gain_H: Tensor) -> Tensor:
    """Return gain |k|^2 / 2 of each key, (B, T, H, 1) in float32 at least."""
    wide_k = cast(k_BTHD, torch.promote_types(k_BTHD.dtype, torch.float32))
    return 0.5 * gain_H[:, None] * wide_k.square().sum(dim=-1, keepdim=True)


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

    reason = "convolutions and biases of keys in one pass"
    return Features("triton", reason, features_triton.convolved_features)
