"""Softmax attention through torch's scaled_dot_product_attention, with a mask where there is a window."""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gkachat.attention.kernels.reference import visible
from gkachat.attention.qkv import QKV

# cuDNN's kernel first: on Hopper it is the fastest of those that come with torch.
SDPA_PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attend(qkv: QKV, *, window: int | None, causal: bool) -> Tensor:
    """Return softmax attention, (B, T, H, D). A window becomes a mask, and all T x T scores are computed."""
    T = qkv.q.size(1)
    q, k, v = (t.transpose(1, 2) for t in qkv[:3])
    mask = None if window is None or window >= T else visible(T, window, causal, device=q.device)
    if q.device.type == "cuda" and mask is None:
        with sdpa_kernel(SDPA_PRIORITY, set_priority=True):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=qkv.scale)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=qkv.scale)
    return y.transpose(1, 2)
