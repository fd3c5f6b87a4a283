"""Gaussian Kernel Attention fused in Triton: the operator with its gradient, and the block sizes that it chooses from.

gaussian_triton_kernels.py has the kernels and describes how they work. Imported only where it is used.
Axes: B batch, T time, H heads, D head_dim.
"""

from collections.abc import Callable
from functools import cache, wraps

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gkachat.attention.kernels.gaussian_triton_kernels import (
    INTERPRET,
    MIN_BLOCK,
    backward_kernel,
    backward_rows_kernel,
    backward_sum_kernel,
    bias_kernel,
    forward_kernel,
)
from gkachat.attention.qkv import QKV

PAD = 128  # a multiple of every block
ROWS = 64  # block of the kernels that work row by row
# Candidates (BM, BN, warps, pipeline stages) that the autotuner times on first use, by dtype and D. Triton 3.6 and 3.7
# compile all of them for sm_90 without spills, as test_gaussian_triton.py checks; results/kernels_sm90.md has figures
# of bfloat16 with the causal mask. float32 products are made of three in TF32, which take registers, so that their
# blocks are small.
FORWARD = {
    (torch.bfloat16, 64): [(128, 128, 8, 2), (128, 64, 8, 3)],
    (torch.bfloat16, 128): [(128, 128, 8, 2), (128, 64, 8, 3)],
    (torch.float32, 64): [(64, 32, 4, 2)],
    (torch.float32, 128): [(16, 32, 8, 1)],
}
# The third key is SEPARATE_F, which rope needs. BN below 64 would take the query part off Hopper's tensor cores.
BACKWARD = {
    (torch.bfloat16, 64, False): [(128, 64, 8, 2)],
    (torch.bfloat16, 64, True): [(64, 64, 8, 2)],
    (torch.bfloat16, 128, False): [(128, 64, 8, 2)],
    (torch.bfloat16, 128, True): [(64, 64, 8, 1)],
    (torch.float32, 64, False): [(32, 16, 4, 1)],
    (torch.float32, 64, True): [(32, 16, 8, 1)],
    (torch.float32, 128, False): [(16, 16, 8, 1)],
    (torch.float32, 128, True): [(16, 16, 8, 1)],
}
DESCRIPTORS = {forward_kernel: {"FQ": "BM", "FK": "BN", "X": "BN"},
               backward_kernel: {"FQ": "BN", "DY": "BN"}}  # fmt: skip
"""The block size of each descriptor that a kernel takes."""


def _candidates(table: dict, *key) -> tuple[tuple[int, int, int, int], ...]:
    """Return the candidates of a kernel; in the interpreter, where times mean nothing, the last of them."""
    return tuple(table[key][-1:] if INTERPRET.value else table[key])


@cache
def _tuned(kernel, candidates: tuple[tuple[int, int, int, int], ...], dtype: torch.dtype):
    """Return the kernel as one that times its candidates on first use. It is made once for each dtype."""

    def set_block_shapes(arguments: dict) -> None:
        for name, block in DESCRIPTORS[kernel].items():
            arguments[name].block_shape = [1, arguments[block], 1, arguments["D"]]

    configs = [
        triton.Config({"BM": BM, "BN": BN}, num_warps=warps, num_stages=stages, pre_hook=set_block_shapes)
        for BM, BN, warps, stages in candidates
    ]
    # What one candidate adds must not stay for the next one, or for the run that counts.
    added_to = [name for name in ("DF_SUM", "DS_SUM", "DSIGMA") if name in kernel.arg_names]
    key = ["D", "INCLUDE_SELF", "SEPARATE_F", "CAUSAL"]
    return triton.autotune(configs, key=key, reset_to_zero=added_to)(kernel)


def on_device_of_first(operator: Callable) -> Callable:
    """Return an operator that launches its kernels on the device of its first tensor, whichever device is current."""

    @wraps(operator)
    def launch(first: Tensor, *args):
        with torch.cuda.device_of(first):
            return operator(first, *args)

    return launch


def contiguous_channels(t: Tensor) -> Tensor:
    """Return t if the channels of each head are contiguous, as the kernels read them, and otherwise a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _aligned(t: Tensor) -> Tensor:
    """Return t, or a contiguous copy where a tensor descriptor could not describe it: it counts in 16 bytes."""
    steps = [t.data_ptr(), *(stride * t.element_size() for stride in t.stride()[:-1])]
    fits = t.stride(-1) == 1 and min(t.stride()) > 0 and all(step % 16 == 0 for step in steps)
    return t if fits else t.clone(memory_format=torch.contiguous_format)


def _descriptor(t: Tensor) -> TensorDescriptor:
    """Return a descriptor of (B, T, H, D). `_tuned` sets its number of rows."""
    return TensorDescriptor(t, [*t.shape], [*t.stride()], [1, 1, 1, t.size(-1)])


@torch.library.custom_op("gkachat::gka", mutates_args=())
@on_device_of_first
def gka(
    x: Tensor, f: Tensor | None, sigma: Tensor, window: int, include_self: bool, causal: bool
) -> tuple[Tensor, Tensor]:
    """Return y (B, T, H, D) and log2 of the row sums (B, H, T).

    x and f are (B, T, H, D), where f None stands for x; sigma is (H,) float32.
    """
    B, T, H, D = x.shape
    x, sigma = _aligned(x), sigma.contiguous()
    features = x if f is None else _aligned(f)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    T_pad = triton.cdiv(T, PAD) * PAD
    lse, bias = (x.new_empty(B, H, length, dtype=torch.float32) for length in (T, T_pad))
    if x.numel() == 0:
        return y, lse
    bias_kernel[(B * H * T_pad // ROWS,)](features, sigma, bias, *features.stride()[:3], T, T_pad, H, D=D, BLOCK=ROWS)
    kernel = _tuned(forward_kernel, _candidates(FORWARD, x.dtype, D), x.dtype)
    kernel[lambda meta: (B * H * triton.cdiv(T, meta["BM"]),)](
        _descriptor(features), _descriptor(features), _descriptor(x), bias, sigma, y, lse, T, T_pad, H, window,
        D=D, INCLUDE_SELF=include_self, SEPARATE_F=f is not None, CAUSAL=causal,
    )  # fmt: skip
    return y, lse


@torch.library.custom_op("gkachat::gka_backward", mutates_args=())
@on_device_of_first
def gka_backward(
    dy: Tensor, x: Tensor, f: Tensor | None, sigma: Tensor, y: Tensor, lse: Tensor,
    window: int, include_self: bool, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, f (empty where f is None) and sigma."""
    if x.numel() == 0:
        return torch.empty_like(y), y.new_empty(0) if f is None else torch.empty_like(y), torch.zeros_like(sigma)
    B, T, H, D = x.shape
    x, dy, sigma = _aligned(x), _aligned(dy), sigma.contiguous()
    separate_f = f is not None
    features = _aligned(f) if separate_f else x
    T_pad = triton.cdiv(T, PAD) * PAD
    bias, dot_lse, delta = lse.new_empty(3, B, H, T_pad)
    row_grid = (B * H * T_pad // ROWS,)
    backward_rows_kernel[row_grid](
        features, sigma, y, dy, lse, bias, dot_lse, delta, *features.stride()[:3], *dy.stride()[:3], T, T_pad, H,
        D=D, BLOCK=ROWS,
    )  # fmt: skip
    df_sum, ds_sum = lse.new_zeros(B, H, T_pad, D), lse.new_zeros(B, H, T_pad)
    dx = torch.empty_like(y) if separate_f else None
    # A number for each block of keys, and their sum has a fixed order. Zeros, because larger blocks are fewer.
    dsigma = lse.new_zeros(B, H, T_pad // MIN_BLOCK.value)
    kernel = _tuned(backward_kernel, _candidates(BACKWARD, x.dtype, D, separate_f), x.dtype)
    kernel[lambda meta: (B * H * triton.cdiv(T, meta["BM"]),)](
        _descriptor(features), features, x, _descriptor(dy), bias, dot_lse, delta, sigma, df_sum, ds_sum, dsigma, dx,
        *features.stride()[:3], *x.stride()[:3], T, T_pad, H, window,
        D=D, INCLUDE_SELF=include_self, SEPARATE_F=separate_f, CAUSAL=causal,
    )  # fmt: skip
    df = torch.empty_like(y)
    backward_sum_kernel[row_grid](features, df_sum, ds_sum, df, *features.stride()[:3], T, T_pad, H, D=D, BLOCK=ROWS)
    dx, df = (dx, df) if separate_f else (df, y.new_empty(0))
    return dx, df, dsigma.sum((0, 2))


@gka.register_fake
def _(x, f, sigma, window, include_self, causal):
    B, T, H, _ = x.shape
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(B, H, T, dtype=torch.float32)


@gka_backward.register_fake
def _(dy, x, f, sigma, y, lse, window, include_self, causal):
    return torch.empty_like(y), y.new_empty(0) if f is None else torch.empty_like(y), torch.empty_like(sigma)


def _save(ctx, inputs, output) -> None:
    x, f, sigma, ctx.window, ctx.include_self, ctx.causal = inputs
    ctx.save_for_backward(x, f, sigma, *output)


def _backward(ctx, dy: Tensor, _):
    x, f, sigma, y, lse = ctx.saved_tensors  # read once, as recomputed blocks allow no more
    dx, df, dsigma = gka_backward(dy, x, f, sigma, y, lse, ctx.window, ctx.include_self, ctx.causal)
    return dx, None if f is None else df, dsigma, None, None, None


gka.register_autograd(_backward, setup_context=_save)


def attend(qkv: QKV, *, window: int | None, causal: bool, include_self: bool) -> Tensor:
    """Return Gaussian attention where queries and keys are one tensor, (B, T, H, D). It reads qkv.k and not qkv.q.

    Rotated features are a tensor of their own, since rotating them in the kernel takes too much shared memory.
    """
    f = None if qkv.k is qkv.v else qkv.k
    T = qkv.v.size(1)
    window = T if window is None else min(window, T)  # sums of positions and a window have 32 bits
    return gka(qkv.v, f, qkv.sigma.float(), window, include_self, causal)[0]
