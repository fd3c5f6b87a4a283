"""Choice of the kernel that a layer runs on, made once when the model is placed on a device, with the reason.

    kernel = choose_kernel(KernelSpec(head_dim=128, sequence_len=2048, window=512), device, dtype)
    y = kernel.attend(qkv)                                # training and prefill
    print(kernel.name, kernel.reason)

`choose_decode_kernel` chooses for new tokens that attend to a cache: `kernel.attend(qkv, slices)`.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gkachat.attention.kernels import decode, flash, gaussian_sdpa, reference, sdpa, window_cpu
from gkachat.machine import multiplies_faster_from_the_left, no_triton

HALF = (torch.bfloat16, torch.float16)
TRITON_HEAD_DIMS = (64, 128)
TRITON_DTYPES = (torch.bfloat16, torch.float32)
GAUSSIAN_BACKENDS = ("sdpa", "triton", "reference")
# Here: torch.compile cannot trace a search for packages, nor a question about the CPU.
HAS_TRITON = importlib.util.find_spec("triton") is not None
QUERIES_FIRST = multiplies_faster_from_the_left()


@dataclass(frozen=True)
class KernelSpec:
    """Properties of a layer that decide which kernel runs it."""

    head_dim: int
    sequence_len: int
    window: int | None = None
    """Visible positions, the token itself included; None: no limit."""
    causal: bool = True
    include_self: bool = True
    gaussian: bool = False
    """Whether scores are those of a Gaussian kernel instead of scaled dot products."""
    shared_qk: bool = True
    """Whether queries and keys of Gaussian scores are one tensor."""
    unit_norm: bool = False
    """Whether all queries and keys have the same norm."""
    backend: str = "auto"
    """Kernel of Gaussian scores: sdpa, triton, reference, or auto, the fastest that can run."""

    @property
    def mask(self) -> dict[str, int | bool | None]:
        """The options that decide which keys a query sees."""
        return {"window": self.window, "causal": self.causal, "include_self": self.include_self}


@dataclass(frozen=True)
class Kernel:
    """A function that computes attention, its name, and why it was chosen."""

    name: str
    reason: str
    attend: Callable[..., Tensor]


def choose_kernel(spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> Kernel:
    """Return the fastest exact kernel; `attend(qkv)` gives (B, T, H, D).

    Raises ValueError for a backend that does not exist or cannot run here.
    """
    if not spec.gaussian:
        return _softmax_kernel(spec, device, dtype)
    if spec.unit_norm and spec.include_self and spec.backend == "auto":
        softmax = _softmax_kernel(spec, device, dtype)
        attend = partial(gaussian_sdpa.attend_unit_norm, softmax_attend=softmax.attend)
        return Kernel(f"softmax {softmax.name}", f"normalised features need no key bias; {softmax.reason}", attend)
    return _gaussian_kernel(spec, device, dtype)


def choose_padded_kernel(spec: KernelSpec) -> Kernel:
    """Return the kernel of Gaussian scores with a bias per key; `attend(qkv, key_bias_BS)` gives (B, T, H, D).

    The bias is -inf for a key that is ignored. A token that sees no other key gets 0.
    """
    if spec.unit_norm:
        softmax_attend = partial(gaussian_sdpa.softmax_attention, **spec.mask)
        attend = partial(gaussian_sdpa.attend_unit_norm, softmax_attend=softmax_attend)
    else:
        attend = partial(gaussian_sdpa.attend, **spec.mask)
    return Kernel("sdpa", "padding is a mask", attend)


def choose_decode_kernel(head_dim: int, device: torch.device, dtype: torch.dtype) -> Kernel:
    """Return the fastest kernel for new tokens that attend to a cache; `attend(qkv, slices)` gives (B, T, H, D)."""
    obstacles = _obstacles(
        (no_triton(device) is not None, no_triton(device)),
        (not HAS_TRITON, "triton is not installed"),
        (dtype not in (*HALF, torch.float32), f"the dtype is {dtype}"),
        (head_dim > 256, f"heads have {head_dim} channels, more than 256"),
    )
    if obstacles:
        attend = partial(decode.attend, queries_first=QUERIES_FIRST)
        return Kernel("torch", f"no triton kernel: {'; '.join(obstacles)}", attend)
    from gkachat.attention.kernels import decode_triton

    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    attend = partial(decode_triton.attend, multiprocessors=multiprocessors)
    return Kernel("triton", "reads each key once, split over the device; several new tokens a row run on torch", attend)


def plain_kernels(scores: reference.Scores, spec: KernelSpec) -> tuple[Kernel, Kernel]:
    """Return a kernel and a decode kernel in plain PyTorch, for a layer with a score function of its own."""
    attends = (
        partial(reference.attend, scores=scores, **spec.mask),
        partial(reference.attend_cached, scores=scores),
    )
    return tuple(Kernel("reference", "the layer defines its own scores", attend) for attend in attends)


def _softmax_kernel(spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> Kernel:
    window = None if spec.window is None or spec.window >= spec.sequence_len else spec.window
    through_sdpa = partial(sdpa.attend, window=window, causal=spec.causal)
    if device.type != "cuda":
        if window is None or device.type != "cpu" or not spec.causal:
            return Kernel("sdpa", f"torch's kernel on {device.type}", through_sdpa)
        reason = f"window {window} on a CPU: cost follows T x window"
        return Kernel("window_cpu", reason, partial(window_cpu.attend, window=window))
    why = f"no flash-attn for {dtype} and heads of {spec.head_dim} channels"
    if dtype in HALF and spec.head_dim <= 256 and spec.head_dim % 8 == 0:
        found, why = flash.find(device)
        if found is not None:
            function = found.flash_attn_func
            attend = partial(flash.attend, window=window, causal=spec.causal, flash_attn_func=function)
            return Kernel(found.name, "; ".join(filter(None, (found.reason, why))), attend)
    if window is None or not spec.causal:
        which = "full window" if window is None else f"window {window} on both sides, masked"
        return Kernel("sdpa", f"{which}; {why}", through_sdpa)
    from gkachat.attention.kernels.flex import FlexAttention  # imports torch's compiler, which takes as long as torch

    flex = FlexAttention(window, spec.sequence_len, device)
    return Kernel("flex", f"window {window}; {why}", flex.attend)


def _gaussian_kernel(spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> Kernel:
    obstacles = _obstacles(
        (not HAS_TRITON, "triton is not installed"),
        (
            # Nothing runs on the meta device: models are counted there.
            no_triton(device) is not None and device.type != "meta" and os.environ.get("TRITON_INTERPRET") != "1",
            no_triton(device),
        ),
        (dtype not in TRITON_DTYPES, f"the dtype is {dtype}"),
        (spec.head_dim not in TRITON_HEAD_DIMS, f"heads have {spec.head_dim} channels, not 64 or 128"),
        (not spec.shared_qk, "queries and keys differ"),
    )
    name, reason = spec.backend, "asked for by name"
    if name == "auto":
        if not obstacles and device.type == "cuda":
            name, reason = "triton", "one read of x serves keys and values"
        else:
            slow = spec.window is not None and device.type != "cpu"
            why = "; ".join(obstacles) or f"the device is {device.type}"
            name, reason = "sdpa", f"softmax attention with a bias per key; no triton kernel: {why}"
            reason += "; it computes all T x T scores of a short window" if slow else ""
    if name not in GAUSSIAN_BACKENDS:
        raise ValueError(f"backend: given {name!r}, expected one of auto, {', '.join(GAUSSIAN_BACKENDS)}")
    if name == "triton" and obstacles:
        raise ValueError(f"backend: given 'triton', which cannot run here: {'; '.join(obstacles)}")
    module = gaussian_sdpa if name == "sdpa" else reference
    if name == "triton":
        from gkachat.attention.kernels import gaussian_triton as module
    return Kernel(name, reason, partial(module.attend, **spec.mask))


def _obstacles(*checks: tuple[bool, str]) -> list[str]:
    """Return the text of each check that is true."""
    return [text for holds, text in checks if holds]
