"""The Gaussian kernel operator: its definition, and the fast route that computes the very same thing.

    f_i = R_i x_i (rope) or x_i;   s_ij = -||f_i - f_j||^2 / (2 sigma_h^2);   y_i = sum_j softmax_j(s_ij) x_j

A row's own norm cancels in the softmax, which leaves ordinary attention with one bias per key:

    y = softmax_j(f_i . f_j / sigma^2 - ||f_j||^2 / (2 sigma^2)) x

so appending the bias to the keys, and a one to the queries, hands GKA to any fused softmax attention kernel. Features
of one and the same norm need no bias at all. And a kernel of its own (triton_gka.py) reads keys and values in one.
Source: arXiv 2605.02144. Axes: B batch, T query time, S key time, H heads, D head_dim.
"""

import importlib.util
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gkachat.attention.features import Rope, apply_rope, cast, rms_norm
from gkachat.attention.fused import masked_attention, visible

TRITON_HEAD_DIMS = (64, 128)
TRITON_DTYPES = (torch.bfloat16, torch.float32)


def gaussian_kernel_attention(
    x: Tensor,
    sigma: Tensor,
    *,
    window: int | None = None,
    causal: bool = True,
    rope: Rope | None = None,
    include_self: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Kernel-weighted mean of each head's own channels over the visible tokens.

    Args:
        x: (B, T, H, D), features and payload in one; any floating dtype.
        sigma: (H,), bandwidths above 0, in the units of x.
        window: how many positions are seen, the token itself counted: 0 <= i - j < window when causal,
            |i - j| < window otherwise. None: no limit.
        causal: see j <= i only.
        rope: (cos, sin), each (T, D/2): rotates what is compared, never what is averaged.
        include_self: whether i is among its own keys. A row left without a key gives zeros.
        backend: "reference" (the definition, distances taken one by one), "sdpa" (fused softmax attention
            through the identity above), "triton" (its own kernel; bfloat16 or float32, heads of 64 or 128,
            on a GPU or under TRITON_INTERPRET=1), "auto" (the fastest of them that can).

    Returns:
        (B, T, H, D) in the dtype of x, differentiable in x and sigma.

    Raises:
        ValueError: for shapes, a window or a backend that do not fit.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x: given {tuple(x.shape)} {x.dtype}, expected a floating (B, T, H, D)")
    _, T, H, D = x.shape
    if sigma.shape != (H,):
        raise ValueError(f"sigma: given shape {tuple(sigma.shape)}, expected one bandwidth for each of {H} heads")
    if window is not None and window < 1:
        raise ValueError(f"window: given {window}, expected 1 or more, or None")
    if rope is not None and any(table.shape != (T, D // 2) for table in rope):
        raise ValueError(f"rope: given {[tuple(t.shape) for t in rope]}, expected (cos, sin) of shape {(T, D // 2)}")
    name, _ = choose(x.device, x.dtype, D, window=window, backend=backend)
    return BACKENDS[name](x, sigma, window, causal, rope, include_self)


@torch.compiler.assume_constant_result  # torch.compile cannot trace what it does
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    window: int | None = None,
    backend: str = "auto",
) -> tuple[str, str]:
    """Name of the back end for these, and why. ValueError when the one asked for does not exist or cannot."""
    obstacles = [
        text
        for holds, text in (
            (not _has_triton(), "triton is not installed"),
            (
                # Nothing runs on the meta device: models are counted there.
                device.type not in ("cuda", "meta") and os.environ.get("TRITON_INTERPRET") != "1",
                f"the device is {device.type}",
            ),
            (dtype not in TRITON_DTYPES, f"the dtype is {dtype}"),
            (head_dim not in TRITON_HEAD_DIMS, f"heads have {head_dim} channels, not 64 or 128"),
        )
        if holds
    ]
    if backend == "triton" and obstacles:
        raise ValueError(f"backend: given 'triton', which cannot run here: {'; '.join(obstacles)}")
    if backend == "auto":
        if not obstacles and device.type == "cuda":
            return "triton", "one read of x serves keys and values"
        slow = "" if window is None or device.type == "cpu" else "; it computes all T x T scores of a short window"
        return "sdpa", f"softmax attention with a bias per key; no triton kernel: {'; '.join(obstacles)}{slow}"
    if backend not in BACKENDS:
        raise ValueError(f"backend: given {backend!r}, expected one of auto, {', '.join(BACKENDS)}")
    return backend, "as asked for"


def _reference(
    x: Tensor, sigma: Tensor, window: int | None, causal: bool, rope: Rope | None, include_self: bool
) -> Tensor:
    """The definition, in float32 at least."""
    weights_BHTS, _ = kernel_weights(x, sigma, window, causal, rope, include_self)
    return (weights_BHTS @ x.to(weights_BHTS.dtype).transpose(1, 2)).transpose(1, 2).to(x.dtype)


def kernel_weights(
    x: Tensor, sigma: Tensor, window: int | None, causal: bool, rope: Rope | None, include_self: bool
) -> tuple[Tensor, Tensor]:
    """The weights and the squared distances, each (B, H, T, S), from differences and not from norms.

    In float32 at least; a row without a key has no weights.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, sigma.dtype), torch.float32)
    f_BHTD = (x.to(dtype) if rope is None else apply_rope(x.to(dtype), rope)).transpose(1, 2)
    distances_BHTS = torch.cdist(f_BHTD, f_BHTD, compute_mode="donot_use_mm_for_euclid_dist").square()
    scores_BHTS = -distances_BHTS / (2 * sigma.to(dtype).square()[:, None, None])
    mask = visible(x.size(1), window, causal, include_self, x.device)
    keyless = ~mask.any(dim=1, keepdim=True)
    weights_BHTS = scores_BHTS.masked_fill(~mask, -torch.inf).masked_fill(keyless, 0).softmax(dim=-1)
    return weights_BHTS.masked_fill(keyless, 0), distances_BHTS


def normalised_kernel_attention(
    x: Tensor, sigma: Tensor, rope: Rope | None, *, attend: Callable[..., Tensor], window: int | None
) -> Tensor:
    """GKA on features of unit root mean square, by a softmax attention kernel as it is.

    All keys have the same norm, so their biases cancel. What the kernel's backward then lacks, the derivative of the
    norms, points along x and is exactly what the backward of rms_norm takes away: hence both in one function.

    Args:
        x: (B, T, H, D), not normalised yet.
        attend: a softmax attention, (q, k, v, window=, scale=) -> y.
    """
    x = rms_norm(x)
    f = x if rope is None else apply_rope(x, rope)
    q = (f * sigma.square().reciprocal()[:, None]).to(x.dtype)
    return attend(q, f, x, window=window, scale=1.0)


class _Scaled(torch.autograd.Function):
    """q = f / sigma and its bias -|q|^2 / 2, in float32 at least; of them the backward keeps q alone."""

    @staticmethod
    def forward(ctx, f: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(f.dtype, torch.float32)
        q = cast(cast(f, wide) / cast(sigma, wide)[:, None], f.dtype)
        ctx.save_for_backward(q, sigma)
        # The norm is that of the very numbers that enter the dot product: only then do rounding errors cancel.
        return q, -0.5 * cast(q, wide).square().sum(dim=-1, keepdim=True)

    @staticmethod
    def backward(ctx, dq: Tensor, dbias: Tensor) -> tuple[Tensor, Tensor]:
        q, sigma = ctx.saved_tensors
        wide = dbias.dtype
        dq, q = cast(dq, wide), cast(q, wide)
        dq = dq - dbias * q
        dsigma = -(dq * q).sum((0, 1, 3)) / sigma
        return cast(dq / cast(sigma, wide)[:, None], ctx.saved_tensors[0].dtype), cast(dsigma, sigma.dtype)


def _sdpa(x: Tensor, sigma: Tensor, window: int | None, causal: bool, rope: Rope | None, include_self: bool) -> Tensor:
    """Fused softmax attention on q = (f / sigma, 1 ...), k = (f / sigma, bias ...), v = (x, 0 ...)."""
    D = x.size(-1)
    q, bias = _Scaled.apply(x if rope is None else apply_rope(x, rope), sigma)
    high = bias.to(x.dtype)
    columns = [high] if x.dtype == bias.dtype else [high, (bias - high.to(bias.dtype)).to(x.dtype)]
    # Kernels want head sizes in multiples of 8, and want v as wide as q and k.
    zeros = x.new_zeros(*x.shape[:-1], -(D + len(columns)) % 8)
    ones = x.new_ones(*x.shape[:-1], len(columns))
    k = torch.cat((q, *columns, zeros), dim=-1)
    v = F.pad(x, (0, k.size(-1) - D))
    q = torch.cat((q, ones, zeros), dim=-1)
    return masked_attention(q, k, v, window=window, causal=causal, include_self=include_self, scale=1.0)[..., :D]


def _triton(
    x: Tensor, sigma: Tensor, window: int | None, causal: bool, rope: Rope | None, include_self: bool
) -> Tensor:
    """The fused kernel. Features are rotated beforehand: rotating them in the kernel does not fit a tile's memory."""
    from gkachat.attention.kernels.gaussian_triton import gka

    f = None if rope is None else apply_rope(x, rope)
    return gka(x, f, sigma.float(), x.size(1) if window is None else window, include_self, causal)[0]


BACKENDS = {"sdpa": _sdpa, "triton": _triton, "reference": _reference}
