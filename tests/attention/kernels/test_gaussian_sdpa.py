"""The Gaussian kernel through softmax kernels: features of one norm, and what is saved for the backward.

test_gaussian_kernel_attention.py holds the kernel with a bias per key against the definition.
"""

import pytest
import torch

from gkachat.attention.features import apply_rope, rms_norm, rope_table
from gkachat.attention.gka import GaussianKernelAttention
from gkachat.attention.kernels import reference
from gkachat.attention.kernels.choose import KernelSpec, choose_kernel
from gkachat.attention.qkv import QKV
from gkachat.config import GKAConfig, GPTConfig

CPU = torch.device("cpu")
T, D, H = 150, 16, 3


def drawn():
    x = torch.randn(2, T, H, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.requires_grad_(), torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)


def rope64():
    """Tables in float64 from the angle on. float32's rotation changes norms by 1e-8."""
    cos, sin = rope_table(T, D)
    angles = torch.atan2(sin.double(), cos.double())
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("window", [40, None])
def test_normalised_features_need_no_gradient_of_their_bias(rope, window, causal):
    """The backward of a softmax kernel lacks a radial part, and the backward of the norm removes it."""
    if not causal and window is not None:
        pytest.skip("image models have no windows")
    x, sigma = drawn()
    tables = rope64() if rope else None
    mask = {"window": window, "causal": causal}
    kernel = choose_kernel(KernelSpec(D, T, **mask, gaussian=True, unit_norm=True), CPU, x.dtype)
    assert kernel.name.startswith("softmax ")

    def gradients(y, of):  # of a y whose channels weigh differently; the graph is kept
        return torch.autograd.grad(y, (of, sigma), torch.ones_like(y) * torch.linspace(-1, 1, D, dtype=y.dtype), True)

    def outputs(unit):
        f = apply_rope(unit, tables)
        qkv = QKV(f, f, unit, sigma=sigma)
        return kernel.attend(qkv), reference.attend(qkv, **mask, include_self=True)

    y, expected = outputs(rms_norm(x))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for got, exact in zip(gradients(y, x), gradients(expected, x), strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-10)

    # Without the norm's backward the gradients differ, along x alone.
    unit = rms_norm(x).detach().requires_grad_()
    missing = torch.sub(*(gradients(y, unit)[0] for y in outputs(unit)))
    assert missing.abs().max() > 1e-3
    along = (missing * unit).sum(-1, keepdim=True) / D * unit
    torch.testing.assert_close(missing, along, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"rope": True}, {"rope": True, "normalize": True}])
def test_no_float32_copy_of_an_activation_is_saved(options):
    shape = {"depth": 2, "n_embd": H * D, "head_dim": D, "sequence_len": T, "vocab_size": 64, "window_pattern": "S"}
    layer = GaussianKernelAttention(GPTConfig(attention="gka", gka=GKAConfig(**options), **shape), 0)
    layer.init_weights()
    layer.choose_kernels(CPU, torch.bfloat16)
    assert layer.window == 129
    x, saved = drawn()[0].detach().bfloat16().flatten(2).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer.kernel.attend(layer.qkv(x, None, rope_table(T, D))).sum()
    large = {t.untyped_storage().data_ptr(): t for t in saved if t.numel() >= x.numel()}.values()
    assert all(t.dtype == torch.bfloat16 for t in large)
    if options.get("normalize"):  # unit features, these over sigma^2, y; with rope also the rotated ones
        assert len(large) == 3 + options.get("rope", False)
