"""The head's loss, a few rows at a time, against all logits at once in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gkachat.model import loss
from gkachat.model.loss import LOGIT_CAP, head_loss, scored_head_loss, soft_cap

N, C, V = 37, 8, 29


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = 4 * torch.randn(V, C, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (N,), generator=generator)
    targets[::5] = -1
    return x, weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_(), targets


@pytest.mark.parametrize("logits_per_part", [1, 5 * V, 2**26])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("function", [head_loss, scored_head_loss])
def test_loss_and_gradients_are_those_of_all_logits_at_once(function, logits_per_part, dtype, tolerance, monkeypatch):
    # Logits are float32 whatever comes in, so that float64 inputs are no more exact.
    monkeypatch.setattr(loss, "LOGITS_PER_PART", logits_per_part)
    x, weight, targets = inputs(dtype)
    got = function(x, weight, targets)
    dx, dweight = torch.autograd.grad(3 * got, (x, weight))
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = F.cross_entropy(15 * torch.tanh((exact[0] @ exact[1].mT) / 15), targets, ignore_index=-1)
    gradients = torch.autograd.grad(3 * expected, exact)
    assert got.dtype == torch.float32 and dx.dtype == dtype and dweight.dtype == weight.dtype
    for a, b in ((got, expected), (dx, gradients[0]), (dweight, gradients[1])):
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_the_loss_is_that_of_the_capped_logits():
    x, weight, targets = inputs(torch.float32)
    expected = F.cross_entropy(soft_cap(F.linear(x / LOGIT_CAP, weight)), targets, ignore_index=-1)
    torch.testing.assert_close(head_loss(x, weight, targets), expected)


def test_no_gradients_are_computed_where_none_are_wanted():
    x, weight, targets = inputs(torch.float32)
    with torch.no_grad():
        assert not head_loss(x, weight, targets).requires_grad


def test_no_tensor_of_all_logits_is_made(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_PER_PART", 4 * V)
    x, weight, targets = inputs(torch.float32)
    sizes = []

    class RecordSizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(t))
            return out

    with RecordSizes():
        head_loss(x, weight, targets).backward()
    assert max(sizes) < N * V


def test_on_a_cpu_only_scored_tokens_pass_the_head():
    x, weight, targets = inputs(torch.float32)
    targets[3:] = -1
    rows = []

    class RecordProducts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                rows.append(args[0].size(0))
            return func(*args, **(kwargs or {}))

    with RecordProducts():
        scored_head_loss(x, weight, targets)
    assert rows == [2, 2, V]  # logits, gradient of x, gradient of the weight; token 0 is not scored
    targets.fill_(-1)
    assert scored_head_loss(x, weight, targets).isnan()
