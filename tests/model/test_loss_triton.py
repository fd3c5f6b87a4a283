"""The head's loss in Triton, in its interpreter, against all logits at once in float64; and its code for a GPU."""

import pytest
import torch
import torch.nn.functional as F
from conftest import live_model
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from gkachat.model import loss_triton
from gkachat.model.loss import IGNORE, HeadLoss, choose_head_loss

head_loss = loss_triton.head_loss


def inputs(N, V, dtype, *, C=16, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=generator).to(dtype).requires_grad_()
    weight = (scale * torch.randn(V, C, generator=generator)).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[::5] = IGNORE
    return x, weight, targets


def exact(x, weight, targets, factor=1.0):
    """Loss and gradients in float64, of the weight as the products read it."""
    x64, w64 = x.detach().double().requires_grad_(), weight.detach().to(x.dtype).double().requires_grad_()
    loss = F.cross_entropy(15 * torch.tanh(x64 @ w64.mT / 15), targets, ignore_index=IGNORE)
    return loss, *torch.autograd.grad(factor * loss, (x64, w64))


# Logits and their gradients are rounded to the dtype of x, to 2^-9 of themselves in bfloat16. A logit of 8 is then off
# by 0.02, and with it p and the gradient by 2 %. In float32, dx is a sum over the vocabulary. Some CPUs add it up one
# term after the other, which is off by sqrt(50,257) roundings of 2^-24, or 1.3e-5.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize(
    ("N", "V", "rows"),
    [(37, 300, 16), (16, 256, 8), (3, 50_257, 2)],  # one block and several; chunks that divide N and that do not
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loss_and_gradients_are_those_of_all_logits_at_once(N, V, rows, dtype, monkeypatch):
    monkeypatch.setattr(loss_triton, "LOGITS_PER_CHUNK", rows * V)
    x, weight, targets = inputs(N, V, dtype)
    got = head_loss(x, weight, targets)
    dx, dweight = torch.autograd.grad(3 * got, (x, weight))
    assert got.dtype == torch.float32 and dx.dtype == dtype and dweight.dtype == weight.dtype
    for a, b in zip((got, dx, dweight), exact(x, weight, targets, factor=3), strict=True):
        assert (a.double() - b).norm() <= TOLERANCE[dtype] * b.norm()


def test_logits_far_beyond_the_cap_have_its_loss_and_vanishing_gradients():
    x, weight, targets = inputs(20, 100, torch.float32, scale=300.0)
    got = head_loss(x, weight, targets)
    dx, dweight = torch.autograd.grad(got, (x, weight))
    loss, dx64, dweight64 = exact(x, weight, targets)
    torch.testing.assert_close(got.double(), loss, rtol=5e-6, atol=0)
    # 1 - tanh^2 is a difference of numbers near 1, so that its error is float32's 6e-8 times the largest derivative.
    for a, b, factor in ((dx, dx64, weight), (dweight, dweight64, x)):
        assert (a.double() - b).abs().max() <= 1e-6 * factor.abs().max() + 1e-5 * b.abs().max()


def test_rows_that_are_not_scored_give_no_loss_and_no_gradient():
    x, weight, targets = (t.detach() for t in inputs(10, 300, torch.float32))
    targets.fill_(IGNORE)
    total, dx, dweight = loss_triton.head_loss_sum(x, weight, targets, True)
    assert total == 0 and not dx.any() and not dweight.any()
    x[0] = float("nan")
    total, dx, _ = loss_triton.head_loss_sum(x, weight, targets, True)
    assert total == 0 and not dx.any()
    assert head_loss(x, weight, targets).isnan()  # as with torch's cross_entropy: there is no mean of nothing


def test_targets_need_not_be_contiguous():
    x, weight, targets = inputs(20, 300, torch.float32)
    x, targets = x.detach()[::2].requires_grad_(), targets[::2]
    got = head_loss(x, weight, targets)
    for a, b in zip((got, *torch.autograd.grad(got, (x, weight))), exact(x, weight, targets), strict=True):
        assert (a.double() - b).norm() <= TOLERANCE[torch.float32] * b.norm()


def test_no_rows_have_no_mean_and_no_gradient():
    x, weight, targets = inputs(0, 300, torch.float32)
    loss = head_loss(x, weight, targets)
    dx, dweight = torch.autograd.grad(loss, (x, weight), torch.ones(()))
    assert loss.isnan() and dx.shape == x.shape and dweight.shape == weight.shape


def test_no_gradients_are_made_for_the_outputs_that_hold_gradients():
    made = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made.append(str(function))
            return function(*args, **(kwargs or {}))

    x, weight, targets = inputs(10, 300, torch.float32)
    loss = head_loss(x, weight, targets)
    with Recorder():
        torch.autograd.grad(loss, (x, weight))
    assert made and not any("zeros" in name for name in made)


def test_without_gradients_only_the_loss_is_made():
    x, weight, targets = inputs(10, 300, torch.bfloat16)
    expected = head_loss(x, weight, targets)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(x, weight, targets), expected.detach(), rtol=0, atol=0)
    total, dx, dweight = loss_triton.head_loss_sum(x.detach(), weight.detach(), targets, False)
    assert total > 0 and dx.numel() == dweight.numel() == 0


def test_the_operator_is_registered_in_full():
    for with_gradients in (True, False):
        x, weight, targets = inputs(5, 70, torch.float32)
        tests = ["test_schema", "test_faketensor"] + ["test_autograd_registration"] * with_gradients
        torch.library.opcheck(
            loss_triton.head_loss_sum, (x.detach(), weight.detach(), targets, with_gradients), test_utils=tests
        )


def test_a_compiled_model_is_one_graph_with_equal_gradients():
    model = live_model("softmax", depth=1)
    model.head_loss = HeadLoss("triton", "a test", head_loss)
    idx = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))
    model(idx, idx).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(idx, idx).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_choice_and_its_reason_are_in_the_lines_that_training_prints():
    assert choose_head_loss(torch.device("cuda"), torch.bfloat16).name == "triton"
    assert "the dtype is torch.float64" in choose_head_loss(torch.device("cuda"), torch.float64).reason
    assert live_model().kernel_lines()[-1] == "head loss: torch (no triton kernel: the device is cpu)"


def test_the_kernel_compiles_for_a_gpu_without_spills(compiled_resources):
    rows = compiled_resources("tests/fused_resources.py", "loss")
    assert len(rows) == 6 and not any(row["spilled"] for row in rows)
    assert all(row["registers"] * 32 * row["warps"] <= 65536 // 2 for row in rows)  # two rows on a multiprocessor
