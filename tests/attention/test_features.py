"""Norm and rotation."""

import pytest
import torch
import torch.nn.functional as F

from gkachat.attention.features import apply_rope, convolved_features, rms_norm, rope_at, rope_table, rotate


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_is_torchs_with_its_gradient(dtype):
    x = torch.randn(3, 5, 24).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = F.rms_norm(exact, (24,), eps=torch.finfo(torch.promote_types(dtype, torch.float32)).eps)
    dy = torch.randn(3, 5, 24).to(dtype)
    got = rms_norm(x), torch.autograd.grad(rms_norm(x), x, dy)[0]
    for a, b in zip(got, (expected, torch.autograd.grad(expected, exact, dy.double())[0]), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_rms_norm_passes_gradcheck_and_takes_zeros():
    assert torch.autograd.gradcheck(rms_norm, torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True))
    x = torch.zeros(2, 8, requires_grad=True)
    assert not rms_norm(x).any()
    assert torch.isfinite(torch.autograd.grad(rms_norm(x).sum(), x)[0]).all()


def test_rms_norm_keeps_nothing_in_float32_but_a_number_a_row():
    x, kept = torch.randn(4, 16).bfloat16().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x)
    assert sorted((t.numel(), t.dtype) for t in kept) == [(4, torch.float32), (64, torch.bfloat16)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_of_their_own", [False, True])
def test_rotation_turns_pairs_of_channels_with_its_gradient(dtype, rows_of_their_own):
    x, dy = torch.randn(2, 5, 3, 8).to(dtype).requires_grad_(), torch.randn(2, 5, 3, 8).to(dtype)
    positions = torch.tensor([[3, 4, 5, 6, 7], [0, 1, 2, 9, 11]]) if rows_of_their_own else torch.arange(5)
    cos, sin = (table.unsqueeze(-2) for table in rope_at(positions, 8))
    exact, turn = x.detach().double().requires_grad_(), torch.complex(cos.double(), -sin.double())
    pairs = torch.complex(*exact.chunk(2, dim=-1)) * turn
    expected = torch.cat((pairs.real, pairs.imag), dim=-1)
    got = rotate(x, cos, sin)
    for a, b in (
        (got, expected),
        (torch.autograd.grad(got, x, dy)[0], torch.autograd.grad(expected, exact, dy.double())[0]),
    ):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_rotation_keeps_norms_and_depends_on_distance_alone():
    rope = rope_table(40, 16)
    a, b = (torch.randn(16).expand(1, 40, 1, 16) for _ in range(2))
    a, b = apply_rope(a, rope)[0, :, 0], apply_rope(b, rope)[0, :, 0]
    torch.testing.assert_close(a.norm(dim=-1), a.norm(dim=-1)[:1].expand(40))
    dots = a @ b.T
    torch.testing.assert_close(dots[7:, 7:], dots[:-7, :-7], rtol=1e-4, atol=1e-4)
    assert (dots[0] - dots[0, 0]).abs().max() > 0.1


def test_features_of_a_single_token_are_those_of_the_last_token_of_a_text():
    generator = torch.Generator().manual_seed(0)
    x, *weights = (
        torch.randn(*shape, 3, 8, dtype=torch.float64, generator=generator) for shape in ((2, 4), (4,), (4,), (4,))
    )
    for weight in weights[:2]:
        weight[..., -3:] = 0
    gain, running_sum = torch.tensor([0.5, 1, 2]), torch.randn(2, 1, 3, 1, dtype=torch.float64, generator=generator)
    q, k, v, bias = convolved_features(x, weights, gain, running_sum, 1)
    with torch.no_grad():
        alone = convolved_features(x, weights, gain, running_sum, 1)
    expected = *(F.pad(t[..., :-3], (0, 3)) for t in (q, k)), v, bias  # the cache has the bias
    for a, b in zip(alone, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
