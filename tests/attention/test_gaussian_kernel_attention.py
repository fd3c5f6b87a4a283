"""gaussian_kernel_attention on every backend, against its definition in float64. Triton runs in its interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkachat.attention import gaussian_kernel_attention
from gkachat.attention.features import apply_rope, rope_table

pytest.importorskip("triton")

FAST = pytest.mark.parametrize("backend", ["sdpa", "triton"])
EXACT = pytest.mark.parametrize("backend", ["reference", "sdpa"])  # these compute in float64
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SELF = pytest.mark.parametrize("include_self", [True, False])
CAUSAL = pytest.mark.parametrize("causal", [True, False])
ROPE = pytest.mark.parametrize("rope", [False, True])
# Relative to the norm of the exact tensor. float32: rounding of sums over T and D. bfloat16: 2^-9 per rounded operand.
TOLERANCE = {torch.float32: {"y": 1e-6, "dx": 1e-5}, torch.bfloat16: {"y": 4e-3, "dx": 1e-2}}


def definition(x, sigma, window=None, causal=True, rope=None, include_self=True):
    """Return the formula's value, query by query."""
    f, rows = apply_rope(x, rope), []
    for i in range(x.size(1)):
        seen = [
            j
            for j in range(x.size(1))
            if (j <= i or not causal) and (window is None or abs(i - j) < window) and (include_self or i != j)
        ]
        if not seen:
            rows.append(0 * (x[:, i] + sigma[:, None]))
            continue
        distances = (f[:, i, None] - f[:, seen]).square().sum(-1)
        weights = torch.exp(-(distances - distances.amin(1, keepdim=True)) / (2 * sigma**2))
        rows.append((weights[..., None] * x[:, seen]).sum(1) / weights.sum(1)[..., None])
    return torch.stack(rows, dim=1)


def inputs(dtype, B=1, T=100, H=2, D=64, sigma=5.0, scale=1.0, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, H, D, generator=generator)
    for t in range(1, T):  # neighbours resemble each other, since otherwise every token sees itself alone
        x[:, t] = 0.8 * x[:, t - 1] + 0.6 * x[:, t]
    wide = torch.promote_types(dtype, torch.float32)
    x = (scale * x + offset).to(dtype).requires_grad_()
    return x, (sigma * torch.linspace(0.8, 1.5, H, dtype=wide)).requires_grad_()


def small64(T=37, rope=False):
    """Inputs in float64 with heads of 8 channels, and rotation tables."""
    tables = tuple(table.double() for table in rope_table(T, 8)) if rope else None
    return *inputs(torch.float64, B=2, T=T, H=3, D=8, sigma=2.0), tables


def run(x, sigma, backend, dy=None, **options):
    """Return y, dx, dsigma and dy, in float64."""
    y = gaussian_kernel_attention(x, sigma, backend=backend, **options)
    if dy is None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    return *(t.double() for t in (y, *torch.autograd.grad(y, (x, sigma), dy.to(y.dtype)))), dy


def exact(x, sigma, dy, rope=None, **options):
    rope = None if rope is None else tuple(table.double() for table in rope)
    x, sigma = (t.detach().double().requires_grad_() for t in (x, sigma))
    return run(x, sigma, "reference", dy, rope=rope, **options)[:3]


def check(x, sigma, backend, tolerance=None, dy=None, **options):
    y, dx, dsigma, dy = run(x, sigma, backend, dy, **options)
    y64, dx64, dsigma64 = exact(x, sigma, dy, **options)
    tolerance = tolerance or TOLERANCE[x.dtype]
    for name, got, expected in (("y", y, y64), ("dx", dx, dx64)):
        assert (got - expected).norm() <= tolerance[name] * expected.norm() + 1e-12, name
    # dsigma is a sum of terms of both signs. Its error is a share of their sizes.
    terms = (dy.double() * y64).abs().sum((0, 1, 3)) / sigma.detach()
    assert ((dsigma - dsigma64).abs() <= tolerance["dx"] * terms + 1e-12).all()


# The definition


@EXACT
@SELF
@CAUSAL
@ROPE
@pytest.mark.parametrize("window", [1, 17, 37, None])
def test_outputs_and_gradients_are_those_of_the_definition_in_float64(backend, window, rope, causal, include_self):
    x, sigma, tables = small64(rope=rope)
    options = {"window": window, "rope": tables, "causal": causal, "include_self": include_self}
    y, expected = gaussian_kernel_attention(x, sigma, backend=backend, **options), definition(x, sigma, **options)
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for got, wanted in zip(*(torch.autograd.grad(t, (x, sigma), dy) for t in (y, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


@EXACT
@SELF
def test_gradcheck(backend, include_self):
    x, sigma, tables = small64(T=7, rope=True)

    def operator(x, sigma):
        return gaussian_kernel_attention(x, sigma, window=4, rope=tables, include_self=include_self, backend=backend)

    assert torch.autograd.gradcheck(operator, (x, sigma))


def test_one_sigma_is_softmax_attention_with_a_bias_per_key():
    x, _, _ = small64()
    q = (x / 1.7).transpose(1, 2)
    bias = -0.5 * q.square().sum(-1)[:, :, None, :]
    future = torch.ones(37, 37, dtype=torch.bool).triu(1)
    weights = (q @ q.mT + bias).masked_fill(future, -torch.inf).softmax(-1)
    expected = (weights @ x.transpose(1, 2)).transpose(1, 2)
    y = gaussian_kernel_attention(x, torch.full((3,), 1.7, dtype=torch.float64))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@EXACT
def test_the_gradient_of_sigma_obeys_eulers_identity(backend):
    x, sigma, tables = small64(rope=True)
    y, dx, dsigma, dy = run(x, sigma, backend, rope=tables)
    torch.testing.assert_close(sigma * dsigma, (dy * y - x * dx).sum((0, 1, 3)), rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=20)
@given(
    T=st.integers(1, 20),
    window=st.none() | st.integers(1, 25),
    include_self=st.booleans(),
    causal=st.booleans(),
    scale=st.floats(0.1, 8),
)
def test_scaling_features_and_bandwidth_together_scales_the_output(T, window, include_self, causal, scale):
    x, sigma, _ = small64(T=T)
    options = {"window": window, "include_self": include_self, "causal": causal}
    y = gaussian_kernel_attention(x, sigma, **options)
    torch.testing.assert_close(gaussian_kernel_attention(scale * x, scale * sigma, **options), scale * y)


# The fast backends in float32 and bfloat16


@FAST
@ROPE
@SELF
@pytest.mark.parametrize(
    ("window", "dtype"),
    [*((window, torch.float32) for window in (1, 2, 17, 64, 90, None)), (17, torch.bfloat16), (None, torch.bfloat16)],
)
def test_outputs_and_gradients_are_those_of_the_definition(backend, dtype, rope, include_self, window):
    tables = rope_table(100, 64) if rope else None
    check(*inputs(dtype, H=1), backend, window=window, include_self=include_self, rope=tables)


@FAST
@DTYPES
@pytest.mark.parametrize(("include_self", "rope"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("window", [17, 90, None])
def test_without_the_causal_mask_a_window_looks_both_ways(backend, dtype, rope, include_self, window):
    tables = rope_table(100, 64) if rope else None
    check(*inputs(dtype, H=1), backend, window=window, include_self=include_self, rope=tables, causal=False)


@FAST
@DTYPES
@pytest.mark.parametrize("T", [1, 16, 63, 64, 65, 130])
def test_any_length(backend, dtype, T):
    check(*inputs(dtype, T=T, H=1), backend, window=48)
    check(*inputs(dtype, T=T, H=1), backend, causal=False)


@FAST
@DTYPES
@pytest.mark.parametrize("H", [1, 3])
def test_any_number_of_heads_of_128_channels(backend, dtype, H):
    check(*inputs(dtype, B=2, T=70, H=H, D=128), backend, window=40)


@FAST
@DTYPES
@pytest.mark.parametrize("layout", ["rows apart", "heads before time", "channels apart"])
def test_inputs_need_not_be_contiguous(backend, dtype, layout):
    x = {
        "rows apart": torch.randn(2, 2, 70, 2, 64).to(dtype)[:, 0],
        "heads before time": torch.randn(2, 2, 70, 64).to(dtype).transpose(1, 2),
        "channels apart": torch.randn(2, 70, 64, 2).to(dtype).transpose(2, 3),
    }[layout]
    assert not x.is_contiguous()
    check(x.requires_grad_(), torch.full((2,), 5.0).requires_grad_(), backend, window=40)


@FAST
@pytest.mark.parametrize("sigma", [torch.tensor(5.0).expand(2), torch.tensor([[5.0, 0.1], [7.0, 0.1]])[:, 0]])
def test_bandwidths_need_not_be_contiguous(backend, sigma):
    x, _ = inputs(torch.float32, T=40)
    check(x, sigma.detach().requires_grad_(), backend)


@FAST
@CAUSAL
def test_a_window_may_be_as_large_as_an_integer(backend, causal):
    check(*inputs(torch.float32, T=70), backend, window=2**31 - 1, causal=causal)


@FAST
@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0)])
def test_an_empty_batch_or_text_gives_nothing(backend, B, T):
    y, dx, dsigma, _ = run(*inputs(torch.float32, B=B, T=T), backend)
    assert y.shape == dx.shape == (B, T, 2, 64) and not dsigma.any()


@FAST
def test_gradients_need_not_be_contiguous(backend):
    dy = torch.randn(1, 2, 100, 64).transpose(1, 2)
    check(*inputs(torch.float32), backend, dy=dy, window=30)


@FAST
@DTYPES
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_small_and_large_norms(backend, dtype, scale):
    tolerance = {"y": 4e-3, "dx": 3e-2} if dtype == torch.bfloat16 else {"y": 1e-5, "dx": 1e-4}
    check(*inputs(dtype, scale=scale, sigma=5.0 * scale), backend, tolerance, window=60)


@FAST
@DTYPES
@SELF
@pytest.mark.parametrize(
    ("scale", "sigma"), [(1.0, 1e-3), (1.0, 0.3), (1.0, 10.0), (1.0, 1e3), (8.0, 0.3), (8.0, 1.0), (8.0, 100.0)]
)
def test_any_bandwidth_gives_finite_numbers(backend, dtype, sigma, include_self, scale):
    x, bandwidth = inputs(dtype, T=80, H=1, sigma=sigma, scale=scale)
    y, dx, dsigma, dy = run(x, bandwidth, backend, include_self=include_self)
    assert all(torch.isfinite(t).all() for t in (y, dx, dsigma))
    if sigma >= 0.3:
        y64 = exact(x, bandwidth, dy, include_self=include_self)[0]
        assert (y - y64).norm() <= (1e-4 if dtype == torch.float32 else 1e-2) * y64.norm()


@FAST
def test_the_same_input_gives_the_same_bits(backend):
    x, sigma = inputs(torch.float32, B=2, T=70, H=1)
    a, b = (run(x, sigma, backend, torch.ones_like(x)) for _ in range(2))
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@FAST
@settings(deadline=None, max_examples=6)
@given(
    T=st.integers(1, 150),
    window=st.none() | st.integers(1, 160),
    include_self=st.booleans(),
    causal=st.booleans(),
    rope=st.booleans(),
    sigma=st.floats(1, 30),
    seed=st.integers(0, 2**16),
)
def test_any_shape_window_and_bandwidth(backend, T, window, include_self, causal, rope, sigma, seed):
    options = {"window": window, "include_self": include_self, "causal": causal}
    tables = rope_table(T, 64) if rope else None
    tolerance = {"y": 1e-5, "dx": 1e-4}
    check(*inputs(torch.float32, T=T, H=1, sigma=sigma, seed=seed), backend, tolerance, rope=tables, **options)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "x: given"),
        ({"x": torch.zeros(1, 2, 2, 4, dtype=torch.long)}, "x: given"),
        ({"sigma": torch.ones(5)}, "sigma: given"),
        ({"window": 0}, "window: given 0"),
        ({"rope": rope_table(9, 4)}, "rope: given"),
        ({"backend": "flash"}, "backend: given 'flash'"),
        ({"x": torch.zeros(1, 6, 2, 32), "backend": "triton"}, "heads have 32 channels, not 64 or 128"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(change, named):
    arguments = {"x": torch.zeros(1, 6, 2, 4), "sigma": torch.ones(2)} | change
    with pytest.raises(ValueError, match=named):
        gaussian_kernel_attention(arguments.pop("x"), arguments.pop("sigma"), **arguments)
