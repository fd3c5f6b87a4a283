"""Decoding with a cache gives the logits that the model gives without one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkachat.attention.cache import Keys, attend
from gkachat.config import PlusConfig
from gkachat.model.gpt import GPT, GKAConfig, GPTConfig

T, BLOCK = 200, 32
VARIANTS = {
    "softmax": {"attention": "softmax"},
    "gka": {"attention": "gka"},
    "gka rope": {"attention": "gka", "gka": GKAConfig(rope=True)},
    "gka normalize": {"attention": "gka", "gka": GKAConfig(normalize=True, rope=True)},
    "gka without self": {"attention": "gka", "gka": GKAConfig(include_self=False)},
    "gka_plus": {"attention": "gka_plus"},
    "gka_plus of two taps": {"attention": "gka_plus", "plus": PlusConfig(taps=2)},
    "gka_plus as it is": {"attention": "gka_plus", "plus": PlusConfig(normalize=False, rope=False, conv_value=False)},
    "gka_plus whole": {
        "attention": "gka_plus",
        "plus": PlusConfig(neighbour=True, token_bandwidth=True, key_weight=True, value_embeddings=True),
    },
    "softmax short_conv": {"attention": "softmax", "short_conv": True},
}
MODELS = {}


def model(variant, dtype=torch.float32):
    """Layers with a window of 128, one without."""
    if (variant, dtype) not in MODELS:
        torch.manual_seed(0)
        config = GPTConfig(depth=3, vocab_size=64, sequence_len=T, n_embd=32, head_dim=16, **VARIANTS[variant])
        made = GPT(config, dtype).eval()
        for name, p in made.named_parameters():
            if name.endswith(("c_proj.weight", "lm_head.weight", "bandwidth", "key_weight")) or ".conv" in name:
                torch.nn.init.normal_(p, std=0.2)
        MODELS[variant, dtype] = made
    return MODELS[variant, dtype]


def text(rows=1, seed=1):
    return torch.randint(64, (rows, T), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def decoded(made, idx, sizes, cache, rows):
    """Logits of all tokens, taken in parts of these sizes."""
    parts, at = [], 0
    for size in sizes:
        parts.append(made.decode(idx[:, at : at + size], cache, rows, every=True))
        at += size
    return torch.cat(parts, dim=1)


@st.composite
def splits(draw):
    sizes, left = [], T
    while left:
        sizes.append(draw(st.integers(1, min(left, draw(st.sampled_from([1, 3, BLOCK]))))))
        left -= sizes[-1]
    return sizes


@pytest.mark.parametrize("variant", VARIANTS)
@settings(deadline=None, max_examples=8)
@given(sizes=splits())
def test_any_split_of_a_text_gives_the_logits_without_a_cache(variant, sizes):
    made, idx = model(variant), text(2)
    with torch.inference_mode():
        expected = made(idx)
    got = decoded(made, idx, sizes, made.make_cache(2, T, block=BLOCK), slice(0, 2))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_different_lengths_do_not_meet(variant):
    made, idx, starts = model(variant), text(3), (150, 7, 64)
    cache = made.make_cache(3, T, block=BLOCK)
    with torch.inference_mode():
        expected = made(idx)
        for row, start in enumerate(starts):
            for at in range(0, start, BLOCK):
                made.decode(idx[row : row + 1, at : min(at + BLOCK, start)], cache, slice(row, row + 1))
        for step in range(40):
            new = torch.stack([idx[row, start + step] for row, start in enumerate(starts)])[:, None]
            got = made.decode(new, cache, slice(0, 3))
            wanted = torch.stack([expected[row, start + step] for row, start in enumerate(starts)])
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert cache.lengths == [start + 40 for start in starts]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shared", [1, 20, 170])
def test_rows_go_on_from_one_prefix_that_nobody_copies(variant, shared):
    made, idx = model(variant), text(3)
    idx[:, :shared] = idx[0, :shared]
    prefix = made.make_cache(1, shared, block=BLOCK)
    sizes = [min(BLOCK, shared - at) for at in range(0, shared, BLOCK)]
    decoded(made, idx[:1, :shared], sizes, prefix, slice(0, 1))
    before = [tensor.clone() for layer in prefix.layers for tensor in layer]
    cache = made.make_cache(3, T - shared, block=BLOCK, prefix=prefix)
    with torch.inference_mode():
        expected = made(idx)[:, shared:]
    got = decoded(made, idx[:, shared:], [1] * (T - shared), cache, slice(0, 3))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, (t for layer in prefix.layers for t in layer), strict=True))


def test_a_row_can_be_moved_and_cleared():
    made, idx = model("gka rope"), text(2)
    cache = made.make_cache(2, T, block=BLOCK)
    with torch.inference_mode():
        expected = made(idx)
        decoded(made, idx[1:], [BLOCK, 10], cache, slice(1, 2))
        cache.move(1, 0)
        got = made.decode(idx[1:, 42:43], cache, slice(0, 1))
        torch.testing.assert_close(got[0], expected[1, 42], rtol=1e-5, atol=1e-5)
        cache.lengths[0] = 0
        got = decoded(made, idx[:1], [BLOCK, 1], cache, slice(0, 1))
        torch.testing.assert_close(got, expected[:1, : BLOCK + 1], rtol=1e-5, atol=1e-5)


def test_gka_keeps_half_of_what_softmax_does_and_windows_no_more_than_themselves_and_a_block():
    caches = {name: model(name).make_cache(4, T, block=BLOCK) for name in ("softmax", "gka")}
    assert caches["gka"].n_bytes / caches["softmax"].n_bytes == (16 + 1) / 32  # and a norm for each of a head's 16
    assert [layer[0].size(2) for layer in caches["gka"].layers] == [128 + BLOCK - 1, 128 + BLOCK - 1, T]
    config = model("gka").config
    per_token = sum(tensor[0].nbytes / tensor.size(2) for layer in caches["gka"].layers for tensor in layer)
    assert per_token == config.depth * (config.n_embd + config.n_head) * 4


def test_sliding_sees_the_last_sequence_len_tokens():
    """Of a single layer the logits are those of that window alone, for positions only matter by their distance."""
    torch.manual_seed(0)
    made = GPT(GPTConfig(depth=1, attention="gka", vocab_size=64, sequence_len=24, n_embd=32, head_dim=16)).eval()
    torch.nn.init.normal_(made.blocks[0].attn.c_proj.weight, std=0.2)
    torch.nn.init.normal_(made.lm_head.weight, std=0.2)
    idx = text()[:, :100]
    cache = made.make_cache(1, 24 + 8, block=8, slide=True)
    got = decoded(made, idx, [8] * 5 + [1] * 60, cache, slice(0, 1))
    with torch.inference_mode():
        for at in (10, 23, 24, 50, 99):
            expected = made(idx[:, max(0, at - 23) : at + 1])[:, -1]
            torch.testing.assert_close(got[:, at], expected, rtol=1e-5, atol=1e-5)


def test_more_than_a_block_at_once_is_an_error():
    made = model("gka")
    with pytest.raises(ValueError, match="given 33 tokens at once, expected at most 32"):
        made.decode(text()[:, :33], made.make_cache(1, T, block=BLOCK), slice(0, 1))


def test_attention_to_nothing_is_nothing():
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 3, 5, 4)
    nothing = torch.full((1, 1, 2, 5), -torch.inf)
    assert torch.equal(attend(q, [Keys(k, k, nothing)], 1.0), torch.zeros(1, 2, 3, 4))


def test_bfloat16_decodes_as_it_evaluates():
    made, idx = model("gka rope", torch.bfloat16), text(2)
    with torch.inference_mode():
        expected = made(idx)
    got = decoded(made, idx, [BLOCK] * 6 + [1] * 8, made.make_cache(2, T, block=BLOCK), slice(0, 2))
    assert (got - expected).abs().max() < 0.1 * expected.std()
