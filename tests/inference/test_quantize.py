"""Weights as decoding wants them give the logits that they should."""

import copy

import pytest
import torch
from conftest import live_model

from gkachat.config import ATTENTIONS
from gkachat.inference.quantize import Int8Linear, for_inference

EVERY = pytest.mark.parametrize("attention", list(ATTENTIONS))
IDX = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(model):
    return model(IDX, cache=model.make_cache(2, 12, block=12).step(slice(0, 2), 12))


@EVERY
def test_bfloat16_weights_change_no_bit_of_bfloat16_logits(attention):
    expected, stored = live_model(attention, dtype=torch.bfloat16), for_inference(live_model(attention), torch.bfloat16)
    assert stored.blocks[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert stored.x0_mix.dtype == torch.float32
    assert torch.equal(logits(stored), logits(expected))


@EVERY
def test_int8_weights_are_the_nearest_of_255_steps_per_row(attention):
    plain = live_model(attention)
    rounded, quantized = copy.deepcopy(plain), for_inference(copy.deepcopy(plain), torch.float32, int8=True)
    found = {name: module for name, module in quantized.named_modules() if isinstance(module, Int8Linear)}
    for name, module in found.items():
        weight = rounded.get_submodule(name).weight
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        new = module.weight.float() / module.inverse_scale[:, None]
        assert ((new - weight).abs() <= 0.5001 * step).all()
        weight.data.copy_(new)
    groups = plain.parameter_groups()
    assert len(found) == len(groups["matrices"]) + len(groups.get("gates", [])) + 2  # head, smear
    torch.testing.assert_close(logits(quantized), logits(rounded), rtol=1e-5, atol=1e-5)
    exact = logits(plain)
    assert 0 < (logits(quantized) - exact).abs().max() < 0.1 * exact.std()
