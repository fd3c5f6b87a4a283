"""The decode kernel in PyTorch against the reference."""

import pytest
import torch

from gkachat.attention.features import rope_at
from gkachat.attention.kernels import decode, reference
from gkachat.attention.qkv import QKV, KVSlice, Taps

B, T, H, S, D = 3, 4, 2, 11, 8


def drawn_slice(rows, gaussian, seed):
    """Cached tokens of which each new one sees some. The Gaussian kind rotates its keys; the others have biases."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(rows, H, S, D, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.zeros(B, 1, T, S).masked_fill(torch.rand(B, 1, T, S, generator=generator) < 0.3, -torch.inf)
    if not gaussian:
        return KVSlice(k, v, mask, key_bias=3 * torch.rand(rows, H, S, 1, generator=generator))
    cos, sin = rope_at(torch.arange(S).expand(rows, 1, -1), D)
    return KVSlice(k, k, mask, k.float().square().sum(-1, keepdim=True), (cos, sin))


@pytest.mark.parametrize("gaussian", [False, True])
def test_new_tokens_attend_to_all_slices_as_by_the_definition(gaussian):
    q = torch.randn(B, T, H, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.tensor([1.5, 2.5]) if gaussian else None
    qkv = QKV(q, q, q, scale=0.3, sigma=sigma)
    slices = [drawn_slice(1, gaussian, seed=1), drawn_slice(B, gaussian, seed=2)]  # a shared prefix, and rows
    got, expected = decode.attend(qkv, slices), reference.attend_cached(qkv, slices)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # scores and weights are float32


@pytest.mark.parametrize("queries_first", [False, True])
@pytest.mark.parametrize("N", [1, 3])
def test_bfloat16_is_near_the_definition_in_either_order_of_the_products(queries_first, N):
    generator = torch.Generator().manual_seed(0)
    q, x = (torch.randn(B, T, H, D, generator=generator).bfloat16() for _ in range(2))
    part = drawn_slice(B, gaussian=False, seed=1)
    k = torch.randn(B, H, N - 1 + S, D, generator=generator).bfloat16()
    part, taps = part._replace(k=k, v=part.v.bfloat16()), None
    if N > 1:
        taps = Taps(x, *(torch.randn(N, H, D, generator=generator).bfloat16() for _ in range(2)))
        part = part._replace(v=k)
    qkv = QKV(q, q, q, scale=0.3, taps=taps)
    expected = reference.attend_cached(qkv, [part]).float()
    error = decode.attend(qkv, [part], queries_first).float() - expected
    assert error.norm() <= 2**-6 * expected.norm()


def test_a_token_that_sees_no_key_gets_zero():
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 3, 5, 4)
    hidden = KVSlice(k, k, torch.full((1, 1, 2, 5), -torch.inf))
    for attend in (decode.attend, reference.attend_cached):
        assert torch.equal(attend(QKV(q, q, q), [hidden]), torch.zeros(1, 2, 3, 4))
