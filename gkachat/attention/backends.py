"""Which kernel an attention layer runs on: decided once, when a model is put on its device, and told with the reason.

    backend = softmax_backend(device, dtype, head_dim=128, window=512, sequence_len=2048)
    y = backend.attend(q, k, v, window=512, scale=128**-0.5)
    print(backend.name, backend.reason)

`gka_backend` does the same for Gaussian Kernel Attention; there `backend.attend(x, sigma, rope)` gives y. What decoding
runs on is `decode_backend`, one for both: `backend.attend(q, seen, scale)`, as cache.attend.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gkachat.attention import cache, fused
from gkachat.attention.features import Rope, rms_norm
from gkachat.attention.operator import choose, gaussian_kernel_attention, normalised_kernel_attention
from gkachat.config import GKAConfig

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    name: str
    reason: str
    attend: Callable[..., Tensor]


def softmax_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    window: int | None,
    sequence_len: int,
    causal: bool = True,
) -> Backend:
    """The fastest softmax attention for these; `attend(q, k, v, window=, scale=)`, each (B, T, H, D)."""
    if window is not None and window >= sequence_len:
        window = None
    sdpa = partial(fused.sdpa, causal=causal)
    if device.type != "cuda":
        if window is None or device.type != "cpu" or not causal:
            return Backend("sdpa", f"torch's kernel on {device.type}", sdpa)
        return Backend("blocks", f"window {window} on a CPU: cost follows T x window", fused.blocks)
    if dtype in HALF and head_dim <= 256 and head_dim % 8 == 0:
        major = torch.cuda.get_device_capability(device)[0]
        if major == 9 and importlib.util.find_spec("flash_attn_interface"):
            attend = partial(fused.flash, module="flash_attn_interface", causal=causal)
            return Backend("flash-attention-3", "installed, and the device is a Hopper", attend)
        if major >= 8 and importlib.util.find_spec("flash_attn"):
            return Backend("flash-attention-2", "installed", partial(fused.flash, module="flash_attn", causal=causal))
    if window is None or not causal:
        window = "full window" if window is None else f"window {window} on both sides, masked"
        return Backend("sdpa", f"{window}; no flash-attn for this device and dtype", sdpa)
    flex = fused.Flex(window, sequence_len, device)
    return Backend("flex", f"window {window}; no flash-attn for this device and dtype", flex)


def gka_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    window: int | None,
    sequence_len: int,
    options: GKAConfig,
    causal: bool = True,
) -> Backend:
    """The fastest exact GKA for these; `attend(x, sigma, rope)`, x (B, T, H, D). ValueError for one that cannot be."""
    if options.normalize and options.include_self and options.backend == "auto":
        softmax = softmax_backend(device, dtype, head_dim, window, sequence_len, causal)
        attend = partial(normalised_kernel_attention, attend=softmax.attend, window=window)
        reason = f"normalised features need no key bias; {softmax.reason}"
        name = f"softmax {softmax.name}"
    else:
        name, reason = choose(device, dtype, head_dim, window=window, backend=options.backend)
        attend = partial(
            _kernel_attention, window=window, causal=causal, include_self=options.include_self,
            backend=name, normalize=options.normalize,
        )  # fmt: skip
    return Backend(name, reason, attend if options.rope else partial(_without_rope, attend))


def decode_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The fastest attention of new tokens to cached ones; `attend(q, seen, scale)`, q (B, T, H, D)."""
    obstacles = (
        (device.type != "cuda", f"the device is {device.type}"),
        (importlib.util.find_spec("triton") is None, "triton is not installed"),
        (dtype not in (*HALF, torch.float32), f"the dtype is {dtype}"),
        (head_dim > 256, f"heads have {head_dim} channels, more than 256"),
    )
    if found := [text for holds, text in obstacles if holds]:
        return Backend("torch", f"no triton kernel: {'; '.join(found)}", cache.attend)
    from gkachat.attention import triton_decode

    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    attend = partial(triton_decode.attend, multiprocessors=multiprocessors)
    return Backend("triton", "reads each key once, split over the device; several new tokens a row: torch", attend)


def _kernel_attention(x: Tensor, sigma: Tensor, rope: Rope | None, *, normalize: bool, **options) -> Tensor:
    return gaussian_kernel_attention(rms_norm(x) if normalize else x, sigma, rope=rope, **options)


def _without_rope(attend: Callable[..., Tensor], x: Tensor, sigma: Tensor, rope: Rope | None) -> Tensor:
    return attend(x, sigma, None)
