"""gka_plus is what its docstring says, and costs what it says."""

import pytest
import torch
import torch.nn.functional as F

from gkachat.attention.features import ShortConv, _ShortConv, apply_rope, rms_norm, rope_table
from gkachat.config import PlusConfig
from gkachat.model.gpt import GPT, GPTConfig
from gkachat.model.stats import model_stats

B, T, H, D = 2, 150, 3, 16
SETTINGS = {
    "as it comes": {},
    "whole": {"neighbour": True, "token_bandwidth": True, "key_weight": True},
    "one tap": {"taps": 1, "key_delays": False},
    "not normalised": {"normalize": False},
    "not normalised, weighed": {"normalize": False, "key_weight": True, "token_bandwidth": True},
    "value embeddings": {"value_embeddings": True},
    "bare": {"conv_query": False, "conv_key": False, "conv_value": False, "rope": False, "key_weight": True},
}  # fmt: skip


def layer(dtype=torch.float64, **plus):
    """The first of three, which has a window of 128; all that it learns is drawn."""
    torch.manual_seed(0)
    config = GPTConfig(
        depth=3, attention="gka_plus", vocab_size=16, sequence_len=T, n_embd=H * D, head_dim=D, plus=PlusConfig(**plus)
    )
    model = GPT(config).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.blocks[0].attn


def convolved(x, conv):
    """Tap by tap, as the definition has it."""
    if not isinstance(conv, ShortConv):
        return x
    taps = len(conv.weight)
    padded = F.pad(x, (0, 0, 0, 0, taps - 1, 0))
    return sum(padded[:, taps - 1 - n : taps - 1 - n + T] * conv.weight[n] for n in range(taps))


def defined(attn, x_BTC, idx, rope):
    """The docstring's formulas, a query and a key at a time in one T x T table."""
    plus, x = attn.config.plus, x_BTC.view(B, T, H, D)
    f = x[:, :, [(h + 1) % H for h in range(H)]] if plus.neighbour else x
    q, k, v = convolved(f, attn.conv_q), convolved(f, attn.conv_k), convolved(x, attn.conv_v)
    if plus.value_embeddings:
        gate = 3 * (x_BTC[..., :12] @ attn.value_gate.weight.T).sigmoid()
        v = v + gate[..., None] * attn.value_embedding.weight[idx].view(B, T, H, D)
    if plus.rope:
        q, k = apply_rope(q, rope), apply_rope(k, rope)
    if plus.normalize:
        q, k = rms_norm(q), rms_norm(k)
    inverse = (-2 * attn.log_sigma).exp()
    tau = (x * attn.bandwidth).sum(-1).exp() if plus.token_bandwidth else torch.ones_like(x[..., 0])
    bias = (x * attn.key_weight).sum(-1) if plus.key_weight else torch.zeros_like(x[..., 0])
    # The last channel gives way where there is a bias for it to hold.
    n = D - 1 if plus.key_weight or not plus.normalize else D
    if not plus.normalize:
        bias = bias - 0.5 * inverse * k[..., :n].square().sum(-1)
    scores = torch.einsum("bihd,bjhd->bhij", q[..., :n], k[..., :n])
    scores = scores * (tau * inverse).transpose(1, 2)[..., None] + bias.transpose(1, 2)[:, :, None]
    i = torch.arange(T)
    distance = i[:, None] - i[None, :]
    scores = scores.masked_fill((distance < 0) | (distance >= attn.window), -torch.inf)
    y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    return attn.c_proj(y.flatten(2))


@pytest.mark.parametrize("setting", SETTINGS)
def test_outputs_and_gradients_are_those_of_the_definition(setting):
    attn = layer(**SETTINGS[setting])
    x = torch.randn(B, T, H * D, dtype=torch.float64)
    rope, dy = tuple(t.double() for t in rope_table(T, D)), torch.randn(B, T, H * D, dtype=torch.float64)
    results, idx = [], torch.randint(16, (B, T))
    for function in (lambda x: attn(x, idx, rope), lambda x: defined(attn, x, idx, rope)):
        attn.zero_grad()
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.backward(dy)
        results.append([y, leaf.grad, *(p.grad.clone() for p in attn.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_the_future_is_not_seen():
    attn, rope = layer(torch.float32), rope_table(T, D)
    x = torch.randn(1, T, H * D)
    changed = x.clone()
    changed[:, 100:] += 1
    with torch.no_grad():
        a, b = attn(x, None, rope), attn(changed, None, rope)
    assert torch.equal(a[:, :100], b[:, :100]) and not torch.allclose(a[:, 100:], b[:, 100:])


@pytest.mark.parametrize("length", [1, 3, 9])
def test_a_convolution_starts_as_a_delay_and_has_the_right_gradients(length):
    conv = ShortConv(2, 3).double()
    conv.init_weights()
    x = torch.randn(2, length, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(conv(x), x)
    conv.init_weights((1, 3))
    for head, delay in enumerate((1, 3)):
        assert torch.equal(conv(x)[:, :, head], F.pad(x, (0, 0, 0, 0, delay, 0))[:, :length, head])
    torch.nn.init.normal_(conv.weight)
    torch.testing.assert_close(conv(x), conv.of(F.pad(x, (0, 0, 0, 0, 3, 0))), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(_ShortConv.apply, (x, conv.weight))


def test_the_additions_take_less_than_a_hundredth_of_the_parameters():
    gka, plus = (model_stats(GPTConfig(depth=20, attention=name)).params for name in ("gka", "gka_plus"))
    added = plus["total"] - gka["total"]
    assert added == plus["convolutions"] == 20 * 12 * 1280
    assert added < 0.01 * gka["total"] and plus["matrices"] == gka["matrices"]


def test_value_embeddings_are_softmaxs_and_cost_no_flops():
    softmax, plus, more = (
        model_stats(GPTConfig(depth=20, attention=name, plus=PlusConfig(value_embeddings=wanted)))
        for name, wanted in (("softmax", False), ("gka_plus", False), ("gka_plus", True))
    )
    added = more.params.keys() - plus.params.keys()
    assert added == {"value_embeddings", "value_gates"}
    assert all(more.params[name] == softmax.params[name] for name in added)
    assert more.params["total"] < softmax.params["total"] and more.flops_per_token == plus.flops_per_token


def test_untrained_a_token_finds_what_followed_one_like_itself():
    """Of a text said twice, heads give most to what came 1, 2, 3 tokens after a token the first time, or to that token
    where keys are not delayed."""
    n, found = 12, {}
    for delayed in (True, False):
        torch.manual_seed(0)
        config = GPTConfig(
            depth=1, attention="gka_plus", vocab_size=16, sequence_len=2 * n, n_embd=192, head_dim=64,
            plus=PlusConfig(key_delays=delayed),
        )  # fmt: skip
        attn = GPT(config).blocks[0].attn
        torch.nn.init.eye_(attn.c_proj.weight)
        x = rms_norm(torch.randn(n, 3, 64)).repeat(2, 1, 1)
        with torch.no_grad():
            y = attn(x.view(1, 2 * n, 192), None, rope_table(2 * n, 64)).view(2 * n, 3, 64)
        found[delayed] = torch.einsum("ihd,jhd->hij", y[n : 2 * n - 3], x[:n]).argmax(dim=-1)
    for head in range(3):
        assert torch.equal(found[True][head], torch.arange(head + 1, head + n - 2))
        assert torch.equal(found[False][head], torch.arange(n - 3))
