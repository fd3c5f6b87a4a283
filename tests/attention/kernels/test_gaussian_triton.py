"""The fused Gaussian kernel: offsets, what it saves, graphs, and its compilation for a GPU.

tests/attention/test_gaussian_kernel_attention.py holds it against float64.
"""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from gkachat.attention import gaussian_kernel_attention
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


@pytest.fixture(scope="module")
def resources():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/attention/kernels/kernel_resources.py"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_compiled_for_a_hopper_no_register_spills_and_shared_memory_suffices(resources):
    assert len(resources) >= sum(len(c) for table in (FORWARD, BACKWARD) for c in table.values())
    assert [row for row in resources if row["spilled"] or row["shared"] > 227 * 1024] == []
