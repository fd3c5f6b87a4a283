"""Conformance suite: every attention must pass it, and is tested as soon as the registry has its name."""

import dataclasses
import math

import pytest
import torch
from conftest import live_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gkachat.attention.features import rope_table
from gkachat.attention.gka import GaussianKernelAttention
from gkachat.attention.gka_conv import GKAConv
from gkachat.attention.kernels import reference
from gkachat.attention.kernels.choose import KernelSpec, plain_kernels
from gkachat.config import ATTENTIONS, Config, GKAConfig, GPTConfig
from gkachat.model.gpt import GPT
from gkachat.model.stats import model_stats
from gkachat.train.optim import make_optimizers
from gkachat.train.schedule import resolve

T, BLOCK, WINDOW = 200, 32, 129
CASES = {name: {"attention": name} for name in ATTENTIONS} | {
    "softmax without value embeddings": {"attention": "softmax", "value_embeddings": False},
    "softmax with short convolutions": {"attention": "softmax", "short_conv": True},
    "softmax with the embedding": {"attention": "softmax", "attention_x0": True},
    "gka with the embedding": {"attention": "gka", "attention_x0": True},
    "gka_conv without the embedding": {"attention": "gka_conv", "attention_x0": False},
    "gka with rope": {"attention": "gka", "gka": GKAConfig(rope=True)},
    "gka with rope and norm": {"attention": "gka", "gka": GKAConfig(rope=True, normalize=True)},
    "gka without self": {"attention": "gka", "gka": GKAConfig(rope=True, include_self=False)},
    "cauchy": {"attention": "cauchy"},  # the example of docs/attention.md
}
EVERY = pytest.mark.parametrize("case", CASES)
MODELS = {}

pytestmark = pytest.mark.usefixtures("cauchy")


def model(case, dtype=torch.float32):
    """Two layers with a window, a last one without."""
    if (case, dtype) not in MODELS:
        MODELS[case, dtype] = live_model(**CASES[case], depth=3, sequence_len=T, dtype=dtype)
        assert [block.attn.window for block in MODELS[case, dtype].blocks] == [WINDOW, WINDOW, None]
    return MODELS[case, dtype]


def text(rows=1, length=T):
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(1))


def rope64(length, head_dim):
    """Tables whose rotation keeps norms to float64's precision, not to float32's."""
    cos, sin = rope_table(length, head_dim)
    angles = torch.atan2(sin.double(), cos.double())
    return angles.cos(), angles.sin()


def layer64(case, **shape):
    """A layer in float64 with a drawn input (2, T, C), and the other arguments: ids, rotation tables, embedding."""
    attn = live_model(**CASES[case], depth=3, **shape).double().blocks[1].attn
    for name, p in attn.named_parameters():
        if name != "log_sigma":
            torch.nn.init.normal_(p, std=0.3)
    config = attn.config
    x = torch.randn(2, config.sequence_len, config.n_embd, dtype=torch.float64, requires_grad=True)
    x0 = torch.randn_like(x, requires_grad=attn.input_mix is not None)
    idx = torch.randint(config.vocab_size, x.shape[:2])
    return attn, x, (idx, rope64(config.sequence_len, config.head_dim), None, x0)


# What a token sees.


@EVERY
def test_future_tokens_do_not_change_past_logits(case):
    idx = text(2)
    changed = idx.clone()
    changed[:, 100] = (changed[:, 100] + 1) % 64
    with torch.no_grad():
        a, b = model(case)(idx), model(case)(changed)
    assert torch.equal(a[:, :100], b[:, :100])
    assert not torch.equal(a[:, 100], b[:, 100]) and not torch.equal(a[:, -1], b[:, -1])


@EVERY
def test_tokens_beyond_the_window_do_not_change_the_output(case):
    attn, x, idx = model(case).blocks[0].attn, torch.randn(1, T, 32), text()
    changed = x.clone()
    changed[:, 10] += 1
    with torch.no_grad():
        a, b = (attn(x, idx, rope_table(T, 16)) for x in (x, changed))  # the first layer reads no embedding
    changes, beyond = (a - b).abs().amax(dim=-1)[0], 10 + WINDOW + attn.lookback  # convolutions look further back
    assert not changes[:10].any() and changes[11 : 10 + WINDOW].all()
    # Running sums of forget gates change by the same number for all keys, which changes how they are rounded.
    assert changes[beyond:].max() <= (1e-5 if attn.forgets else 0) < changes[11 : 10 + WINDOW].min()


# Decoding with a cache. Tolerances are those of float32 sums in another order.


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def read(made, idx, sizes, cache, row=0):
    """Logits of all tokens (B, T, V), read in parts of these sizes into B rows of the cache."""
    rows, logits = slice(row, row + idx.size(0)), []
    for part in idx.split(sizes, dim=1):
        logits.append(made(part, cache=cache.step(rows, part.size(1))))
    return torch.cat(logits, dim=1)


@torch.inference_mode()
def assert_rows_continue(made, texts, expected, cache, steps):
    """Decode a token of every row at a time, from each row's own length on."""
    rows = range(len(texts))
    for _ in range(steps):
        at = list(cache.lengths)
        new = torch.stack([texts[row][at[row]] for row in rows])[:, None]
        got = made(new, cache=cache.step(slice(0, len(texts)), 1), logits_to_keep=1)
        assert_close(got[:, 0], torch.stack([expected[row][at[row]] for row in rows]))


def test_scores_of_its_own_see_the_keys_that_convolutions_make_of_the_cache(monkeypatch):
    class OwnScores(GKAConv):
        def scores(self, q, k, qkv):
            return super().scores(q, k, qkv)

    monkeypatch.setitem(ATTENTIONS, "own_scores", OwnScores)
    made, idx = live_model(attention="own_scores", depth=3, sequence_len=T), text(2)
    assert "own scores" in made.kernel_lines()[0]
    with torch.no_grad():
        assert_close(read(made, idx, [100, *[1] * 20, 50, 30], made.make_cache(2, T, block=100)), made(idx))


@st.composite
def splits(draw):
    sizes, left = [], T
    while left:
        sizes.append(draw(st.integers(1, min(left, draw(st.sampled_from([1, 3, BLOCK]))))))
        left -= sizes[-1]
    return sizes


@EVERY
@settings(deadline=None, max_examples=6)
@given(sizes=splits())
def test_any_split_of_a_text_decodes_to_the_logits_of_the_whole(case, sizes):
    made, idx = model(case), text(2)
    with torch.inference_mode():
        expected = made(idx)
    assert_close(read(made, idx, sizes, made.make_cache(2, T, block=BLOCK)), expected)


@EVERY
@torch.inference_mode()
def test_rows_of_different_lengths_are_independent_and_can_be_moved_and_emptied(case):
    made, idx = model(case), text(3)
    expected, cache = made(idx), made.make_cache(3, T, block=BLOCK)
    for row, length in enumerate((150, 7, 64)):
        read(made, idx[row : row + 1, :length], BLOCK, cache, row)
    assert_rows_continue(made, idx, expected, cache, 20)
    assert cache.lengths == [170, 27, 84]
    cache.move(0, 1)
    cache.lengths[2] = 0
    assert_rows_continue(made, idx[[0, 0, 1]], expected[[0, 0, 1]], cache, 8)


@EVERY
@pytest.mark.parametrize("shared", [1, 20, 170])
@torch.inference_mode()
def test_rows_continue_a_shared_prefix_that_stays_as_it_is(case, shared):
    made, idx = model(case), text(3)
    idx[:, :shared] = idx[0, :shared]
    expected, prefix = made(idx), made.make_cache(1, shared, block=BLOCK)
    read(made, idx[:1, :shared], BLOCK, prefix)
    before = [{name: buffer.clone() for name, buffer in layer.items()} for layer in prefix.layers]
    cache = made.make_cache(3, T - shared, block=BLOCK, prefix=prefix)
    assert_rows_continue(made, idx, expected, cache, min(40, T - shared))
    for then, now in zip(before, prefix.layers, strict=True):
        assert all(torch.equal(then[name], now[name]) for name in now)


@EVERY
@torch.inference_mode()
def test_a_padded_prefill_gives_the_logits_of_the_whole_and_can_be_cut_to_each_rows_length(case):
    made, idx, lengths = model(case), text(2), [160, 131]
    expected, cache = made(idx), made.make_cache(2, T, block=T)
    padded = idx[:, :160].clone()
    padded[1, 131:] = 0
    got = made(padded, cache=cache.step(slice(0, 2), 160, prefill=True))
    for row, length in enumerate(lengths):
        assert_close(got[row, :length], expected[row, :length])
    cache.lengths = lengths
    assert_rows_continue(made, idx, expected, cache, 12)


@EVERY
@torch.inference_mode()
def test_bfloat16_stays_close_to_float32_and_decodes_as_it_evaluates(case):
    idx, exact, rounded = text(2), model(case), model(case, torch.bfloat16)
    expected, got = exact(idx), rounded(idx)
    assert got.dtype == torch.float32
    assert (got - expected).abs().mean() < 0.03 * expected.abs().mean()  # 8 bits through three layers
    decoded = read(rounded, idx, [BLOCK] * 6 + [1] * 8, rounded.make_cache(2, T, block=BLOCK))
    assert (decoded - got).abs().max() < 0.1 * got.std()


@EVERY
def test_the_cache_keeps_what_is_declared_and_counted(case):
    attn, config = model(case).blocks[0].attn, model(case).config
    rope = rope_table(9, 16)
    qkv = attn.qkv(attn.inputs(torch.randn(1, 9, 32)), text(1, 9), rope)
    assert ((qkv.cached_k is qkv.v) or qkv.taps is not None) == attn.shares_kv
    if attn.gaussian:
        assert qkv.sigma is not None
    if attn.unit_norm:
        for t in (qkv.q, qkv.k):  # the root of head_dim
            torch.testing.assert_close(t.norm(dim=-1), torch.full((1, 9, 2), 4.0), rtol=1e-4, atol=0)
    # At full windows every token has one slot. model_stats counts bfloat16, and float32 for biases of keys.
    made = GPT(dataclasses.replace(config, window_pattern="L"), torch.bfloat16)
    cache = made.make_cache(1, 50, block=10)
    names = ("k", "v", "key_bias")
    kept = sum(layer[name].nbytes for layer in cache.layers for name in names if name in layer)
    halo = 3 * (attn.taps - 1) * config.n_embd * 2
    assert kept == 50 * model_stats(config).cache_bytes_per_token + halo
    norms = 3 * 50 * config.n_head * 4 if attn.gaussian and not attn.unit_norm else 0
    recent = 3 * (attn.lookback + 1) * config.n_embd * 2 if attn.lookback and attn.taps == 1 else 0
    recent += 3 * 2 * config.n_head * 4 if attn.forgets else 0  # the running sum of one token before the new one
    recent += 2 * config.n_embd * 2  # the smear's: one embedding before the new one
    assert cache.n_bytes == kept + norms + recent


# Gradients, against the definition and against finite differences.


@EVERY
def test_outputs_and_gradients_are_those_of_the_reference_kernel_in_float64(case):
    attn, x, others = layer64(case)
    inputs = [t for t in (x, others[-1]) if t.requires_grad]
    spec = KernelSpec(16, T, attn.window, include_self=attn.include_self, gaussian=attn.gaussian)
    kernels, dy, results = [attn.kernel, plain_kernels(attn.scores, spec)[0]], torch.randn_like(x), []
    for attn.kernel in kernels:
        y = attn(x, *others)
        results.append([y, *torch.autograd.grad(y, [*inputs, *attn.parameters()], dy)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@EVERY
def test_gradcheck(case):
    attn, x, others = layer64(case, n_embd=16, head_dim=8, sequence_len=7, vocab_size=8)
    names = [name for name, _ in attn.named_parameters()]

    def layer(x, x0, *parameters):
        return torch.func.functional_call(attn, dict(zip(names, parameters, strict=True)), (x, *others[:-1], x0))

    assert torch.autograd.gradcheck(layer, (x, others[-1], *attn.parameters()), fast_mode=True)


@pytest.mark.parametrize("untrained", [False, True])
@EVERY
def test_attention_weights_are_those_that_forward_applies(case, untrained):
    attn, x, others = layer64(case)
    if untrained:  # keys of the first tokens may be zero then
        attn.init_weights()
        torch.nn.init.eye_(attn.c_proj.weight)
    found = attn.attention_weights(x, *others)
    y_BTHD = (found.weights @ found.values.transpose(1, 2)).transpose(1, 2)
    y_BTC = attn.c_proj(attn.output(y_BTHD, x).flatten(2))
    torch.testing.assert_close(y_BTC, attn(x, *others), rtol=1e-9, atol=1e-9)
    rows = found.weights.sum(dim=-1)
    torch.testing.assert_close(rows[:, :, 1:], torch.ones_like(rows[:, :, 1:]))
    assert (rows[:, :, 0] == 0).all() if not attn.include_self else (rows[:, :, 0] == 1).all()
    assert (found.distances is not None) == hasattr(attn, "log_sigma")
    if isinstance(attn, GaussianKernelAttention):  # in the bandwidth's units, whatever divides q
        mask = reference.visible(T, attn.window, include_self=attn.include_self)
        scores = -found.distances / (2 * attn.sigma.square()[:, None, None])
        if attn.forgets:
            qkv = attn.qkv(attn.inputs(attn.mixed(x, others[-1])), *others[:2])
            scores = scores + qkv.running_sum.permute(0, 2, 3, 1)
        torch.testing.assert_close(reference.weights(scores, mask), found.weights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float32) for case in CASES), *((name, torch.bfloat16) for name in ATTENTIONS)]
)
def test_a_model_compiles_to_one_graph_with_eager_gradients(case, dtype):
    torch._dynamo.reset()
    made = live_model(**CASES[case], sequence_len=160, dtype=dtype)
    idx, graphs = text(2, 160), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(made, backend=backend, fullgraph=True, dynamic=False)
    results = []
    for function in (compiled, made):
        made.zero_grad()
        loss = function(idx, idx.roll(-1, 1))
        loss.backward()
        results.append((loss, {name: p.grad for name, p in made.named_parameters()}))
    (loss, gradients), (expected, eager) = results
    assert len(graphs) == 1
    torch.testing.assert_close(loss, expected)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2  # the same products, perhaps added up in another order
    for name, gradient in eager.items():
        assert gradient.any() and (gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name


@EVERY
def test_recomputed_blocks_have_the_same_gradients(case):
    made, idx, gradients = live_model(**CASES[case]), text(2), []
    for made.recompute_blocks in (False, True):
        gradients.append(torch.autograd.grad(made(idx, idx.roll(-1, 1)), list(made.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# Parameters.


@EVERY
def test_every_parameter_belongs_to_one_group_and_is_stepped_by_an_optimizer(case):
    config = resolve(Config(model=model(case).config))
    made = live_model(**CASES[case])
    grouped = [p for group in made.parameter_groups().values() for p in group]
    assert sorted(map(id, grouped)) == sorted(map(id, made.parameters()))
    stepped = [p for optimizer in make_optimizers(made, config.optim) for p in optimizer.model_parameters()]
    assert sorted(map(id, stepped)) == sorted(map(id, made.parameters()))


@EVERY
def test_parameters_are_counted_without_allocating_them(case):
    stats, made = model_stats(model(case).config), model(case)
    assert stats.params["total"] == sum(p.numel() for p in made.parameters())
    assert stats.flops_per_token > 0


@EVERY
def test_weights_of_a_model_built_on_the_meta_device_are_all_initialized(case):
    config = GPTConfig(depth=2, vocab_size=64, sequence_len=40, n_embd=32, head_dim=16, **CASES[case])
    with torch.device("meta"):
        made = GPT(config)
    assert all(p.is_meta for p in made.parameters())
    made.to_empty(device="cpu")
    for p in made.parameters():
        p.data.fill_(torch.nan)
    made.init_weights()
    assert not any(p.isnan().any() for p in made.parameters())
    assert torch.equal(made.cos, GPT(config).cos)


@EVERY
def test_training_starts_at_the_uniform_loss_with_blocks_that_are_the_identity(case):
    made, idx = GPT(GPTConfig(depth=2, vocab_size=64, sequence_len=40, n_embd=32, head_dim=16, **CASES[case])), text()
    assert made(idx[:, :40], idx[:, 1:41]).item() == pytest.approx(math.log(64), abs=0.1)
    assert not any(p.any() for name, p in made.named_parameters() if name.endswith("c_proj.weight"))


@EVERY
def test_statistics_are_finite_with_one_row_per_layer(case):
    for rows in model(case).statistics().values():
        assert len(rows) == 3 and all(math.isfinite(number) for row in rows for number in row)
