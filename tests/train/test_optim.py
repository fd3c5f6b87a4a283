"""Muon's orthogonal steps, cautious decay, and who steps what."""

import pytest
import torch

from gkachat.config import load_config
from gkachat.gpt import GPT, GPTConfig
from gkachat.train.optim import Muon, Optimizers, orthogonalize
from gkachat.train.recipe import resolve


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (2, 64, 16)])
def test_singular_values_go_to_about_one_and_directions_stay(shape):
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    got = U.mT @ orthogonalize(X, torch.float32).double() @ Vh.mT
    singular = got.diagonal(dim1=-2, dim2=-1)
    # Five steps bring relative values from 1 down to about 1/100 into this band (the polynomials equioscillate).
    large = S / S[..., :1] > 0.02
    assert (singular[large] > 0.7).all() and (singular < 1.3).all()
    off_diagonal = got - torch.diag_embed(singular)
    assert off_diagonal.abs().max() < 0.01


def test_a_step_has_the_learning_rates_length_whatever_the_gradients():
    for scale in (1e-4, 1e4):
        p = torch.nn.Parameter(torch.zeros(32, 32))
        p.grad = scale * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
        Muon([p], lr=0.02, weight_decay=0.0).step()
        assert p.detach().norm().item() / 32**0.5 == pytest.approx(0.02, rel=0.2)


def test_tall_matrices_step_further():
    wide, tall = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((16, 64), (64, 16)))
    wide.grad = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    tall.grad = wide.grad.mT.clone()
    Muon([wide, tall], lr=1.0, weight_decay=0.0).step()
    torch.testing.assert_close(tall, 2 * wide.mT, rtol=1e-4, atol=1e-5)


def test_decay_acts_only_where_it_pulls_with_the_step():
    grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    start = torch.ones(8, 8)
    plain, decayed = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    for p, decay in ((plain, 0.0), (decayed, 0.5)):
        p.grad = grad.clone()
        Muon([p], lr=0.1, weight_decay=decay).step()
    step = start - plain.detach()
    expected = torch.where(step > 0, plain - 0.1 * 0.5 * start, plain)
    torch.testing.assert_close(decayed, expected)
    assert (decayed != plain).any() and (decayed == plain).any()


def test_matrices_of_one_shape_step_as_each_would_alone():
    grads = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    together = [torch.nn.Parameter(torch.ones(8, 8)) for _ in grads]
    for p, g in zip(together, grads, strict=True):
        p.grad = g.clone()
    Muon(together, lr=0.1, weight_decay=0.1).step()
    for p, g in zip(together, grads, strict=True):
        alone = torch.nn.Parameter(torch.ones(8, 8))
        alone.grad = g.clone()
        Muon([alone], lr=0.1, weight_decay=0.1).step()
        torch.testing.assert_close(p, alone)


@pytest.mark.parametrize("attention", ["softmax", "gka"])
def test_every_parameter_is_stepped_by_exactly_one_optimizer(attention):
    config = resolve(load_config(None, ["--model.depth=2", "--model.n_embd=32", "--model.head_dim=16"]))
    model = GPT(GPTConfig(depth=2, n_embd=32, head_dim=16, attention=attention, vocab_size=64, sequence_len=16))
    optimizers = Optimizers(model, config.optim)
    muon = [p for group in optimizers.muon.param_groups for p in group["params"]]
    adamw = [p for group in optimizers.adamw.param_groups for p in group["params"]]
    assert sorted(map(id, muon + adamw)) == sorted(map(id, model.parameters()))
    assert all(p.ndim == 2 for p in muon)
    if attention == "gka":
        assert {id(block.attn.log_sigma) for block in model.blocks} <= set(map(id, adamw))


def test_state_survives_a_round_trip_by_name():
    config = resolve(load_config(None, ["--model.depth=2", "--model.n_embd=32", "--model.head_dim=16"]))
    shape = GPTConfig(depth=2, n_embd=32, head_dim=16, attention="gka", vocab_size=64, sequence_len=16)
    idx = torch.randint(64, (2, 16))

    def steps(model, optimizers, n):
        for _ in range(n):
            model(idx, idx).backward()
            optimizers.step(1.0, 0.9)

    torch.manual_seed(0)
    a = GPT(shape)
    optimizers_a = Optimizers(a, config.optim)
    steps(a, optimizers_a, 3)
    b = GPT(shape)
    b.load_state_dict(a.state_dict())
    optimizers_b = Optimizers(b, config.optim)
    optimizers_b.load_state_tensors(b, {k: t.clone() for k, t in optimizers_a.state_tensors(a).items()})
    steps(a, optimizers_a, 2)
    steps(b, optimizers_b, 2)
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
