"""Softmax kernels against the reference in float64: torch's, the CPU's window kernel, flash-attn."""

import pytest
import torch

from gkachat.attention.kernels import flash, reference, sdpa, window_cpu
from gkachat.attention.qkv import QKV

T, D, H = 150, 16, 3


def drawn(dtype=torch.float64, T=T):
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(2, T, H, D, generator=generator, dtype=dtype).requires_grad_() for _ in range(3))
    return QKV(*tensors, scale=0.3)


def assert_is_the_reference(y, qkv, window, causal=True):
    expected = reference.attend(qkv, window=window, causal=causal, include_self=True)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for got, exact in zip(*(torch.autograd.grad(t, qkv[:3], dy) for t in (y, expected)), strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("window", [1, 5, 64, 65, 149, 150, 400, None])
def test_sdpa_and_the_window_kernel_see_the_window(window):
    qkv = drawn()
    assert_is_the_reference(sdpa.attend(qkv, window=window, causal=True), qkv, window)
    if window is not None:
        assert_is_the_reference(window_cpu.attend(qkv, window=window), qkv, window)


@pytest.mark.parametrize("window", [7, None])
def test_sdpa_without_the_causal_mask_looks_both_ways(window):
    qkv = drawn()
    assert_is_the_reference(sdpa.attend(qkv, window=window, causal=False), qkv, window, causal=False)


@pytest.mark.parametrize("returns_lse", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_flash_attention_gets_the_window_in_its_own_terms(returns_lse, window, causal):
    wanted = causal

    def flash_attn_func(q, k, v, softmax_scale, causal, window_size):
        """Softmax attention as flash-attn documents it: causal or not, -left <= j - i <= right where not -1."""
        assert causal is wanted
        left, right = window_size
        distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]
        seen = ((distance <= left) | (left == -1)) & ((-distance <= right) | (right == -1))
        seen &= (distance >= 0) | (not causal)
        scores = softmax_scale * torch.einsum("bihd,bjhd->bhij", q, k).masked_fill(~seen, -torch.inf)
        y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        return (y, None) if returns_lse else y

    qkv = drawn()
    y = flash.attend(qkv, window=window, causal=causal, flash_attn_func=flash_attn_func)
    assert_is_the_reference(y, qkv, window, causal)
