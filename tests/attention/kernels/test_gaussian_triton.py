"""The fused Gaussian kernel: offsets, what it saves, graphs, and its compilation for a GPU.

tests/attention/test_gaussian_kernel_attention.py holds it against float64.
"""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from gkachat.attention import gaussian_kernel_attention
from gkachat.attention.features import rope_table
from gkachat.attention.kernels import gaussian_triton
from gkachat.attention.kernels.gaussian_triton import BACKWARD, FORWARD

attend = partial(gaussian_kernel_attention, backend="triton")


def inputs(dtype=torch.float32):
    x = torch.randn(1, 100, 2, 64, generator=torch.Generator().manual_seed(0))
    return x.to(dtype).requires_grad_(), torch.tensor([4.0, 7.5], requires_grad=True)


@pytest.mark.parametrize("offset", [5.0, 15.0])
@pytest.mark.parametrize("include_self", [True, False])
def test_features_with_a_large_common_offset_keep_their_gradient_in_bfloat16(offset, include_self):
    x, sigma = inputs()
    x = (x.detach() + offset).bfloat16().requires_grad_()
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    options = {"window": 60, "include_self": include_self}
    y = attend(x, sigma, **options)
    x64 = x.detach().double().requires_grad_()
    y64 = gaussian_kernel_attention(x64, sigma.double(), backend="reference", **options)
    dx, dx64 = torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(y64, x64, dy.double())[0]
    assert (y - y64).norm() <= 4e-3 * y64.norm() and (dx - dx64).norm() <= 3e-2 * dx64.norm()


def test_only_inputs_output_and_row_sums_are_saved_for_the_backward():
    saved, (x, sigma) = [], inputs(torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        attend(x, sigma)
    large = sorted((tuple(t.shape), t.dtype) for t in saved if t.numel() > sigma.numel())
    assert large == [((1, 2, 100), torch.float32)] + 2 * [((1, 100, 2, 64), torch.bfloat16)]


def test_gradients_are_the_same_where_blocks_are_recomputed():
    x, sigma = inputs()
    y = attend(x, sigma), checkpoint(attend, x, sigma, use_reentrant=False)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), (x, sigma)) for t in y), strict=True):
        assert torch.equal(a, b)


def test_the_operator_stays_in_the_graph_and_can_be_exported():
    class Layer(torch.nn.Module):
        def forward(self, x, sigma):
            return attend(x, sigma, window=20)

    x, sigma = (t.detach() for t in inputs())
    expected = Layer()(x, sigma)
    torch.testing.assert_close(torch.compile(Layer(), backend="eager", fullgraph=True)(x, sigma), expected)
    exported = torch.export.export(Layer(), (x, sigma))
    assert any("gkachat.gka" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x, sigma), expected)


@pytest.mark.parametrize("rope", [False, True])
def test_the_first_gradients_are_right_whichever_candidates_the_autotuner_tries(monkeypatch, rope):
    """The autotuner runs all candidates on the buffers of the first call, and here times them with one run each."""
    tried, make_tuned = [], gaussian_triton._tuned
    every = tuple({c for (_, D, _), candidates in BACKWARD.items() if D == 64 for c in candidates})

    def tuned(kernel, candidates, dtype):
        if kernel is not gaussian_triton.backward_kernel:
            return make_tuned(kernel, candidates, dtype)
        autotuner = make_tuned.__wrapped__(kernel, every, dtype)
        autotuner.do_bench = lambda call, quantiles: [tried.append(call()) or 1.0]
        return autotuner

    monkeypatch.setattr(gaussian_triton, "_tuned", tuned)
    x, sigma = inputs()
    tables = rope_table(100, 64) if rope else None
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    got = torch.autograd.grad(attend(x, sigma, rope=tables), (x, sigma), dy)
    x64, sigma64 = (t.detach().double().requires_grad_() for t in (x, sigma))
    y64 = gaussian_kernel_attention(x64, sigma64, backend="reference", rope=tables)
    assert len(tried) == len(every) > 1
    for a, b in zip(got, torch.autograd.grad(y64, (x64, sigma64), dy.double()), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()  # float32 rounding of sums over T and D


def test_any_number_of_rows_and_heads_fits_the_grids(monkeypatch):
    """All programs are on x, whose limit is 2^31 - 1; y and z end at 65,535."""
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid({"BM": 64}) if callable(grid) else grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(gaussian_triton, "_tuned", lambda *key: Recorder())
    for name in ("bias_kernel", "backward_rows_kernel", "backward_sum_kernel"):
        monkeypatch.setattr(gaussian_triton, name, Recorder())
    x, sigma = torch.zeros(70_000, 2, 1, 64, requires_grad=True), torch.ones(1)
    attend(x, sigma).sum().backward()
    row_blocks = 70_000 * gaussian_triton.PAD // gaussian_triton.ROWS
    assert grids == [(row_blocks,), (70_000,), (row_blocks,), (70_000,), (row_blocks,)]


@pytest.fixture(scope="module")
def resources(compiled_resources):
    """Figures of the kernels of GKA and of decoding."""
    return compiled_resources("tests/attention/kernels/kernel_resources.py")


def test_compiled_for_a_hopper_no_register_spills_and_no_product_waits_for_another(resources):
    assert len(resources) >= sum(len(c) for table in (FORWARD, BACKWARD) for c in table.values())
    assert [row for row in resources if row["spilled"] or row["serialised"] or row["shared"] > 227 * 1024] == []


def test_compiled_for_a_hopper_products_and_loads_use_its_units(resources):
    rows = [row for row in resources if row["kernel"] in ("forward_kernel", "backward_kernel")]
    assert all(row["products"] and row["loads"] for row in rows if row["dtype"] == "bf16")


def test_no_offset_of_gka_is_a_product_in_32_bits(resources):
    rows = [row for row in resources if "split" not in row["kernel"] and "combine" not in row["kernel"]]
    assert [row for row in rows if row["narrow"]] == []
