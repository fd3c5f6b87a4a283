"""gaussian_kernel_attention against its definition in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkachat.attention import gaussian_kernel_attention
from gkachat.attention.features import apply_rope, rms_norm, rope_table

BACKENDS = pytest.mark.parametrize(
    "backend", ["reference", "sdpa"]
)  # kernels/test_gaussian_triton.py has the fused one
T = 37
# Rounding of the operands, times a few; products accumulate in float32 at least.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}


def definition(x, sigma, window=None, causal=True, rope=None, include_self=True):
    """Return the formula's value, query by query in float64."""
    x, sigma = x.double(), sigma.double()
    T = x.size(1)
    f = x if rope is None else apply_rope(x, rope)
    rows = []
    for i in range(T):
        seen = [
            j
            for j in range(T)
            if (j <= i or not causal) and (window is None or abs(i - j) < window) and (include_self or i != j)
        ]
        if not seen:
            rows.append(0 * (x[:, i] + sigma[:, None]))
            continue
        distances = (f[:, i, None] - f[:, seen]).square().sum(-1)
        weights = torch.exp(-(distances - distances.amin(1, keepdim=True)) / (2 * sigma**2))
        rows.append((weights[..., None] * x[:, seen]).sum(1) / weights.sum(1)[..., None])
    return torch.stack(rows, dim=1)


def inputs(dtype=torch.float64, H=3, D=8, T=T, rope=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, T, H, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    sigma = torch.linspace(0.8, 3.0, H, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    return x, sigma, tuple(table.to(sigma.dtype) for table in rope_table(T, D)) if rope else None


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("window", [1, 17, T, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@BACKENDS
def test_outputs_and_gradients_are_those_of_the_definition(backend, dtype, window, rope, include_self):
    x, sigma, tables = inputs(dtype, rope=rope)
    options = {"window": window, "rope": tables, "include_self": include_self}
    y = gaussian_kernel_attention(x, sigma, backend=backend, **options)
    assert y.dtype == dtype
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    dx, dsigma = torch.autograd.grad(y, (x, sigma), dy)

    x64, sigma64 = (t.detach().double().requires_grad_() for t in (x, sigma))
    y64 = definition(x64, sigma64, **options)
    dx64, dsigma64 = torch.autograd.grad(y64, (x64, sigma64), dy.double())
    for got, exact in ((y, y64), (dx, dx64)):
        scale = max(1.0, exact.abs().max().item())
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=TOLERANCE[dtype] * scale)
    # The bandwidth's gradient is a sum of products that cancel. Its error is that of rounding each of them.
    products = ((dy.double() * y64).abs() + (x64 * dx64).abs()).sum((0, 1, 3)) / sigma64
    assert ((dsigma.double() - dsigma64).abs() <= torch.finfo(dtype).eps * products + 1e-12).all()


@BACKENDS
@pytest.mark.parametrize("include_self", [True, False])
def test_gradcheck(backend, include_self):
    x, sigma, tables = inputs(H=2, D=4, T=7)

    def operator(x, sigma):
        return gaussian_kernel_attention(x, sigma, window=4, rope=tables, include_self=include_self, backend=backend)

    assert torch.autograd.gradcheck(operator, (x, sigma))


@BACKENDS
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_without_the_causal_mask_a_window_looks_both_ways(backend, window, include_self):
    x, sigma, tables = inputs()
    options = {"window": window, "causal": False, "rope": tables, "include_self": include_self}
    y, expected = gaussian_kernel_attention(x, sigma, backend=backend, **options), definition(x, sigma, **options)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    dy = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(t, (x, sigma), dy) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_one_sigma_is_softmax_attention_with_a_bias_per_key():
    x, _, _ = inputs(rope=False)
    sigma = torch.full((3,), 1.7, dtype=torch.float64)
    q = (x / 1.7).transpose(1, 2)
    bias = -0.5 * q.square().sum(-1)[:, :, None, :]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = (q @ q.mT + bias).masked_fill(future, -math.inf).softmax(-1)
    expected = (weights @ x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(gaussian_kernel_attention(x, sigma), expected, rtol=0, atol=1e-12)


def test_normalised_features_need_no_bias():
    x = rms_norm(inputs(rope=False)[0])
    sigma = torch.full((3,), 1.7, dtype=torch.float64)
    q, v = (x / 1.7).transpose(1, 2), x.transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, v, is_causal=True, scale=1.0).transpose(1, 2)
    torch.testing.assert_close(gaussian_kernel_attention(x, sigma), expected, rtol=0, atol=1e-12)


@BACKENDS
def test_sigma_gradient_obeys_eulers_identity(backend):
    x, sigma, tables = inputs()
    y = gaussian_kernel_attention(x, sigma, rope=tables, backend=backend)
    dy = torch.randn_like(y)
    dx, dsigma = torch.autograd.grad(y, (x, sigma), dy)
    expected = (dy * y - x * dx).sum((0, 1, 3))
    torch.testing.assert_close(sigma * dsigma, expected, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=40)
@given(
    T=st.integers(1, 20),
    window=st.none() | st.integers(1, 25),
    include_self=st.booleans(),
    causal=st.booleans(),
    scale=st.floats(0.1, 8),
    seed=st.integers(0, 2**16),
)
def test_scaling_features_and_bandwidth_together_scales_the_output(T, window, include_self, causal, scale, seed):
    x, sigma, _ = inputs(T=T, rope=False, seed=seed)
    options = {"window": window, "include_self": include_self, "causal": causal}
    y = gaussian_kernel_attention(x, sigma, **options)
    torch.testing.assert_close(gaussian_kernel_attention(scale * x, scale * sigma, **options), scale * y)
    torch.testing.assert_close(y, definition(x, sigma, **options), rtol=0, atol=1e-11)


@BACKENDS
def test_tokens_outside_the_window_do_not_change_the_output(backend):
    x, sigma, _ = inputs(rope=False)
    y = gaussian_kernel_attention(x, sigma, window=5, backend=backend)
    changed = x.detach().clone()
    changed[:, 20] += 100.0
    y2 = gaussian_kernel_attention(changed, sigma, window=5, backend=backend)
    same = [i for i in range(T) if not 20 <= i < 25]
    assert torch.equal(y[:, same], y2[:, same])
    assert not torch.equal(y[:, 20:25], y2[:, 20:25])


@BACKENDS
@pytest.mark.parametrize("sigma", [1e-3, 1e3])
def test_extreme_bandwidths_stay_finite(backend, sigma):
    x, _, _ = inputs(torch.float32, rope=False)
    bandwidth = torch.full((3,), sigma, requires_grad=True)
    y = gaussian_kernel_attention(x, bandwidth, backend=backend)
    gradients = torch.autograd.grad(y.square().sum(), (x, bandwidth))
    assert all(torch.isfinite(t).all() for t in (y, *gradients))
    expected = definition(x, bandwidth)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "x: given"),
        ({"x": torch.zeros(1, 2, 2, 4, dtype=torch.long)}, "x: given"),
        ({"sigma": torch.ones(5)}, "sigma: given"),
        ({"window": 0}, "window: given 0"),
        ({"rope": rope_table(9, 4)}, "rope: given"),
        ({"backend": "flash"}, "backend: given 'flash'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, named):
    arguments = {"x": torch.zeros(1, 6, 2, 4), "sigma": torch.ones(2)} | change
    with pytest.raises(ValueError, match=named):
        gaussian_kernel_attention(arguments.pop("x"), arguments.pop("sigma"), **arguments)
