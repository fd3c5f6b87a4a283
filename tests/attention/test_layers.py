"""Each attention is what its docstring says, starts as it says, and costs what it says."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import live_model

from gkachat.attention import attention_class, register
from gkachat.attention.features import ShortConv, _ShortConv, apply_rope, rms_norm, rope_table
from gkachat.attention.kernels.reference import visible
from gkachat.config import GKAConfig, GPTConfig
from gkachat.model.gpt import GPT
from gkachat.model.stats import model_stats

B, T, H, D = 2, 150, 3, 16


def drawn_layer(attention, **options):
    """Return the first layer of two, which has a window of 129, in float64 with every parameter drawn."""
    model = live_model(attention, sequence_len=T, n_embd=H * D, head_dim=D, vocab_size=16, **options).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    assert model.blocks[0].attn.window == 129
    return model.blocks[0].attn


def convolved(x, weight):
    """Convolve tap by tap."""
    padded = F.pad(x, (0, 0, 0, 0, 3, 0))
    return sum(padded[:, 3 - n : 3 - n + x.size(1)] * weight[n] for n in range(4))


def with_value_embedding(v, layer, x_BTC, idx):
    if layer is None:
        return v
    gate = 3 * (x_BTC[..., :12] @ layer.gate.weight.T).sigmoid()
    return v + gate[..., None] * layer.table.weight[idx].view(v.shape)


def softmax_definition(attn, x_BTC, idx, rope):
    q, k, v = ((x_BTC @ matrix.weight.T).view(B, T, H, D) for matrix in (attn.c_q, attn.c_k, attn.c_v))
    if attn.convs is not None:
        q, k, v = (convolved(t, conv.weight) for t, conv in zip((q, k, v), attn.convs, strict=True))
    q, k = (1.2 * rms_norm(apply_rope(t, rope)) for t in (q, k))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(D)
    return scores, with_value_embedding(v, attn.value_embedding, x_BTC, idx)


def gka_definition(attn, x_BTC, idx, rope):
    options, x = attn.config.gka, x_BTC.view(B, T, H, D)
    x = rms_norm(x) if options.normalize else x
    f = (apply_rope(x, rope) if options.rope else x).transpose(1, 2)
    distances = (f[:, :, :, None] - f[:, :, None]).square().sum(-1)
    return -distances / (2 * (2 * attn.log_sigma).exp()[:, None, None]), x


def gka_conv_definition(attn, x_BTC, idx, rope):
    """Scores plus the logarithm of the product f_(j+1) ... f_i; q and k have three channels less than v."""
    x = x_BTC.view(B, T, H, D)
    q, k = (convolved(x[..., :-3], conv.weight).transpose(1, 2) for conv in (attn.conv_q, attn.conv_k))
    distances = (q[:, :, :, None] - k[:, :, None]).square().sum(-1)
    scores = -distances / (2 * (2 * attn.log_sigma).exp()[:, None, None])
    f_TBH = (x_BTC @ attn.forget_gate.gate.weight.T + attn.forget_gate.bias).sigmoid().transpose(0, 1)
    products, rows = x.new_ones(B, H, 0), []
    for f in f_TBH:
        products = torch.cat((products * f[..., None], x.new_ones(B, H, 1)), dim=-1)
        rows.append(F.pad(products, (0, T - len(rows) - 1), value=1.0))
    return scores + torch.stack(rows, dim=2).log(), convolved(x, attn.conv_v.weight)


def output_definition(attn, y_BTHD, x_BTC):
    """The output as c_proj reads it, gated."""
    gate = getattr(attn, "head_gate", None)
    return y_BTHD if gate is None else y_BTHD * 2 * (x_BTC[..., :12] @ gate.gate.weight.T).sigmoid()[..., None]


@pytest.mark.parametrize(
    ("attention", "definition", "options"),
    [
        ("softmax", softmax_definition, {}),
        ("softmax", softmax_definition, {"value_embeddings": False, "short_conv": True}),
        ("gka", gka_definition, {}),
        ("gka", gka_definition, {"gka": GKAConfig(rope=True, include_self=False)}),
        ("gka", gka_definition, {"gka": GKAConfig(rope=False, normalize=True)}),
        ("gka_conv", gka_conv_definition, {}),
    ],
)
def test_outputs_and_gradients_are_those_of_the_definition(attention, definition, options):
    attn = drawn_layer(attention, **options)
    x, dy = torch.randn(2, B, T, H * D, dtype=torch.float64)
    rope, idx, results = tuple(t.double() for t in rope_table(T, D)), torch.randint(16, (B, T)), []
    mask = visible(T, 129, include_self=attn.include_self)
    has_key = mask.any(1, keepdim=True)

    def defined(x):
        scores, v = definition(attn, x, idx, rope)
        weights = scores.masked_fill(~mask & has_key, -torch.inf).softmax(-1) * has_key
        y = torch.einsum("bhij,bjhd->bihd", weights, v)
        return output_definition(attn, y, x).flatten(2) @ attn.c_proj.weight.T

    for function in (lambda x: attn(x, idx, rope), defined):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *attn.parameters()], dy)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [1, 3, 9])
def test_a_short_convolution_starts_as_a_delay_and_has_the_right_gradients(length):
    conv = ShortConv(2, 3).double()
    conv.init_weights()
    x = torch.randn(2, length, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(conv(x, length), x)
    conv.init_weights((1, 3))
    for head, delay in enumerate((1, 3)):
        assert torch.equal(conv(x, length)[:, :, head], F.pad(x, (0, 0, 0, 0, delay, 0))[:, :length, head])
    torch.nn.init.normal_(conv.weight)
    torch.testing.assert_close(conv(x, length), convolved(x, conv.weight), rtol=1e-12, atol=1e-12)
    assert torch.equal(conv(x, 1), conv(x, length)[:, -1:])
    assert torch.autograd.gradcheck(_ShortConv.apply, (x, conv.weight))


def test_bandwidths_start_at_the_root_of_half_the_head_and_stay_in_float32():
    for block in live_model("gka", dtype=torch.bfloat16).blocks:
        assert block.attn.log_sigma.dtype == torch.float32
        torch.testing.assert_close(block.attn.sigma, torch.full((2,), math.sqrt(8)))


@pytest.mark.parametrize("depth", [3, 4])
def test_value_embeddings_are_in_every_other_layer_and_the_last(depth):
    model = live_model("softmax", depth=depth, value_embeddings=True)
    has = [block.attn.value_embedding is not None for block in model.blocks]
    assert has[-1] and all(a != b for a, b in itertools.pairwise(has))


def test_value_embeddings_cost_parameters_and_no_flops():
    without, having = (model_stats(GPTConfig(depth=20, value_embeddings=wanted)) for wanted in (False, True))
    assert having.params.keys() - without.params.keys() == {"value_embeddings", "gates"}
    assert having.params["matrices"] == without.params["matrices"]
    assert having.flops_per_token == without.flops_per_token


def test_gka_conv_adds_less_than_a_hundredth_of_the_parameters_and_four_bytes_per_key_and_head():
    gka, conv = (model_stats(GPTConfig(depth=20, attention=name)) for name in ("gka", "gka_conv"))
    counts = {
        "convolutions": 20 * 4 * (1280 + 2 * (1280 - 3 * 10)),  # three channels of queries and keys hold the bias
        "gates": 20 * (12 + 1280) * 10,
        "forget_bias": 20 * 10,
        "input_mix": 19 * 2,
    }
    assert {name: conv.params[name] for name in counts} == counts
    added = conv.params["total"] - gka.params["total"]
    assert added == sum(counts.values()) < 0.01 * gka.params["total"]
    assert conv.flops_per_token - gka.flops_per_token == 6 * counts["convolutions"]
    assert conv.params["matrices"] == gka.params["matrices"]
    assert conv.cache_bytes_per_token - gka.cache_bytes_per_token == 20 * 10 * 4  # a bias


def test_an_untrained_gka_conv_token_finds_what_followed_a_token_like_itself():
    """In a text said twice, the heads give most weight to what came 1, 2 and 3 tokens after it the first time."""
    n = 12
    attn = GPT(GPTConfig(depth=1, attention="gka_conv", vocab_size=16, sequence_len=24, n_embd=192, head_dim=64))
    attn = attn.blocks[0].attn
    x = rms_norm(torch.randn(n, 3, 64, generator=torch.Generator().manual_seed(0))).repeat(2, 1, 1).view(1, 2 * n, 192)
    weights = attn.attention_weights(x, torch.zeros(1, 2 * n, dtype=torch.long), rope_table(2 * n, 64)).weights[0]
    for head in range(3):
        found = weights[head, n : 2 * n - 3, :n].argmax(dim=-1)
        assert torch.equal(found, torch.arange(head + 1, head + n - 2))


def test_registered_names_are_unique_and_unknown_ones_are_listed():
    with pytest.raises(ValueError, match="attention 'gka' exists already"):
        register("gka", attention_class("gka"))
    with pytest.raises(ValueError, match="given 'linear', expected one of softmax, gka, gka_conv"):
        attention_class("linear")
