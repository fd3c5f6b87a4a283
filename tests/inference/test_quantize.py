"""Weights as decoding wants them give the logits they should."""

import copy

import pytest
import torch

from gkachat.inference.quantize import Int8Linear, for_inference
from gkachat.model.gpt import GPT, GPTConfig

IDX = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


def model(attention):
    torch.manual_seed(0)
    made = GPT(GPTConfig(depth=2, attention=attention, vocab_size=64, sequence_len=16, n_embd=32, head_dim=16))
    for name, p in made.named_parameters():
        if name.endswith(("c_proj.weight", "lm_head.weight")):
            torch.nn.init.normal_(p, std=0.2)
    return made


@torch.inference_mode()
def logits(made):
    cache = made.make_cache(2, 12, block=12)
    return made.decode(IDX, cache, slice(0, 2), every=True)


@pytest.mark.parametrize("attention", ["softmax", "gka"])
def test_half_precision_weights_change_no_bit_of_half_precision_logits(attention):
    kept = model(attention)
    kept.prepare(torch.bfloat16)
    stored = for_inference(model(attention), torch.bfloat16)
    assert stored.blocks[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert stored.x0_mix.dtype == torch.float32
    assert torch.equal(logits(stored), logits(kept))


@pytest.mark.parametrize("attention", ["softmax", "gka"])
def test_int8_weights_are_the_nearest_of_255_steps_a_row(attention):
    plain = model(attention)
    rounded, quantized = copy.deepcopy(plain), for_inference(copy.deepcopy(plain), torch.float32, int8=True)
    n = 0
    for name, module in quantized.named_modules():
        if isinstance(module, Int8Linear):
            weight, n = rounded.get_submodule(name).weight, n + 1
            step = weight.abs().amax(dim=1, keepdim=True) / 127
            new = module.weight.float() / module.per_unit[:, None]
            assert ((new - weight).abs() <= 0.5001 * step).all()
            weight.data.copy_(new)
    assert n == {"softmax": 2 * 6 + 1 + 1, "gka": 2 * 3 + 1}[attention]  # and a value gate
    torch.testing.assert_close(logits(quantized), logits(rounded), rtol=1e-5, atol=1e-5)
    exact = logits(plain)
    assert 0 < (logits(quantized) - exact).abs().max() < 0.1 * exact.std()
