"""What is done to a head's channels before tokens are compared: norm, rotation, short convolution over time.

Axes: B batch, T time, H heads, D head_dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ROPE_BASE = 100_000.0

Rope = tuple[Tensor, Tensor]
"""(cos, sin), each (T, D/2), or (B, T, D/2) where rows are at positions of their own."""


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, but for the case where it does nothing: what a compiled autograd.Function then returns has lost
    its gradient in torch 2.11."""
    return x if x.dtype == dtype else x.to(dtype)


def rms_norm(x: Tensor) -> Tensor:
    """Divide the last axis by its root mean square; no learned scale."""
    return _RMSNorm.apply(x)


class _RMSNorm(torch.autograd.Function):
    """Keeps its output, which whatever comes next keeps too, and one number a row.

    torch's own keeps its input, in float32 on a CPU, and takes 2 to 3 times as long there.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = (norm.square() / x.size(-1) + torch.finfo(wide).eps).rsqrt()
        y = cast(x * scale, x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        along = (dy * y).sum(dim=-1, keepdim=True, dtype=scale.dtype) / y.size(-1)
        return cast((dy - y * along) * scale, y.dtype)


def rope_table(seq_len: int, head_dim: int, device: torch.device | str | None = None) -> Rope:
    """Angles of positions 0 .. seq_len-1, float32: position times base^(-2i/D) (RoFormer, arXiv 2104.09864)."""
    return rope_at(torch.arange(seq_len, device=device), head_dim)


def rope_at(positions: Tensor, head_dim: int) -> Rope:
    """The same for any positions (..., T): (cos, sin), each (..., T, D/2)."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions.float()[..., None] * ROPE_BASE ** (-channels / head_dim)
    return angles.cos(), angles.sin()


def apply_rope(x_BTHD: Tensor, rope: Rope | None) -> Tensor:
    """Rotate channel i against channel i + D/2 by the position's angle; norms and dot products at a distance stay.
    None: positions are told otherwise."""
    return x_BTHD if rope is None else rotate(x_BTHD, *(table.unsqueeze(-2) for table in rope))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same with tables that broadcast against half of x."""
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """One product over all of x and one over each half, where autograd makes four and joins halves, both ways."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        return _turn(dy, *ctx.saved_tensors, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    """By the angles (way 1) or back (-1)."""
    y = x * torch.cat((cos, cos), dim=-1)
    (a, b), (y_a, y_b) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    y_a.addcmul_(b, sin, value=way)
    y_b.addcmul_(a, sin, value=-way)
    return cast(y, x.dtype)


class ShortConv(nn.Module):
    """Each channel mixes its last `taps` tokens: y_t = sum_n w_n x_(t-n), 0 before the text. Starts as delays."""

    def __init__(self, n_head: int, head_dim: int, taps: int = 4):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(taps, n_head, head_dim))

    def init_weights(self, delays: Sequence[int] = (0,)) -> None:
        """y_t = x_(t - delay), heads taking one of the delays after another."""
        nn.init.zeros_(self.weight)
        for head in range(self.weight.size(1)):
            nn.init.ones_(self.weight[delays[head % len(delays)], head])

    def forward(self, x_BTHD: Tensor) -> Tensor:
        return _ShortConv.apply(x_BTHD, self.weight.to(x_BTHD.dtype))

    def of(self, x_BTHD: Tensor) -> Tensor:
        """The same of all but the first taps - 1 tokens, which come before."""
        weight, last = self.weight.to(x_BTHD.dtype), len(self.weight) - 1
        y = x_BTHD[:, last:] * weight[0]
        for n in range(1, last + 1):
            y = y.addcmul(x_BTHD[:, last - n : -n], weight[n])
        return y


class NoConv(nn.Module):
    """In place of one."""

    def __init__(self, taps: int):
        super().__init__()
        self.taps = taps

    def forward(self, x_BTHD: Tensor) -> Tensor:
        return x_BTHD

    def of(self, x_BTHD: Tensor) -> Tensor:
        return x_BTHD[:, self.taps - 1 :]


class _ShortConv(torch.autograd.Function):
    """Tap by tap in place, on a CPU several times as fast as torch's own convolutions of one channel."""

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
