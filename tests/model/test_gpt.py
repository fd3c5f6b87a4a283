"""The model around its attention: logits, loss, weights, recomputation, errors. test_conformance.py has the rest."""

import subprocess
import sys

import pytest
import torch
from conftest import live_model

from gkachat.checks import ConfigError
from gkachat.config import ATTENTIONS, GKAConfig, GPTConfig
from gkachat.model.gpt import GPT

EVERY = pytest.mark.parametrize("attention", list(ATTENTIONS))
SHAPE = {"depth": 3, "sequence_len": 40}


def tokens(B=2, T=40):
    return torch.randint(64, (B, T), generator=torch.Generator().manual_seed(1))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_float32_and_capped_at_15(attention, dtype):
    logits = live_model(attention, dtype=dtype, **SHAPE)(tokens())
    assert logits.shape == (2, 40, 64) and logits.dtype == torch.float32
    assert logits.abs().max() <= 15


def test_logits_to_keep_are_the_last_ones():
    model, idx = live_model("gka", **SHAPE), tokens()
    torch.testing.assert_close(model(idx, logits_to_keep=3), model(idx)[:, -3:])


@EVERY
def test_the_loss_is_the_mean_over_scored_targets(attention):
    model, idx = live_model(attention, **SHAPE), tokens()
    targets = idx.roll(-1, 1)
    targets[:, 30:] = -1
    log_p = model(idx).double().log_softmax(-1)[:, :30]
    expected = -log_p.gather(-1, targets[:, :30, None]).mean()
    torch.testing.assert_close(model(idx, targets).double(), expected, rtol=1e-5, atol=0)


@EVERY
def test_the_seed_decides_the_weights(attention):
    def weights(seed):
        torch.manual_seed(seed)
        return GPT(GPTConfig(attention=attention, depth=2, vocab_size=64)).state_dict()

    a, b, c = map(weights, (5, 5, 6))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["wte.weight"], c["wte.weight"])


def test_initial_weights_have_the_stated_spread():
    model = GPT(GPTConfig(depth=3, vocab_size=512, n_embd=128, head_dim=64))
    state = model.state_dict()
    assert state["wte.weight"].std().item() == pytest.approx(0.8, rel=0.05)
    assert state["lm_head.weight"].std().item() == pytest.approx(0.001, rel=0.05)
    assert state["blocks.0.mlp.c_fc.weight"].std().item() == pytest.approx(0.4 * 128**-0.5, rel=0.05)
    assert state["blocks.0.attn.c_q.weight"].std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert state["residual_scale"].tolist() == pytest.approx([1.15, 1.10, 1.05])
    assert state["x0_mix"].tolist() == pytest.approx([0.20, 0.125, 0.05])


@EVERY
def test_attention_reads_the_embedding_where_the_config_asks_for_it(attention):
    """What a layer after the first compares is the learned sum of its input and the smeared embedding."""
    model = live_model(attention, attention_x0=True, **SHAPE)
    layers = [block.attn for block in model.blocks[1:]]
    assert model.blocks[0].attn.input_mix is None
    assert [layer.input_mix.tolist() for layer in layers] == [[0.5, 0.5]] * 2
    given, read, gated = [], [], []
    for i, layer in enumerate(layers):
        layer.input_mix.data = torch.tensor([0.3 + i, 0.7])
        layer.register_forward_pre_hook(lambda _, args: given.append((args[0], args[4])))
        layer.inputs = lambda x, inputs=layer.inputs: read.append(x) or inputs(x)
        layer.output = lambda y, x, output=layer.output: gated.append(x) or output(y, x)
    model(tokens())
    embeddings = torch.nn.functional.rms_norm(model.wte(tokens()), (model.config.n_embd,))
    with_past = embeddings.roll(1, dims=1).index_fill(1, torch.tensor([0]), 0.0)
    x0 = embeddings + model.smear.share * torch.sigmoid(model.smear.gate(embeddings[..., :24])) * with_past
    for i, ((x, given_x0), x_read, x_gated) in enumerate(zip(given, read, gated, strict=True)):
        assert x_gated is x
        torch.testing.assert_close(given_x0, x0, rtol=0, atol=1e-5)
        torch.testing.assert_close(x_read, (0.3 + i) * x + 0.7 * x0, rtol=0, atol=1e-5)


def test_a_layer_that_reads_the_embedding_must_be_given_it():
    layer, x = live_model("gka_conv", **SHAPE).blocks[1].attn, torch.randn(1, 40, 32)
    with pytest.raises(ValueError, match="x0_BTC: given None, expected the embedding"):
        layer(x, tokens(1), None)


def test_attention_that_reads_the_stream_alone_has_no_shares():
    model = live_model("gka_conv", attention_x0=False, **SHAPE)
    assert "input_mix" not in model.parameter_groups()
    assert all(block.attn.input_mix is None for block in model.blocks)


def test_backends_of_gka_agree_in_the_whole_model():
    a, b = (live_model("gka", gka=GKAConfig(backend=backend), **SHAPE) for backend in ("reference", "sdpa"))
    torch.testing.assert_close(a(tokens()), b(tokens()), rtol=0, atol=1e-4)


def test_a_context_that_is_too_long_is_an_error():
    with pytest.raises(ValueError, match="given 41 tokens, expected at most sequence_len 40"):
        live_model(**SHAPE)(tokens(1, 41))


def test_a_shape_that_cannot_be_is_an_error_with_every_reason():
    with pytest.raises(ConfigError) as caught:
        GPTConfig(depth=0, attention="linear", window_pattern="X", sequence_len=1)
    fields = [problem.split(":")[0] for problem in caught.value.problems]
    assert fields == ["depth", "attention", "sequence_len", "window_pattern"]


def test_model_and_attention_import_with_torch_alone():
    code = """
import sys
for name in ("wandb", "datasets", "matplotlib", "tiktoken", "tokenizers", "tyro", "rich", "safetensors", "pyarrow"):
    sys.modules[name] = None
import gkachat.model.gpt, gkachat.attention
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
