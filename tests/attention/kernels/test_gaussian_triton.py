"""The fused Gaussian kernel in Triton's interpreter against float64, and compiled for a GPU."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from gkachat.attention import gaussian_kernel_attention
from gkachat.attention.features import rope_table
from gkachat.attention.kernels.gaussian_triton import BACKWARD, FORWARD

# Relative to the norm of the exact tensor. float32: rounding of sums over T and D. bfloat16: 2^-9 per rounded operand.
TOLERANCE = {torch.float32: {"y": 1e-6, "dx": 1e-5}, torch.bfloat16: {"y": 4e-3, "dx": 1e-2}}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "bfloat16"])


def inputs(dtype, B=1, T=100, H=2, D=64, sigma=5.0, scale=1.0, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, H, D, generator=generator)
    for t in range(1, T):  # neighbours resemble each other, since otherwise every token sees itself alone
        x[:, t] = 0.8 * x[:, t - 1] + 0.6 * x[:, t]
    x = (scale * x + offset).to(dtype).requires_grad_()
    return x, (sigma * torch.linspace(0.8, 1.5, H)).requires_grad_()


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


def check(x, sigma, tolerance=None, **options):
    y, dx, dsigma, dy = run(x, sigma, "triton", **options)
    y64, dx64, dsigma64 = exact(x, sigma, dy, **options)
    tolerance = tolerance or TOLERANCE[x.dtype]
    for name, got, expected in (("y", y, y64), ("dx", dx, dx64)):
        assert (got - expected).norm() <= tolerance[name] * expected.norm() + 1e-12, name
    # dsigma is a sum of terms of both signs. Its error is a share of their sizes.
    terms = (dy.double() * y64).abs().sum((0, 1, 3)) / sigma.detach()
    assert ((dsigma - dsigma64).abs() <= tolerance["dx"] * terms + 1e-12).all()


@DTYPES
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("window", [1, 2, 17, 32, 64, 90, None])
def test_outputs_and_gradients_are_those_of_the_definition(dtype, rope, include_self, window):
    x, sigma = inputs(dtype)
    check(x, sigma, window=window, include_self=include_self, rope=rope_table(100, 64) if rope else None)


@DTYPES
@pytest.mark.parametrize(("include_self", "rope"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("window", [17, 90, None])
def test_without_the_causal_mask_it_looks_both_ways(dtype, rope, include_self, window):
    x, sigma = inputs(dtype)
    rope = rope_table(100, 64) if rope else None
    check(x, sigma, window=window, include_self=include_self, rope=rope, causal=False)


@DTYPES
@pytest.mark.parametrize("T", [1, 16, 63, 64, 65, 200])
def test_any_length(dtype, T):
    check(*inputs(dtype, T=T), window=48)
    check(*inputs(dtype, T=T), causal=False)


@DTYPES
@pytest.mark.parametrize("H", [1, 5])
def test_any_number_of_heads_and_rows_of_heads_of_128(dtype, H):
    check(*inputs(dtype, B=2, T=70, H=H, D=128), window=40)


@DTYPES
@pytest.mark.parametrize("which", ["rows apart", "heads before time", "channels apart"])
def test_inputs_need_not_be_contiguous(dtype, which):
    x = {
        "rows apart": torch.randn(2, 2, 70, 2, 64).to(dtype)[:, 0],
        "heads before time": torch.randn(2, 2, 70, 64).to(dtype).transpose(1, 2),
        "channels apart": torch.randn(2, 70, 64, 2).to(dtype).transpose(2, 3),
    }[which]
    assert not x.is_contiguous()
    check(x.requires_grad_(), torch.full((2,), 5.0).requires_grad_(), window=40)


def test_a_gradient_need_not_be_contiguous():
    x, sigma = inputs(torch.float32)
    dy = torch.randn(1, 2, 100, 64).transpose(1, 2)
    got = run(x, sigma, "triton", dy, window=30)[:3]
    for a, b in zip(got, exact(x, sigma, dy, window=30), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset", [5.0, 15.0])
@pytest.mark.parametrize("include_self", [True, False])
def test_features_with_a_large_common_offset_keep_their_gradient_in_bfloat16(offset, include_self):
    x, sigma = inputs(torch.bfloat16, T=100, offset=offset)
    check(x, sigma, {"y": 4e-3, "dx": 3e-2}, window=60, include_self=include_self)


@DTYPES
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_small_and_large_norms(dtype, scale):
    x, sigma = inputs(dtype, scale=scale, sigma=5.0 * scale)
    tolerance = {"y": 4e-3, "dx": 3e-2} if dtype == torch.bfloat16 else {"y": 1e-5, "dx": 1e-4}
    check(x, sigma, tolerance, window=60)


@DTYPES
@pytest.mark.parametrize("sigma", [0.3, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_no_bandwidth_gives_nan(dtype, sigma, include_self, scale):
    x, bandwidth = inputs(dtype, T=80, sigma=sigma, scale=scale)
    y, dx, dsigma, dy = run(x, bandwidth, "triton", include_self=include_self)
    assert all(torch.isfinite(t).all() for t in (y, dx, dsigma))
    y64 = exact(x, bandwidth, dy, include_self=include_self)[0]
    assert (y - y64).norm() <= (1e-4 if dtype == torch.float32 else 1e-2) * y64.norm()


@DTYPES
def test_it_agrees_with_the_other_backends(dtype):
    x, sigma = inputs(dtype)
    dy = torch.randn(x.shape)
    results = {backend: run(x, sigma, backend, dy, window=40) for backend in ("triton", "sdpa", "reference")}
    for backend in ("sdpa", "reference"):
        for a, b in zip(results["triton"][:2], results[backend][:2], strict=True):
            assert (a - b).norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * b.norm()


def test_the_same_input_gives_the_same_bits():
    x, sigma = inputs(torch.float32, B=2)
    a, b = (run(x, sigma, "triton", torch.ones_like(x)) for _ in range(2))
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@settings(deadline=None, max_examples=8)
@given(
    T=st.integers(1, 150),
    window=st.none() | st.integers(1, 160),
    include_self=st.booleans(),
    causal=st.booleans(),
    rope=st.booleans(),
    sigma=st.floats(1, 30),
    seed=st.integers(0, 2**16),
)
def test_any_shape_window_and_bandwidth(T, window, include_self, causal, rope, sigma, seed):
    x, bandwidth = inputs(torch.float32, T=T, sigma=sigma, seed=seed)
    rope = rope_table(T, 64) if rope else None
    options = {"window": window, "include_self": include_self, "causal": causal, "rope": rope}
    check(x, bandwidth, {"y": 1e-5, "dx": 1e-4}, **options)


def test_only_inputs_output_and_row_sums_are_saved_for_the_backward():
    x, sigma = inputs(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gaussian_kernel_attention(x, sigma, backend="triton")
    large = sorted((tuple(t.shape), t.dtype) for t in saved if t.numel() > sigma.numel())
    assert large == [((1, 2, 100), torch.float32)] + 2 * [((1, 100, 2, 64), torch.bfloat16)]


def test_head_dims_that_it_lacks_are_an_error():
    x = torch.randn(1, 8, 2, 32)
    with pytest.raises(ValueError, match="heads have 32 channels, not 64 or 128"):
        gaussian_kernel_attention(x, torch.ones(2), backend="triton")


@pytest.fixture(scope="module")
def resources():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "tests/attention/kernels/kernel_resources.py"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_its_gradients_are_the_same_where_blocks_are_recomputed():
    x, sigma = inputs(torch.float32)
    attend = partial(gaussian_kernel_attention, backend="triton")
    y = attend(x, sigma), checkpoint(attend, x, sigma, use_reentrant=False)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), (x, sigma)) for t in y), strict=True):
        assert torch.equal(a, b)


def test_the_operator_stays_in_the_graph_and_can_be_exported():
    class Layer(torch.nn.Module):
        def forward(self, x, sigma):
            return gaussian_kernel_attention(x, sigma, window=20, backend="triton")

    x, sigma = torch.randn(1, 40, 2, 64), torch.tensor([4.0, 8.0])
    expected = Layer()(x, sigma)
    torch.testing.assert_close(torch.compile(Layer(), backend="eager", fullgraph=True)(x, sigma), expected)
    exported = torch.export.export(Layer(), (x, sigma))
    assert any("gkachat.gka" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x, sigma), expected)


def test_compiled_for_a_hopper_no_register_spills_and_shared_memory_suffices(resources):
    assert len(resources) >= sum(len(c) for table in (FORWARD, BACKWARD) for c in table.values())
    assert [row for row in resources if row["spilled"] or row["shared"] > 227 * 1024] == []
