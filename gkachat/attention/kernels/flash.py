"""Softmax attention through FlashAttention, version 3 on a Hopper or version 2, where a build of it is installed."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gkachat.attention.qkv import QKV
from gkachat.machine import is_nvidia

HUB_BUILD = "kernels-community/flash-attn3"  # prebuilt for recent versions of torch and CUDA
HUB_VERSION = 1  # the version of its interface, which decides which builds fit


class Flash(NamedTuple):
    """A version of FlashAttention, and where it comes from."""

    name: str
    reason: str
    flash_attn_func: Callable[..., Tensor]


def attend(qkv: QKV, *, window: int | None, causal: bool, flash_attn_func: Callable[..., Tensor]) -> Tensor:
    """Return softmax attention, (B, T, H, D).

    `flash_attn_func` is the package's function of that name, bound when the kernel is chosen: an import inside traced
    code would break the graph.
    """
    back = -1 if window is None else window - 1  # flash-attn counts the positions before self
    ahead = 0 if causal and back >= 0 else back
    y = flash_attn_func(*qkv[:3], softmax_scale=qkv.scale, causal=causal, window_size=(back, ahead))
    return y[0] if isinstance(y, tuple) else y  # some releases of version 3 return the log-sum-exp too


@cache  # for all layers: asking the hub takes seconds
def find(device: torch.device) -> tuple[Flash | None, str]:
    """Return the newest FlashAttention that runs on a CUDA device, and why newer ones or all of them do not.

    On a Hopper, version 3 comes from the package flash_attn_interface or, through the package kernels, from the
    Hugging Face hub. On an Ampere or later, version 2 comes from the package flash_attn.
    """
    if not is_nvidia(device):
        return None, "FlashAttention has not been tried on AMD GPUs"
    major, failures = torch.cuda.get_device_capability(device)[0], []
    hub = f"{HUB_BUILD} from the Hugging Face hub"
    candidates = [
        (major == 9, "flash_attn_interface", "flash-attention-3", "installed, and the device is a Hopper", _installed),
        (major == 9, "kernels", "flash-attention-3", f"{hub}, and the device is a Hopper", _from_hub),
        (major >= 8, "flash_attn", "flash-attention-2", "installed", _installed),
    ]
    for fits, package, name, reason, load in candidates:
        if fits and importlib.util.find_spec(package) is not None:
            try:
                flash_attn_func = load(package)
                _trace(flash_attn_func, device)
            except Exception as error:  # no network, no build for this torch, a broken build: errors of any type
                source = hub if load is _from_hub else f"the package {package}"
                message = (str(error).strip() or type(error).__name__).splitlines()[0]
                failures.append(f"{name} cannot be used, {source}: {message}")
            else:
                return Flash(name, reason, flash_attn_func), "; ".join(failures)
    return None, "; ".join(failures) or "no flash-attn for this device is installed"


def _installed(package: str) -> Callable[..., Tensor]:
    return importlib.import_module(package).flash_attn_func


def _from_hub(package: str) -> Callable[..., Tensor]:
    return importlib.import_module(package).get_kernel(HUB_BUILD, version=HUB_VERSION).flash_attn_func


def _trace(flash_attn_func: Callable[..., Tensor], device: torch.device) -> None:
    """Run forward and backward on tensors without data, as torch.compile does. Raises what it would raise."""
    with FakeTensorMode():
        x = torch.empty(1, 128, 1, 128, dtype=torch.bfloat16, device=device, requires_grad=True)
        y = attend(QKV(x, x, x), window=64, causal=True, flash_attn_func=flash_attn_func)
        torch.autograd.grad(y.sum(), x)
