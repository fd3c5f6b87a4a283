"""The cache by itself: its size and its errors. test_conformance.py decodes with it."""

import pytest
import torch
from conftest import live_model

T, BLOCK = 200, 32


def test_gka_keeps_half_of_what_softmax_keeps_and_a_norm_per_head():
    layers = {name: live_model(name).make_cache(4, T, block=BLOCK).layers[0] for name in ("softmax", "gka")}
    softmax, gka = (sum(buffer.nbytes for buffer in layers[name].values()) for name in ("softmax", "gka"))
    assert gka / softmax == (16 + 1) / 32


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
