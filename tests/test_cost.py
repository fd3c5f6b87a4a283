"""The accounts, against the architecture's own arithmetic and the paper's figure."""

import dataclasses
import json

import pytest
import torch
from conftest import call

from gkachat.cost import PROTOCOLS, account, compare_accounts, horizon
from gkachat.gpt import GPT, GPTConfig

D20 = compare_accounts(GPTConfig(depth=20))


def test_at_depth_20_the_counted_ratio_is_the_published_one():
    assert round(D20["ratio"]["params"], 2) == 0.42
    assert D20["ratio"]["cache_bytes_per_token"] == 0.5


@pytest.mark.parametrize(("attention", "per_layer"), [("softmax", 12), ("gka", 9)])
def test_depth_20_matches_the_architectures_arithmetic(attention, per_layer):
    params = D20[attention]["params"]
    C, V = 1280, 32768
    assert params["matrices"] == per_layer * C * C * 20
    assert params["embedding"] == params["lm_head"] == V * C
    assert params.get("value_embeddings", 0) == (10 * V * C if attention == "softmax" else 0)
    assert params.get("log_sigma", 0) == (200 if attention == "gka" else 0)
    assert params["total"] == sum(n for group, n in params.items() if group != "total")
    seen = 15 * 512 + 5 * 2048
    assert D20[attention]["flops_per_token"] == 6 * (params["matrices"] + params["lm_head"]) + 12 * C * seen
    assert D20[attention]["cache_bytes_per_token"] == {"softmax": 2, "gka": 1}[attention] * 20 * C * 2


def test_total_flops_by_protocol():
    flops = D20["ratio"]["total_flops"]
    assert list(flops) == list(PROTOCOLS)
    assert flops["equal-tokens"] == pytest.approx(0.80, abs=0.005)
    assert flops["equal-ratio"] == pytest.approx(0.62, abs=0.005)
    assert flops["paper"] == pytest.approx(0.49)
    assert flops["equal-flops"] == pytest.approx(1.0)


@pytest.mark.parametrize("attention", ["softmax", "gka"])
def test_counts_are_those_of_a_real_model(attention):
    config = GPTConfig(depth=3, attention=attention, vocab_size=100, sequence_len=64, n_embd=32, head_dim=16)
    assert account(config).params["total"] == sum(p.numel() for p in GPT(config).parameters())


def test_counting_allocates_nothing():
    with torch.device("meta"):
        assert all(p.is_meta for p in GPT(GPTConfig(depth=2)).parameters())


def test_horizons_only_differ_for_gka():
    softmax = GPTConfig(depth=4)
    gka = dataclasses.replace(softmax, attention="gka")
    assert {horizon(protocol, softmax, 1000) for protocol in PROTOCOLS} == {1000}
    assert horizon("equal-tokens", gka, 1000) == 1000
    assert horizon("equal-ratio", gka, 1000) < 1000 < horizon("equal-flops", gka, 1000)
    with pytest.raises(ValueError, match="protocol: given 'fair'"):
        horizon("fair", gka, 1000)


def test_the_script_prints_the_same_as_json(tmp_path):
    result = call("cost", "--depth", 20, "--json", home=tmp_path)
    assert json.loads(result.stdout) == D20


def test_the_script_prints_a_table_and_names_bad_options(tmp_path):
    table = call("cost", "--depth", 20, home=tmp_path).stdout
    assert "896,533,720" in table and "378,798,320" in table and "0.4225" in table
    bad = call("cost", "--depth", 0, home=tmp_path)
    assert (bad.returncode, bad.stderr) == (1, "error: model.depth: given 0, expected 1 or more\n")
