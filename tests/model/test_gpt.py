"""The model: causality, windows, parameter groups, the start of training."""

import itertools
import math
import subprocess
import sys

import pytest
import torch

from gkachat.config import ConfigError, PlusConfig
from gkachat.model.gpt import GPT, GKAConfig, GPTConfig

BOTH = pytest.mark.parametrize("attention", ["softmax", "gka"])


def build(attention="gka", seed=0, *, live=True, dtype=torch.float32, **options):
    options = {"depth": 3, "vocab_size": 64, "sequence_len": 40, "n_embd": 32, "head_dim": 16} | options
    torch.manual_seed(seed)
    model = GPT(GPTConfig(attention=attention, **options), dtype)
    if live:  # output projections start at zero, which would hide everything that attention does
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("c_proj.weight"):
                    p.normal_(std=0.2)
                if name == "lm_head.weight":
                    p.normal_(std=0.2)
    return model


def tokens(B=2, T=40, seed=1):
    return torch.randint(64, (B, T), generator=torch.Generator().manual_seed(seed))


@BOTH
@pytest.mark.parametrize("gka", [GKAConfig(), GKAConfig(rope=True, include_self=False, normalize=True)])
def test_future_tokens_do_not_change_past_logits(attention, gka):
    model, idx = build(attention, gka=gka), tokens()
    changed = idx.clone()
    changed[:, 25] = (changed[:, 25] + 1) % 64
    a, b = model(idx), model(changed)
    assert torch.equal(a[:, :25], b[:, :25])
    assert not torch.equal(a[:, 25:], b[:, 25:])


@BOTH
def test_logits_depend_on_the_past(attention):
    model, idx = build(attention), tokens()
    changed = idx.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 64
    assert not torch.equal(model(idx)[:, -1], model(changed)[:, -1])


@BOTH
def test_a_short_window_layer_sees_no_further_than_its_window(attention):
    model = build(attention, sequence_len=1024, depth=2, window_pattern="SL")
    layer = model.blocks[0].attn
    assert layer.window == 256 and model.blocks[1].attn.window is None
    x, idx = torch.randn(1, 300, 32), tokens(1, 300)
    rope = (model.cos[:300], model.sin[:300])
    changed = x.clone()
    changed[:, 10] += 1
    a, b = layer(x, idx, rope), layer(changed, idx, rope)
    assert torch.equal(a[:, 266:], b[:, 266:])
    assert not torch.equal(a[:, 265], b[:, 265])


@BOTH
def test_logits_are_float32_capped_and_shaped(attention):
    for dtype in (torch.float32, torch.bfloat16):
        logits = build(attention, dtype=dtype)(tokens())
        assert logits.shape == (2, 40, 64) and logits.dtype == torch.float32
        assert logits.abs().max() <= 15


@BOTH
def test_loss_is_the_mean_over_scored_targets(attention):
    model, idx = build(attention), tokens()
    targets = idx.roll(-1, 1)
    targets[:, 30:] = -1
    log_probabilities = model(idx).double().log_softmax(-1)[:, :30]
    expected = -log_probabilities.gather(-1, targets[:, :30, None]).mean()
    torch.testing.assert_close(model(idx, targets).double(), expected, rtol=1e-5, atol=0)


def test_both_attentions_start_at_the_uniform_loss_and_within_a_tenth_of_a_nat():
    idx = tokens()
    losses = [build(attention, live=False)(idx, idx.roll(-1, 1)).item() for attention in ("softmax", "gka")]
    assert abs(losses[0] - losses[1]) < 0.1
    assert losses == pytest.approx([math.log(64)] * 2, abs=0.1)


@BOTH
def test_the_same_seed_gives_the_same_weights(attention):
    a, b, c = (build(attention, seed, live=False).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["wte.weight"], c["wte.weight"])


@BOTH
def test_initial_weights_have_the_stated_spread(attention):
    model = build(attention, live=False, n_embd=128, head_dim=64, vocab_size=512)
    state = model.state_dict()
    assert state["wte.weight"].std().item() == pytest.approx(0.8, rel=0.05)
    assert state["lm_head.weight"].std().item() == pytest.approx(0.001, rel=0.05)
    assert state["blocks.0.mlp.c_fc.weight"].std().item() == pytest.approx(0.4 * 128**-0.5, rel=0.05)
    assert not any(t.any() for name, t in state.items() if name.endswith("c_proj.weight"))
    assert state["residual_scale"].tolist() == pytest.approx([1.15, 1.10, 1.05])
    assert state["x0_mix"].tolist() == pytest.approx([0.20, 0.125, 0.05])


def test_bandwidths_start_at_the_root_of_half_the_head_and_are_kept_in_float32():
    model = build(dtype=torch.bfloat16, live=False)
    for block in model.blocks:
        assert block.attn.log_sigma.dtype == torch.float32
        torch.testing.assert_close(block.attn.sigma, torch.full((2,), math.sqrt(8)))


def test_value_embeddings_are_on_alternating_layers_and_always_the_last():
    for name, depth in itertools.product(("softmax", "gka_plus"), (3, 4)):
        model = build(name, depth=depth, plus=PlusConfig(value_embeddings=True))
        has = [block.attn.value_embedding is not None for block in model.blocks]
        assert has[-1] and all(a != b for a, b in itertools.pairwise(has))


def test_a_softmax_model_without_value_embeddings_keeps_its_three_projections():
    groups, usual = build("softmax", value_embeddings=False).parameter_groups(), build("softmax").parameter_groups()
    assert usual.keys() - groups.keys() == {"value_embeddings", "value_gates"}
    assert len(groups["matrices"]) == len(usual["matrices"])


@BOTH
def test_parameter_groups_add_up_and_every_parameter_learns(attention):
    model, idx = build(attention), tokens()
    groups = model.parameter_groups()
    grouped = [p for group in groups.values() for p in group]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert len(grouped) == len(list(model.parameters()))
    model(idx, idx.roll(-1, 1)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.any(), name


@BOTH
def test_backends_agree_in_the_whole_model(attention):
    a = build(attention, gka=GKAConfig(backend="reference"))
    b = build(attention, gka=GKAConfig(backend="sdpa"))
    torch.testing.assert_close(a(tokens()), b(tokens()), rtol=0, atol=1e-4)


def test_gka_options_change_what_is_computed():
    plain = build()(tokens())
    for option in ({"rope": True}, {"include_self": False}, {"normalize": True}):
        assert (build(gka=GKAConfig(**option))(tokens()) - plain).abs().max() > 1e-3


@BOTH
def test_bfloat16_stays_close_to_float32(attention):
    exact, rounded = build(attention)(tokens()), build(attention, dtype=torch.bfloat16)(tokens())
    # 8 bits of mantissa through three layers.
    assert (exact - rounded).abs().mean() < 0.03 * exact.abs().mean()


def test_a_context_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="given 41 tokens, expected at most sequence_len 40"):
        build()(tokens(1, 41))


def test_a_shape_that_cannot_be_is_refused_with_every_reason():
    with pytest.raises(ConfigError) as caught:
        GPTConfig(depth=0, attention="linear", window_pattern="X", sequence_len=1)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "depth",
        "attention",
        "sequence_len",
        "window_pattern",
    ]


def test_model_and_attention_import_with_torch_alone():
    code = """
import sys
for name in ("wandb", "datasets", "matplotlib", "tiktoken", "tokenizers", "tyro", "rich", "safetensors", "pyarrow"):
    sys.modules[name] = None
import gkachat.model.gpt, gkachat.attention
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
