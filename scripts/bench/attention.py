"""Attention operators and layers that scripts.bench_attention times against each other."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gkachat.attention import QKV, attention_class
from gkachat.attention.features import rms_norm, rope_table
from gkachat.attention.kernels import flash, gaussian_sdpa
from gkachat.attention.kernels.choose import Kernel, KernelSpec, choose_kernel
from gkachat.attention.kernels.reference import visible
from gkachat.benchmark import benchmark
from gkachat.config import GKAConfig, GPTConfig

Shape = tuple[int, int, int, int]
"""(B, T, H, D)"""

Contestants = dict[str, tuple[Callable[..., Tensor], list[Tensor]]]
"""Functions and the inputs that they are called with, by name. Softmax comes first."""

GKA_VARIANTS = {"gka": GKAConfig(), "gka normalised": GKAConfig(normalize=True)}
MAX_NAIVE_BYTES = 16 * 2**30  # the naive operator is left out where its T x T tensors would take more


def operators(shape: Shape, window: int | None, device: torch.device, dtype: torch.dtype) -> Contestants:
    """Return the attention operators; inputs and outputs are (B, T, H, D)."""
    B, T, H, D = shape
    q, k, v, x = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(4))
    sigma = torch.full((H,), math.sqrt(D / 2), device=device, requires_grad=True)
    softmax = choose_kernel(KernelSpec(D, T, window), device, dtype)
    found: Contestants = {f"softmax ({softmax.name})": (partial(softmax_operator, softmax), [q, k, v])}
    for name, options in GKA_VARIANTS.items():
        kernel = choose_kernel(KernelSpec(D, T, window, gaussian=True, unit_norm=options.normalize), device, dtype)
        found[f"{name} ({kernel.name})"] = (partial(gka_operator, kernel, options.normalize), [x, sigma])
    if device.type == "cuda":
        for name, attend in other_gka_kernels(T, window, device).items():
            contestant = (partial(gka_operator, Kernel(name, "", attend), False), [x, sigma])
            if runs(f"gka ({name})", *contestant):
                found[f"gka ({name})"] = contestant
    if 8 * B * H * T * T * torch.float32.itemsize <= MAX_NAIVE_BYTES:
        found["gka naive"] = (partial(naive, mask=visible(T, window, device=device)), [x, sigma])
    return found


def runs(name: str, function: Callable[..., Tensor], inputs: list[Tensor]) -> bool:
    """Return whether a function runs forward and backward. Print why it is left out where it does not."""
    try:
        passes(function, inputs)[1]()
    except Exception as error:  # packages raise their own kinds for what they do not support
        reason = str(error).strip() or type(error).__name__
        print(f"left out: {name}: {reason.splitlines()[0]}")
        return False
    return True


def other_gka_kernels(T: int, window: int | None, device: torch.device) -> dict[str, Callable[[QKV], Tensor]]:
    """Return kernels that compute GKA besides the one that layers run on, by name."""

    def sees(b, h, i, j):
        return (i >= j) & (i - j < (window or T))

    mask = create_block_mask(sees, None, None, T, T, device=device)
    compiled_flex = torch.compile(flex_attention, dynamic=False)
    newest_flash, no_flash = flash.find(device)

    def flex(qkv: QKV) -> Tensor:
        q, bias = (t.transpose(1, 2) for t in gaussian_sdpa.scaled_with_bias(qkv))
        bias = bias.squeeze(-1).contiguous()

        def add_bias(score, b, h, i, j):
            return score + bias[b, h, j]

        v = qkv.v.transpose(1, 2)
        return compiled_flex(q, q, v, score_mod=add_bias, block_mask=mask, scale=1.0).transpose(1, 2)

    def through_sdpa(backend: SDPBackend, qkv: QKV) -> Tensor:
        with sdpa_kernel(backend):
            return gaussian_sdpa.attend(qkv, window=window, causal=True, include_self=True)

    def through_flash(qkv: QKV) -> Tensor:
        if newest_flash is None:
            raise ImportError(no_flash)
        wide = QKV(*gaussian_sdpa.bias_as_channels(qkv), scale=1.0)
        y = flash.attend(wide, window=window, causal=True, flash_attn_func=newest_flash.flash_attn_func)
        return y[..., : qkv.v.size(-1)]

    return {
        "flex, bias in the score": flex,
        "cudnn, bias as channels": partial(through_sdpa, SDPBackend.CUDNN_ATTENTION),
        "flash of torch, bias as channels": partial(through_sdpa, SDPBackend.FLASH_ATTENTION),
        f"{newest_flash.name if newest_flash else 'flash-attention'}, bias as channels": through_flash,
    }


def softmax_operator(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return kernel.attend(QKV(q, k, v, scale=q.size(-1) ** -0.5))


def gka_operator(kernel: Kernel, normalize: bool, x: Tensor, sigma: Tensor) -> Tensor:
    x = rms_norm(x) if normalize else x
    return kernel.attend(QKV(x, x, x, sigma=sigma))


def naive(x_BTHD: Tensor, sigma_H: Tensor, mask: Tensor) -> Tensor:
    """Compute GKA literally: all squared distances, the kernel, the mask, the division by the row's sum."""
    x = x_BTHD.transpose(1, 2)
    norms = x.float().square().sum(-1, keepdim=True)
    distances = norms + norms.mT - 2 * x @ x.mT
    weights = torch.exp(-distances / (2 * sigma_H.square()[:, None, None])) * mask
    return ((weights / weights.sum(-1, keepdim=True)).to(x.dtype) @ x).transpose(1, 2)


def sublayers(shape: Shape, window: int | None, device: torch.device, dtype: torch.dtype) -> Contestants:
    """Return whole attention layers with their norm and projections; inputs and outputs are (B, T, C)."""
    B, T, H, D = shape
    idx, rope = torch.zeros(B, T, dtype=torch.long, device=device), rope_table(T, D, device)
    found: Contestants = {}
    for name, options in {"softmax": GKAConfig(), **GKA_VARIANTS}.items():
        attention = "softmax" if name == "softmax" else "gka"
        config = GPTConfig(
            depth=1, attention=attention, vocab_size=2, sequence_len=max(2, T), n_embd=H * D, head_dim=D,
            value_embeddings=False, gka=options,
        )  # fmt: skip
        with device:
            layer = attention_class(attention)(config, 0)
        layer.window = window
        layer.choose_kernels(device, dtype)
        layer.init_weights()
        torch.nn.init.normal_(layer.c_proj.weight, std=(H * D) ** -0.5)
        x = torch.randn(B, T, H * D, device=device, dtype=dtype).requires_grad_()

        def forward(x: Tensor, *parameters: Tensor, layer=layer) -> Tensor:
            return layer(rms_norm(x), idx, rope)

        found[f"{name} ({layer.kernel.name})"] = (forward, [x, *layer.parameters()])
    return found


LEVELS = {"operator": operators, "sublayer": sublayers}


def passes(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Callable, Callable]:
    """Return a function that runs the forward, as in training, and one that runs forward and backward."""
    dy = torch.randn_like(function(*inputs).detach())
    return lambda: function(*inputs), lambda: torch.autograd.grad(function(*inputs), inputs, dy)


def bound(
    name: str, sublayer: bool, shape: Shape, window: int | None, dtype: torch.dtype, peaks: tuple[float, float]
) -> tuple[float, float]:
    """Return the FLOPs of forward and backward, and the least seconds they take at the measured peaks.

    The operator has two products forward and five backward over the visible pairs. Softmax moves q, k, v, y and their
    gradients; GKA moves x, y and theirs. A projection has three products of (B T, C) x (C, C).
    """
    B, T, H, D = shape
    w = T if window is None else min(window, T)
    pairs = w * (w + 1) // 2 + (T - w) * w
    softmax, tensor_bytes = name.startswith("softmax"), B * T * H * D * dtype.itemsize
    stages = [(14 * B * H * D * pairs, (12 if softmax else 6) * tensor_bytes)]
    if sublayer:
        projections = 4 if softmax else 1
        stages.append((6 * projections * B * T * (H * D) ** 2, 6 * projections * tensor_bytes))
    seconds = sum(max(flops / peaks[0], moved / peaks[1]) for flops, moved in stages)
    return sum(flops for flops, _ in stages), seconds


# All calls share the compilations of a function. Above torch's limit of 8 it would run uncompiled, and not say so.
@torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
def measure(
    level: str, shape: Shape, window: int | None, device: torch.device, dtype: torch.dtype,
    peaks: tuple[float, float], compiled: bool, rounds: int,
) -> list[dict]:  # fmt: skip
    """Time all contestants of one shape; return a row of the table for each."""
    found = LEVELS[level](shape, window, device, dtype)
    contestants = {}
    for name, (function, inputs) in found.items():
        if compiled and "naive" not in name:
            function = torch.compile(function, dynamic=False)
        contestants[name, "forward"], contestants[name, "both"] = passes(function, inputs)
    timings = benchmark(contestants, device, rounds)
    softmax, rows = timings[next(iter(found)), "both"], []
    for name in found:
        forward, both = timings[name, "forward"], timings[name, "both"]
        flops, least = bound(name, level == "sublayer", shape, window, dtype, peaks)
        rows.append(
            {
                "level": level, "shape": list(shape), "window": window, "name": name,
                "forward_ms": 1e3 * forward.median, "backward_ms": 1e3 * (both.median - forward.median),
                "both_ms": 1e3 * both.median, "both_low_ms": 1e3 * both.low, "both_high_ms": 1e3 * both.high,
                "time_over_softmax": both.median / softmax.median,
                "tflops": flops / both.median / 1e12, "of_matrix_peak": flops / both.median / peaks[0],
                "of_bound": least / both.median, "peak_mib": both.peak_mib,
            }
        )  # fmt: skip
    return rows


COLUMNS = {
    "": "{name}",
    "forward ms": "{forward_ms:.2f}",
    "backward ms": "{backward_ms:.2f}",
    "both ms (low to high)": "{both_ms:.2f} ({both_low_ms:.2f} to {both_high_ms:.2f})",
    "over softmax": "{time_over_softmax:.3f}",
    "TFLOP/s": "{tflops:.3g}",
    "of peak": "{of_matrix_peak:.2f}",
    "of bound": "{of_bound:.2f}",
    "peak MiB": "{peak_mib:.0f}",
}
