"""Muon's steps, cautious decay, which optimizer steps what, and optimizer state."""

import math
from copy import deepcopy

import pytest
import torch

from gkachat.config import OptimConfig
from gkachat.config_file import load_config
from gkachat.model.gpt import GPT, GPTConfig
from gkachat.train.distributed import World
from gkachat.train.optim import (
    POLAR_EXPRESS,
    Muon,
    ShardedAdamW,
    load_named_state,
    make_optimizers,
    named_state,
    orthogonalize,
)
from gkachat.train.schedule import resolve, set_hyperparameters

SWITCHES = ("nesterov", "variance_norm", "cautious")
OFF = dict.fromkeys(SWITCHES, False)
CONFIG = resolve(load_config(None, ["--model.depth=2", "--model.n_embd=32", "--model.head_dim=16"]))
IDX = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(*grads, start=0.0):
    made = [torch.nn.Parameter(torch.full(g.shape, start)) for g in grads]
    for p, g in zip(made, grads, strict=True):
        p.grad = g.clone()
    return made


def model_and_optimizers(attention="gka", seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(depth=2, n_embd=32, head_dim=16, attention=attention, vocab_size=64, sequence_len=16))
    return model, make_optimizers(model, CONFIG.optim)


def train(model, optimizers, steps):
    for _ in range(steps):
        model(IDX, IDX).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (2, 64, 16)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_directions(shape):
    X = torch.nn.functional.normalize(randn(*shape), dim=-1)  # rows have one norm by then
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    got = U.mT @ orthogonalize(X, torch.float32).double() @ Vh.mT
    singular = got.diagonal(dim1=-2, dim2=-1)
    # Five steps bring relative values from 1 down to about 1/100 into this band (the polynomials equioscillate).
    large = S / S[..., :1] > 0.02
    assert (singular[large] > 0.7).all() and (singular < 1.3).all()
    assert (got - torch.diag_embed(singular)).abs().max() < 0.01


@pytest.mark.parametrize("switches", [OFF, {}])
def test_the_length_of_a_muon_step_is_the_learning_rate_whatever_the_gradient(switches):
    for scale in (1e-4, 1e4):
        (p,) = parameters(scale * randn(32, 32))
        Muon([p], lr=0.02, **switches).step()
        assert p.detach().norm().item() / 32**0.5 == pytest.approx(0.02, rel=0.2)


def test_tall_matrices_take_longer_steps():
    wide, tall = parameters(randn(16, 64), randn(16, 64).mT)
    Muon([wide, tall], lr=1.0).step()
    assert (wide.norm().item(), tall.norm().item()) == pytest.approx((16**0.5, 2 * 16**0.5), rel=1e-4)


@pytest.mark.parametrize("cautious", [True, False])
def test_cautious_decay_acts_only_where_it_has_the_sign_of_the_step(cautious):
    start = torch.ones(8, 8)
    plain, decayed = (parameters(randn(8, 8), start=1.0)[0] for _ in range(2))
    for p, decay in ((plain, 0.0), (decayed, 0.5)):
        Muon([p], lr=0.1, weight_decay=decay, cautious=cautious).step()
    step = start - plain.detach()
    acts = step > 0 if cautious else torch.ones(8, 8, dtype=torch.bool)
    torch.testing.assert_close(decayed, torch.where(acts, plain - 0.1 * 0.5 * start, plain))
    assert acts.any() and acts.all() != cautious


def test_stacked_matrices_step_as_each_would_alone():
    grads = randn(3, 8, 8)
    together = parameters(*grads, start=1.0)
    Muon(together, lr=0.1, weight_decay=0.1, momentum=0.9).step()
    for p, g in zip(together, grads, strict=True):
        (alone,) = parameters(g, start=1.0)
        Muon([alone], lr=0.1, weight_decay=0.1, momentum=0.9).step()
        torch.testing.assert_close(p, alone)


@pytest.mark.parametrize("shape", [(6, 6), (4, 10), (10, 4)])
@pytest.mark.parametrize("switches", [OFF, {}, *({**OFF, name: True} for name in SWITCHES)])
def test_muon_steps_are_those_of_a_plain_muon_in_float64(shape, switches):
    """The reference goes matrix by matrix and applies the polynomials to exact singular values."""
    on = {name: switches.get(name, True) for name in SWITCHES}
    (p,) = parameters(torch.zeros(shape), start=1.0)
    optimizer = Muon([p], lr=0.1, weight_decay=0.3, momentum=0.9, **switches)
    weights, momentum = torch.ones(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    axis = 1 if shape[0] >= shape[1] else 0
    variance = None
    for seed in range(4):
        grad = randn(*shape, seed=seed)
        p.grad = grad.clone()
        optimizer.step()

        momentum = 0.9 * momentum + 0.1 * grad.double()
        step = 0.1 * grad.double() + 0.9 * momentum if on["nesterov"] else momentum
        step = step * step.norm() / shape[0] ** 0.5 / step.norm(dim=1, keepdim=True)
        U, S, Vh = torch.linalg.svd(step, full_matrices=False)
        S = S / (step.norm() * 1.01 + 1e-6)
        for a, b, c in POLAR_EXPRESS:
            S = a * S + b * S**3 + c * S**5
        S = S * min(shape) ** 0.5 / S.norm()
        step = U @ torch.diag(S) @ Vh
        if on["variance_norm"]:
            mean = step.square().mean(axis, keepdim=True)
            variance = 0.1 * mean if variance is None else 0.9 * variance + 0.1 * mean
            scaled = step / variance.sqrt()
            step = scaled * step.norm() / scaled.norm()
        decay = 0.3 * weights
        if on["cautious"]:
            decay = decay * (step * weights >= 0)
        weights = weights - 0.1 * max(1, shape[0] / shape[1]) ** 0.5 * (step + decay)
        torch.testing.assert_close(p.detach().double(), weights, rtol=0, atol=2e-5)  # float32 over four steps


@pytest.mark.parametrize("attention", ["softmax", "gka"])
def test_found_inf_makes_a_step_change_nothing_whatever_the_gradients_hold(attention):
    model, optimizers = model_and_optimizers(attention)

    def everything():
        return {k: t.clone() for k, t in {**model.state_dict(), **named_state(optimizers, model)}.items()}

    train(model, optimizers, 2)
    before = everything()
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    for optimizer in optimizers:
        optimizer.found_inf = torch.ones(())
        optimizer.step()
    after = everything()
    assert all(torch.equal(after[key], t) for key, t in before.items())
    for optimizer in optimizers:
        optimizer.found_inf = torch.zeros(())
    model.zero_grad()
    train(model, optimizers, 1)
    assert all(torch.isfinite(t).all() and not torch.equal(t, before[k]) for k, t in everything().items())


@pytest.mark.parametrize("attention", ["softmax", "gka", "gka_conv"])
def test_every_parameter_is_in_exactly_one_group_with_a_name_and_a_learning_rate(attention):
    model, (muon, adamw) = model_and_optimizers(attention)
    stepped = [p for optimizer in (muon, adamw) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, stepped)) == sorted(map(id, model.parameters()))
    assert all(p.ndim == 2 for p in muon.model_parameters())
    groups = {group["name"]: group for optimizer in (muon, adamw) for group in optimizer.param_groups}
    assert groups["matrices 128 x 32"]["lr"] == CONFIG.optim.lr_scale * 0.02
    assert groups["lm_head"]["initial_lr"] == pytest.approx(CONFIG.optim.lr_scale * CONFIG.optim.width_scale * 0.008)
    assert ("log_sigma" in groups) == (attention != "softmax") and ("input_mix" in groups) == (attention == "gka_conv")
    for name in {"log_sigma", "forget_bias", "input_mix"} & groups.keys():
        assert groups[name]["initial_lr"] == pytest.approx(CONFIG.optim.lr_scale * CONFIG.optim.sigma_lr)


def test_the_schedule_sets_the_learning_rate_of_every_group():
    _, optimizers = model_and_optimizers()
    set_hyperparameters(optimizers, 0, CONFIG)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(group["initial_lr"] / CONFIG.train.warmup_steps)
    assert optimizers[0].param_groups[0]["momentum"] == pytest.approx(0.85)


@pytest.mark.parametrize("by_name", [True, False], ids=["named_state", "state_dict"])
def test_optimizer_state_survives_a_round_trip(by_name):
    a, optimizers_a = model_and_optimizers()
    train(a, optimizers_a, 3)
    b, optimizers_b = model_and_optimizers(seed=1)
    b.load_state_dict(a.state_dict())
    if by_name:
        load_named_state(optimizers_b, b, {k: t.clone() for k, t in named_state(optimizers_a, a).items()}.items())
    else:
        for old, new in zip(optimizers_a, optimizers_b, strict=True):
            new.load_state_dict(deepcopy(old.state_dict()))  # torch does not copy tensors
    for model, optimizers in ((a, optimizers_a), (b, optimizers_b)):
        train(model, optimizers, 2)
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_ranks_divide_matrices_and_large_embeddings_among_them():
    embedding, small = torch.nn.Parameter(torch.zeros(256, 64)), torch.nn.Parameter(torch.zeros(4, 4))
    for rank in range(2):
        adamw = ShardedAdamW([{"params": [embedding, small]}], World(rank, 2))
        assert [tuple(p.shape) for p in adamw.param_groups[0]["params"]] == [(128, 64), (4, 4)]
        muon = Muon(parameters(*randn(3, 8, 8)), world=World(rank, 2))
        assert len(muon.state) == (2, 1)[rank]


def test_a_parameter_group_without_a_learning_rate_is_named(monkeypatch):
    model = GPT(GPTConfig(depth=1, vocab_size=16, sequence_len=8, n_embd=16, head_dim=16))
    groups = model.parameter_groups()
    monkeypatch.setattr(model, "parameter_groups", lambda: {**groups, "slopes": []})
    with pytest.raises(ValueError, match="parameter groups: given slopes, expected some of matrices"):
        make_optimizers(model, OptimConfig(lr_scale=1.0, width_scale=1.0, weight_decay=0.0))
