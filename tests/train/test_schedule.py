"""Horizon, batch, learning rates and weight decay from depth."""

import itertools
import math

import pytest

from gkachat.config_file import load_config
from gkachat.model.stats import PROTOCOLS, model_stats
from gkachat.train.schedule import decay_multiplier, highest_multiplier, lr_multiplier, muon_momentum, n_steps, resolve

FIXED = ("--model.sequence_len=64", "--train.total_batch_size=6400", "--train.total_tokens=6400000")


def resolved(*options, world_size=1):
    return resolve(load_config(None, options), world_size)


def test_the_reference_depth_has_the_reference_recipe():
    config = resolved("--model.depth=12")
    assert config.train.total_tokens == round(12 * model_stats(config.model).scaling_params)
    assert config.train.total_batch_size == 2**19
    assert (config.optim.lr_scale, config.optim.width_scale) == (1.0, 1.0)
    assert config.optim.weight_decay == pytest.approx(0.28)


def test_depth_20_follows_the_scaling_rules():
    config, reference = resolved("--model.depth=20"), resolved("--model.depth=12")
    growth = config.train.total_tokens / reference.train.total_tokens
    assert config.train.total_tokens == 12 * 435_159_040
    assert config.train.total_batch_size == 2 ** round(math.log2(2**19 * growth**0.383)) == 2**20
    assert config.optim.lr_scale == pytest.approx(math.sqrt(2))
    assert config.optim.width_scale == pytest.approx((1280 / 768) ** -0.5)
    assert config.optim.weight_decay == pytest.approx(0.28 * math.sqrt(2) / growth)


def test_equal_tokens_gives_both_attentions_the_same_recipe():
    softmax, gka = (resolved(f"--model.attention={name}") for name in ("softmax", "gka"))
    assert softmax.train == gka.train and softmax.optim == gka.optim


def test_protocols_set_the_total_flops_of_gka():
    baseline = resolved("--model.attention=softmax")
    spent = baseline.train.total_tokens * model_stats(baseline.model).flops_per_token
    ratios = {}
    for protocol in PROTOCOLS:
        config = resolved("--model.attention=gka", f"--train.protocol={protocol}")
        assert config.train.baseline_tokens == baseline.train.total_tokens
        ratios[protocol] = config.train.total_tokens * model_stats(config.model).flops_per_token / spent
    assert ratios["paper"] == pytest.approx(0.49) and ratios["equal-flops"] == pytest.approx(1.0)
    assert ratios["equal-tokens"] == pytest.approx(0.80, abs=0.01)
    assert ratios["equal-ratio"] == pytest.approx(0.62, abs=0.01)


def test_every_derived_value_can_be_set_by_hand():
    by_hand = {
        "train.baseline_tokens": 5000,
        "train.total_tokens": 7000,
        "train.total_batch_size": 4096,
        "optim.lr_scale": 0.5,
        "optim.width_scale": 0.25,
        "optim.weight_decay": 0.0,
    }
    config = resolved(*(f"--{name}={value}" for name, value in by_hand.items()))
    for name, value in by_hand.items():
        section, field = name.split(".")
        assert getattr(getattr(config, section), field) == value
    assert n_steps(config) == 2


def test_resolving_twice_changes_nothing():
    once = resolved("--model.attention=gka", "--train.protocol=paper")
    assert resolve(once) == once


def test_a_batch_is_whole_rows():
    config = resolved("--model.sequence_len=100", "--train.total_batch_size=1001", world_size=11)
    assert config.train.total_batch_size == 1100


def test_weight_decay_falls_to_nothing_and_momentum_can_be_set():
    config = resolved(*FIXED)
    decays = [decay_multiplier(step, config) for step in range(n_steps(config))]
    assert decays[0] == 1 and decays[500] == pytest.approx(0.5) and 0 < decays[-1] < 1e-5
    by_hand = resolved(*FIXED, "--optim.decay_schedule=false", "--optim.momentum=0.9")
    assert {decay_multiplier(step, by_hand) for step in range(1000)} == {1.0}
    assert {muon_momentum(step, by_hand) for step in range(1000)} == {0.9}


def test_learning_rate_rises_stays_and_falls():
    config = resolved(*FIXED)
    rates = [lr_multiplier(step, config) for step in range(n_steps(config))]
    assert len(rates) == 1000
    assert rates[0] == pytest.approx(1 / 40) and rates[39] == 1.0
    assert set(rates[39:351]) == {1.0}
    assert lr_multiplier(1000, config) == pytest.approx(0.05)
    assert all(a > b for a, b in itertools.pairwise(rates[350:]))
    assert rates[351] == pytest.approx(1 - 0.95 / 650)


@pytest.mark.parametrize(
    ("warmup", "warmdown", "shape", "reached"),
    [(0, 0.65, "linear", 1.0), (350, 0.65, "linear", 1.0), (4000, 0.0, "linear", 0.25), (600, 1.0, "cosine", None)],
)
def test_the_highest_learning_rate_of_a_run_is_known_before_it_starts(warmup, warmdown, shape, reached):
    options = (
        f"--train.warmup_steps={warmup}",
        f"--train.warmdown_fraction={warmdown}",
        f"--train.warmdown_shape={shape}",
    )
    config = resolved(*FIXED, *options)
    highest = highest_multiplier(config)
    assert highest == max(lr_multiplier(step, config) for step in range(1000))
    assert highest == reached or (reached is None and highest < 0.5)


@pytest.mark.parametrize("tokens_per_param", [1e-6, 1e6])
def test_the_smallest_and_the_largest_budget_can_be_planned(tokens_per_param):
    for depth in (1, 40):
        config = resolved(f"--train.tokens_per_param={tokens_per_param}", f"--model.depth={depth}")
        assert n_steps(config) >= 1 and type(config.train.total_batch_size) is int


def test_momentum_rises_and_falls():
    config = resolved(*FIXED, "--train.warmdown_fraction=0.5")
    values = [muon_momentum(step, config) for step in range(1000)]
    assert values[0] == pytest.approx(0.85) and values[400] == pytest.approx(0.97)
    assert values[499] == pytest.approx(0.97) and values[-1] == pytest.approx(0.90, abs=2e-4)


def test_a_run_of_one_step_learns():
    assert lr_multiplier(0, resolved("--train.total_tokens=1")) > 0
