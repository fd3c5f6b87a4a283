"""The cache by itself: its size and its errors. test_conformance.py decodes with it."""

import pytest
import torch
from conftest import live_model

from gkachat.attention.cache import Cache, LayerCacheSpec
from gkachat.attention.qkv import QKV
from gkachat.config import GPTConfig

T, BLOCK = 200, 32


def test_gka_keeps_half_of_what_softmax_keeps_and_a_norm_per_head():
    layers = {name: live_model(name).make_cache(4, T, block=BLOCK).layers[0] for name in ("softmax", "gka")}
    softmax, gka = (sum(buffer.nbytes for buffer in layers[name].values()) for name in ("softmax", "gka"))
    assert gka / softmax == (16 + 1) / 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gka_conv_keeps_a_wide_bias_per_key_and_head_beside_its_input_and_the_newest_sums(dtype):
    layer = live_model("gka_conv", dtype=dtype).make_cache(4, T, block=BLOCK).layers[1]  # without a window
    size, bias = dtype.itemsize, max(4, dtype.itemsize)
    assert {name: buffer.nbytes for name, buffer in layer.items()} == {
        "k": 4 * 2 * (T + 3) * 16 * size, "key_bias": 4 * 2 * T * bias, "running_sum": 4 * 2 * 2 * bias
    }  # fmt: skip


def test_a_layer_with_a_window_keeps_that_window_and_one_block():
    cache = live_model("gka", depth=3).make_cache(4, T, block=BLOCK)
    assert [layer["k"].size(2) for layer in cache.layers[:3]] == [129 + BLOCK - 1, 129 + BLOCK - 1, T]


@pytest.mark.parametrize("attention", ["softmax", "gka", "gka_conv"])
def test_bytes_of_a_row_grow_with_its_length_up_to_its_share_of_the_cache(attention):
    cache = live_model(attention, depth=3).make_cache(4, T, block=BLOCK)
    one, two, all = (cache.bytes_of(n) for n in (1, 2, T))
    before = 4 * 3 * 32 * 4 if attention == "gka_conv" else 0  # what the layer without a window keeps before its rows
    assert two == 2 * one and 4 * all + before == cache.n_bytes
    assert all < T * one  # layers with a window, and short convolutions, stop


def test_more_than_a_block_at_once_is_an_error():
    cache = live_model("gka").make_cache(1, T, block=BLOCK)
    with pytest.raises(ValueError, match="given 33 tokens at once, expected at most 32"):
        cache.step(slice(0, 1), 33)


def test_a_prefill_of_rows_that_hold_tokens_is_an_error():
    model = live_model("gka")
    cache, idx = model.make_cache(2, T, block=BLOCK), torch.zeros(1, 5, dtype=torch.long)
    model(idx, cache=cache.step(slice(0, 1), 5, prefill=True))
    cache.step(slice(1, 2), 5, prefill=True)
    with pytest.raises(ValueError, match=r"prefill of rows that hold \[5, 5\] tokens"):
        cache.step(slice(0, 2), 5, prefill=True)


@pytest.mark.parametrize("shared", [0, 7])
def test_biases_of_keys_are_sums_over_the_text_across_blocks_a_ring_that_wraps_and_a_shared_prefix(shared):
    """Each block brings a sum that starts with the block; a row may start anew. Keys hold their position.

    A part of the bias that is the token's own, here minus its position, stays out of the sum of later tokens.
    """
    config, spec = GPTConfig(depth=1, n_embd=24, head_dim=8, sequence_len=64), LayerCacheSpec(20, True, forgets=True)
    rates_BTH = torch.rand(3, 60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rates_BTH[:, :shared] = rates_BTH[0, :shared]

    def check(cache, row, text, sizes):
        for size in sizes:
            new = slice(cache.lengths[row], cache.lengths[row] + size)
            k = torch.arange(60.0, dtype=torch.float64)[new, None, None].expand(1, size, 3, 8)
            layer = cache.step(slice(row, row + 1), size).layer(0)
            running_sum = rates_BTH[None, text, new, :, None].cumsum(1)
            layer.append(QKV(k, k, k, key_bias=running_sum - k[..., :1], running_sum=running_sum))
            n_seen = 0
            for part in layer.slices(True):
                seen = part.mask[0, 0].isfinite().any(dim=0)
                positions = part.k[0, 0, seen, 0].long()
                expected = rates_BTH[text].cumsum(0)[positions].T - positions
                torch.testing.assert_close(part.key_bias[0, :, seen, 0], expected, rtol=1e-12, atol=1e-12)
                n_seen += len(positions)
            assert n_seen == min(new.stop, 20 + size - 1)

    prefix = Cache(config, [spec], 1, shared, block=BLOCK, dtype=torch.float64) if shared else None
    if shared:
        check(prefix, 0, 0, [4, 3])
    cache = Cache(config, [spec], 2, 60 - shared, block=10, prefix=prefix, dtype=torch.float64)
    assert cache.layers[0]["k"].size(2) == 29
    check(cache, 0, 0, [10, 1, 10, 1, 1, 10, 10, 10])
    check(cache, 1, 1, [3, 10, 1])
    cache.lengths[0] = shared
    check(cache, 0, 2, [1, 10, 10, 10, 1, 1])
