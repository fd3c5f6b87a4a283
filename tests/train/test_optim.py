"""Muon's orthogonal steps, cautious decay, and who steps what."""

import math

import pytest
import torch

from gkachat.config import OptimConfig
from gkachat.config_file import load_config
from gkachat.model.gpt import GPT, GPTConfig
from gkachat.train.distributed import World
from gkachat.train.optim import POLAR_EXPRESS, Muon, Optimizers, orthogonalize
from gkachat.train.schedule import resolve


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


OFF = {"muon_nesterov": False, "muon_variance_norm": False, "muon_cautious": False}
ONE = torch.ones(())


def parameters(*grads, start=0.0):
    made = [torch.nn.Parameter(torch.full(g.shape, start)) for g in grads]
    for p, g in zip(made, grads, strict=True):
        p.grad = g.clone()
    return made


def muon(params, **options):
    return Muon(params, OptimConfig(**options), World())


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [OFF, {}])
def test_a_step_has_the_learning_rates_length_whatever_the_gradients(options):
    for scale in (1e-4, 1e4):
        (p,) = parameters(scale * randn(32, 32))
        muon([p], **options).step(0.02, 0.0, 0.95, ONE)
        assert p.detach().norm().item() / 32**0.5 == pytest.approx(0.02, rel=0.2)


def test_tall_matrices_step_further():
    wide, tall = parameters(randn(16, 64), randn(16, 64).mT)
    muon([wide, tall]).step(1.0, 0.0, 0.95, ONE)
    torch.testing.assert_close(tall, 2 * wide.mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cautious", [True, False])
def test_cautious_decay_acts_only_where_it_pulls_with_the_step(cautious):
    start = torch.ones(8, 8)
    plain, decayed = (parameters(randn(8, 8), start=1.0)[0] for _ in range(2))
    for p, decay in ((plain, 0.0), (decayed, 0.5)):
        muon([p], muon_cautious=cautious).step(0.1, decay, 0.95, ONE)
    step = start - plain.detach()
    acts = step > 0 if cautious else torch.ones(8, 8, dtype=torch.bool)
    torch.testing.assert_close(decayed, torch.where(acts, plain - 0.1 * 0.5 * start, plain))
    assert acts.any() and acts.all() != cautious


def test_matrices_of_one_shape_step_as_each_would_alone():
    grads = randn(3, 8, 8)
    together = parameters(*grads, start=1.0)
    muon(together).step(0.1, 0.1, 0.9, ONE)
    for p, g in zip(together, grads, strict=True):
        (alone,) = parameters(g, start=1.0)
        muon([alone]).step(0.1, 0.1, 0.9, ONE)
        torch.testing.assert_close(p, alone)


@pytest.mark.parametrize("shape", [(6, 6), (4, 10), (10, 4)])
@pytest.mark.parametrize("options", [OFF, {}, *({**OFF, name: True} for name in OFF)])
def test_steps_are_those_of_a_plain_muon_in_float64(shape, options):
    """A Muon spelled out matrix by matrix, with an exact orthogonalisation in place of the five-step iteration's."""
    switches = {name: options.get(name, True) for name in OFF}
    (p,) = parameters(torch.zeros(shape), start=1.0)
    optimizer = muon([p], **options)
    weights, momentum = torch.ones(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    axis = 1 if shape[0] >= shape[1] else 0
    variance = None
    for seed in range(4):
        grad = randn(*shape, seed=seed)
        p.grad = grad.clone()
        optimizer.step(0.1, 0.3, 0.9, ONE)

        momentum = 0.9 * momentum + 0.1 * grad.double()
        step = 0.1 * grad.double() + 0.9 * momentum if switches["muon_nesterov"] else momentum
        # What the five polynomials make of each singular value, with no matrix product in between.
        U, S, Vh = torch.linalg.svd(step, full_matrices=False)
        S = S / (step.norm() * 1.02 + 1e-6)
        for a, b, c in POLAR_EXPRESS:
            S = a * S + b * S**3 + c * S**5
        step = U @ torch.diag(S) @ Vh
        if switches["muon_variance_norm"]:
            mean = step.square().mean(axis, keepdim=True)
            variance = 0.05 * mean if variance is None else 0.95 * variance + 0.05 * mean
            scaled = step / variance.sqrt()
            step = scaled * step.norm() / scaled.norm()
        step = step * max(1, shape[0] / shape[1]) ** 0.5
        decay = 0.3 * weights
        if switches["muon_cautious"]:
            decay = decay * (step * weights >= 0)
        weights = weights - 0.1 * (step + decay)
        torch.testing.assert_close(p.detach().double(), weights, rtol=0, atol=2e-5)  # float32 over four steps


@pytest.mark.parametrize("attention", ["softmax", "gka"])
def test_with_ok_0_a_step_changes_nothing_whatever_the_gradients_hold(attention):
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=2, n_embd=32, head_dim=16, attention=attention, vocab_size=64, sequence_len=16))
    optimizers = Optimizers(model, resolve(load_config(None, ["--model.depth=2"])).optim)
    idx = torch.randint(64, (2, 16))

    def everything():
        return {**model.state_dict(), **optimizers.state_tensors(model)}

    for _ in range(2):
        model(idx, idx).backward()
        optimizers.step(1.0, 0.9)
    before = {key: t.clone() for key, t in everything().items()}
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizers.step(1.0, 0.9, ok=torch.zeros(()))
    after = everything()
    assert all(torch.equal(after[key], t) for key, t in before.items())
    model(idx, idx).backward()
    optimizers.step(1.0, 0.9)
    assert all(torch.isfinite(t).all() and not torch.equal(t, before[k]) for k, t in everything().items())


@pytest.mark.parametrize("attention", ["softmax", "gka"])
def test_every_parameter_is_stepped_by_exactly_one_optimizer(attention):
    config = resolve(load_config(None, ["--model.depth=2", "--model.n_embd=32", "--model.head_dim=16"]))
    model = GPT(GPTConfig(depth=2, n_embd=32, head_dim=16, attention=attention, vocab_size=64, sequence_len=16))
    optimizers = Optimizers(model, config.optim)
    muon = [p for stack in optimizers.muon.stacks for p in stack.params]
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
    optimizers_b.load_state_tensors(b, {k: t.clone() for k, t in optimizers_a.state_tensors(a).items()}.items())
    steps(a, optimizers_a, 2)
    steps(b, optimizers_b, 2)
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_parameter_group_without_a_learning_rate_is_named(monkeypatch):
    model = GPT(GPTConfig(depth=1, vocab_size=16, sequence_len=8, n_embd=16, head_dim=16))
    groups = model.parameter_groups()
    monkeypatch.setattr(model, "parameter_groups", lambda: {**groups, "slopes": []})
    with pytest.raises(ValueError, match="parameter groups: given slopes, expected some of matrices"):
        Optimizers(model, OptimConfig(lr_scale=1.0, adam_scale=1.0))
