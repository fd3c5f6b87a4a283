"""Attention: the layers that a model chooses from, their features and kernels, and the key/value cache."""

import importlib

from gkachat.attention.base import Attention, AttentionWeights
from gkachat.attention.gka import GaussianKernelAttention, gaussian_kernel_attention
from gkachat.attention.gka_conv import GKAConv
from gkachat.attention.multihead import MultiheadGKA
from gkachat.attention.qkv import QKV
from gkachat.attention.softmax import SoftmaxAttention
from gkachat.config import ATTENTIONS

__all__ = [
    "QKV",
    "Attention",
    "AttentionWeights",
    "GKAConv",
    "GaussianKernelAttention",
    "MultiheadGKA",
    "SoftmaxAttention",
    "attention_class",
    "gaussian_kernel_attention",
    "register",
]


def attention_class(name: str) -> type[Attention]:
    """Return the attention layer of that name. Raises ValueError for a name that does not exist."""
    if name not in ATTENTIONS:
        raise ValueError(f"attention: given {name!r}, expected one of {', '.join(ATTENTIONS)}")
    entry = ATTENTIONS[name]
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        return getattr(importlib.import_module(module), attribute)
    return entry


def register(name: str, layer: type[Attention]) -> None:
    """Add an attention under a name that configs can give (docs/attention.md). Raises ValueError for a taken name."""
    if name in ATTENTIONS:
        raise ValueError(f"attention {name!r} exists already; choose another name than {', '.join(ATTENTIONS)}")
    ATTENTIONS[name] = layer
