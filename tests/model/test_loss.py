"""The head's loss, a few rows at a time, against all logits at once in float64."""

import pytest
import torch
import torch.nn.functional as F

from gkachat.model import loss as loss_module
from gkachat.model.loss import capped_logits, head_loss

N, C, V = 37, 8, 29


def inputs(dtype=torch.float64, scale=4.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (scale * torch.randn(V, C, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[::5] = -1
    return x, weight if dtype == torch.float64 else weight.detach().float().requires_grad_(), targets


def at_once(x, weight, targets):
    logits = 15 * torch.tanh((x @ weight.mT) / 15)
    return F.cross_entropy(logits, targets, ignore_index=-1)


@pytest.mark.parametrize("at_a_time", [1, 5 * V, 2**26])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_are_those_of_all_logits_at_once(at_a_time, dtype, tolerance, monkeypatch):
    # float64 inputs too: logits are float32 whatever comes in.
    monkeypatch.setattr(loss_module, "LOGITS_AT_A_TIME", at_a_time)
    x, weight, targets = inputs(dtype)
    got = head_loss(x, weight, targets)
    dx, dweight = torch.autograd.grad(3 * got, (x, weight))
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = at_once(*exact, targets)
    gradients = torch.autograd.grad(3 * expected, exact)
    assert got.dtype == torch.float32 and dx.dtype == dtype and dweight.dtype == weight.dtype
    for a, b in ((got, expected), (dx, gradients[0]), (dweight, gradients[1])):
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_logits_are_those_the_loss_is_taken_of():
    x, weight, targets = inputs(torch.float32)
    expected = F.cross_entropy(capped_logits(x, weight), targets, ignore_index=-1)
    torch.testing.assert_close(head_loss(x, weight, targets), expected)


def test_without_gradients_none_are_taken():
    x, weight, targets = inputs(torch.float32)
    with torch.no_grad():
        assert not head_loss(x, weight, targets).requires_grad


def test_no_tensor_of_all_logits_is_ever_made(monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_AT_A_TIME", 4 * V)
    x, weight, targets = inputs(torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    with Watch():
        head_loss(x, weight, targets).backward()
    assert largest < N * V
