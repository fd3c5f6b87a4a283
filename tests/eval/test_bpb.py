"""Bits per byte, against sums done by hand."""

import math

import numpy as np
import pytest
import torch
from conftest import live_model
from torch._dynamo.utils import counters

from gkachat.config import ATTENTIONS
from gkachat.data.shards import Documents
from gkachat.eval import bpb
from gkachat.eval.bpb import bpb_sums, evaluate_bpb, unigram_bpb


class FixedModel(torch.nn.Module):
    """Predicts the same distribution everywhere."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, idx):
        return self.logits.expand(*idx.shape, -1)


# Three tokens of 1, 2 and 4 bytes, and a special one without bytes.
TOKEN_BYTES = np.array([1, 2, 4, 0])
MODEL = FixedModel([0.5, 0.25, 0.125, 0.125])


def test_bits_per_byte_count_targets_that_have_bytes():
    targets = torch.tensor([[0, 1, 2, 2]])
    # 1 + 2 + 3 + 3 bits over 1 + 2 + 4 + 4 bytes
    assert evaluate_bpb(MODEL, [(targets, targets)], TOKEN_BYTES) == pytest.approx(9 / 11)
    targets = torch.tensor([[3, 0, -1, -1], [-1, -1, 2, 3]])  # special tokens and ignored ones do not count
    assert evaluate_bpb(MODEL, [(torch.zeros_like(targets), targets)], TOKEN_BYTES) == pytest.approx((1 + 3) / (1 + 4))
    special = torch.tensor([[3]])
    with pytest.raises(ValueError, match="no target stands for any bytes"):
        evaluate_bpb(MODEL, [(special, special)], TOKEN_BYTES)


@pytest.mark.parametrize("max_logits", [bpb.MAX_LOGITS["cpu"], 8])
def test_batches_weigh_by_their_bytes_however_they_are_split(max_logits, monkeypatch):
    monkeypatch.setattr(bpb, "MAX_LOGITS", {"cpu": max_logits})
    a, b = torch.tensor([[0, 1, 1], [0, 0, 0]]), torch.tensor([[2]])
    together = evaluate_bpb(MODEL, [(a, a), (b, b)], torch.as_tensor(TOKEN_BYTES))
    assert together == pytest.approx((4 * 1 + 2 * 2 + 3) / (4 * 1 + 2 * 2 + 4))


def test_a_uniform_model_over_single_bytes_needs_eight_bits():
    model, text = FixedModel([1 / 256] * 256), torch.randint(256, (3, 50))
    assert evaluate_bpb(model, [(text, text)], np.ones(256)) == pytest.approx(8.0, abs=1e-5)


def test_any_module_is_evaluated_in_eval_mode_and_stays_in_the_mode_it_came_in():
    class Dropping(torch.nn.Dropout):  # without parameters
        def forward(self, idx):
            return super().forward(torch.ones(*idx.shape, 4))

    model, idx = Dropping(0.5).train(), torch.zeros(2, 8, dtype=torch.long)
    assert evaluate_bpb(model, [(idx, idx)], TOKEN_BYTES) == pytest.approx(2.0)
    assert model.training


def as_split(tokens):
    tokens = np.array(tokens, dtype=np.uint16)
    return [Documents(np.array([0, len(tokens)]), lambda: tokens)]


def test_the_unigram_model_by_hand():
    train, val = as_split([0] * 5 + [1] * 2 + [2]), as_split([0, 0, 1, 2])
    # one added to each of four counts: 6, 3, 2, 1 of 12
    bits = -(2 * math.log2(6 / 12) + math.log2(3 / 12) + math.log2(2 / 12))
    assert unigram_bpb(train, val, TOKEN_BYTES) == pytest.approx(bits / (1 + 1 + 2 + 4))
    # counting stops at max_tokens
    assert unigram_bpb(as_split([0, 1, 1, 1]), as_split([0]), TOKEN_BYTES, max_tokens=1) == pytest.approx(
        -math.log2(2 / 5)
    )


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_compiled_model_takes_one_graph_for_all_numbers_of_rows(attention):
    """As on a GPU, where the last batch has fewer rows than the others."""
    model = live_model(attention, depth=1, sequence_len=32)
    idx = torch.arange(32 * 9).view(9, 32) % 64
    batches, token_bytes = [(part, part.roll(-1, 1)) for part in idx.split([4, 3, 2])], np.ones(64)
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    nats, n_bytes = bpb_sums(torch.compile(model, backend="eager", dynamic=False), batches, token_bytes)
    assert counters["stats"]["unique_graphs"] - before == 1
    expected = bpb_sums(model, batches, token_bytes)
    assert (nats, n_bytes) == (pytest.approx(expected[0], rel=1e-6), expected[1])  # float32 logits
