"""Softmax attention through the flash-attn packages: flash_attn_interface (version 3), flash_attn (version 2)."""

from collections.abc import Callable

from torch import Tensor

from gkachat.attention.qkv import QKV


def attend(qkv: QKV, *, window: int | None, causal: bool, flash_attn_func: Callable[..., Tensor]) -> Tensor:
    """Return softmax attention, (B, T, H, D).

    `flash_attn_func` is the package's function of that name, bound when the kernel is chosen: an import inside traced
    code would break the graph.
    """
    back = -1 if window is None else window - 1  # flash-attn counts the positions before self
    ahead = 0 if causal and back >= 0 else back
    y = flash_attn_func(*qkv[:3], softmax_scale=qkv.scale, causal=causal, window_size=(back, ahead))
    return y[0] if isinstance(y, tuple) else y  # some releases of version 3 return the log-sum-exp too
