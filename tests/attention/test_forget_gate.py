"""Forget gates against the paper, and their bias in the channels of keys against a bias that is added to the scores."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gkachat.attention.forget_gate import ForgetGate, split, with_bias
from gkachat.attention.kernels import reference, sdpa, window_cpu
from gkachat.attention.qkv import QKV
from gkachat.config import GPTConfig

B, T, H, D = 2, 150, 3, 16


def drawn(dtype, sharpness=1.0):
    """Queries, keys, and a running sum that ends at 2,000 or more."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, T, H, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    rates = torch.rand(B, T, H, 1, generator=generator, dtype=torch.float64) * sharpness
    return q, k, rates.to(torch.promote_types(dtype, torch.float32)).cumsum(1)


def test_weights_are_those_of_the_paper():
    """FoX (arXiv 2503.02130): D_ij, the sum of log f_l over l from j + 1 to i, is added to the scores."""
    gate = ForgetGate(GPTConfig(n_embd=48, head_dim=16)).double()
    for p in gate.parameters():
        torch.nn.init.normal_(p)
    x_BTC = torch.randn(B, T, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, _ = drawn(torch.float64)
    q_BHTD, k_BHSD = reference.queries_and_keys(QKV(*with_bias(q, k, gate(x_BTC)), q))
    mask = reference.visible(T, None)
    got = reference.weights(q_BHTD @ k_BHSD.mT, mask)
    log_f_BHT = (x_BTC @ gate.gate.weight.T + gate.bias).sigmoid().log().transpose(1, 2)
    i, j, n = torch.meshgrid(*[torch.arange(T)] * 3, indexing="ij")
    D_BHTS = torch.einsum("ijl,bhl->bhij", ((j < n) & (n <= i)).double(), log_f_BHT)
    scores = torch.einsum("bihd,bjhd->bhij", q[..., :-3], k[..., :-3])
    torch.testing.assert_close(got, (scores + D_BHTS).masked_fill(~mask, -torch.inf).softmax(-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scores_have_the_bias_to_its_last_bit(dtype):
    """Products of two bfloat16 numbers, and their sums here, are exact in float64."""
    q, k, bias = drawn(dtype, sharpness=30)
    assert 2000 < bias.max() < 4000
    q_biased, k_biased = with_bias(q, k, bias)
    assert q_biased.dtype == k_biased.dtype == dtype and q_biased.shape == k_biased.shape == q.shape
    assert torch.equal(k_biased[..., -3:].double().sum(-1, keepdim=True), bias.double())
    got, expected = (
        torch.einsum("bihd,bjhd->bhij", q, k)
        for q, k in ((q_biased.double(), k_biased.double()), (q[..., :-3].double(), k[..., :-3].double()))
    )
    torch.testing.assert_close(got, expected + bias.double().permute(0, 2, 3, 1), rtol=0, atol=1e-11)


def test_parts_of_a_bias_need_no_rounding_which_compiled_code_would_leave_out():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            assert out.dtype in (torch.float32, torch.int32), func
            return out

    bias = drawn(torch.bfloat16)[2]
    with Seen():
        parts = split(bias)
    assert all(torch.equal(part, part.bfloat16().float()) for part in parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_gradient_is_that_of_a_bias_added_to_the_scores(dtype):
    q, k, bias = (t.requires_grad_() for t in drawn(dtype))
    d_scores = torch.randn(B, H, T, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    q_biased, k_biased = with_bias(q, k, bias)
    got = torch.autograd.grad(torch.einsum("bihd,bjhd->bhij", q_biased, k_biased), (q, k, bias), d_scores)
    leaves = [t.detach().double().requires_grad_() for t in (q, k, bias)]
    scores = torch.einsum("bihd,bjhd->bhij", *(t[..., :-3] for t in leaves[:2])) + leaves[2].permute(0, 2, 3, 1)
    for a, b in zip(got, torch.autograd.grad(scores, leaves, d_scores.double()), strict=True):
        assert (a.double() - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm()  # of sums that are rounded once


@pytest.mark.parametrize(
    ("attend", "window"),
    [(partial(sdpa.attend, window=None, causal=True), None), (partial(window_cpu.attend, window=40), 40)],
)
def test_kernels_in_bfloat16_keep_differences_between_biases_above_2000(attend, window):
    q, k, bias = drawn(torch.bfloat16, sharpness=0.1)
    bias = bias + 2000
    got = attend(QKV(*with_bias(q, k, bias), q))
    scores = torch.einsum("bihd,bjhd->bhij", q[..., :-3].double(), k[..., :-3].double())
    weights = reference.weights(scores + bias.double().permute(0, 2, 3, 1), reference.visible(T, window))
    expected = torch.einsum("bhij,bjhd->bihd", weights, q.double())
    assert (got.double() - expected).norm() <= 2**-7 * expected.norm()  # weights and results are rounded to bfloat16


def test_heads_start_to_forget_at_rates_from_8_to_512_tokens_whatever_the_token():
    gate = ForgetGate(GPTConfig(n_embd=7 * 16, head_dim=16))
    gate.init_weights()
    x_BTC = torch.randn(1, 5, 7 * 16)
    f = (-gate(x_BTC).diff(dim=1)).exp()[..., 0]
    expected = 1 - 1 / torch.tensor([8.0, 16, 32, 64, 128, 256, 512])
    torch.testing.assert_close(f, expected.expand(1, 4, 7), rtol=1e-5, atol=0)
