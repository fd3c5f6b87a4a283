"""Counts against the architecture's own arithmetic, the paper's figures and real models."""

import dataclasses
import json
import re

import pytest
import torch
from conftest import ROOT, run_script

from gkachat.config import ATTENTIONS, GPTConfig
from gkachat.config_file import load_config
from gkachat.model import stats
from gkachat.model.gpt import GPT
from gkachat.model.stats import PROTOCOLS, activation_bytes, compare_stats, state_bytes, token_budget
from gkachat.train.optim import make_optimizers, named_state
from gkachat.train.schedule import resolve

D20 = compare_stats(GPTConfig(depth=20))
SMALL = {"depth": 2, "vocab_size": 64, "sequence_len": 32, "n_embd": 32, "head_dim": 16}


def test_at_depth_20_the_counted_ratio_is_the_published_one():
    assert round(D20["ratio"]["params"], 2) == 0.42
    assert D20["ratio"]["cache_bytes_per_token"] == 0.5
    assert D20["ratios"]["gka"] == D20["ratio"]


@pytest.mark.parametrize(("attention", "per_layer"), [("softmax", 12), ("gka", 9), ("gka_conv", 9)])
def test_depth_20_matches_the_arithmetic_of_the_architecture(attention, per_layer):
    params = D20[attention]["params"]
    C, V = 1280, 32768
    assert params["matrices"] == per_layer * C * C * 20
    assert params["embedding"] == params["lm_head"] == V * C
    assert params.get("value_embeddings", 0) == (10 * V * C if attention == "softmax" else 0)
    assert params.get("log_sigma", 0) == (0 if attention == "softmax" else 200)
    assert params["total"] == sum(n for group, n in params.items() if group != "total")
    multiplied = params["matrices"] + params["lm_head"] + params.get("convolutions", 0)
    seen = 15 * 513 + 5 * 2048
    assert D20[attention]["flops_per_token"] == 6 * multiplied + 12 * C * seen
    # gka_conv: a bias in float32 for the key of each head
    kept = {"softmax": 4 * C, "gka": 2 * C, "gka_conv": 2 * C + 10 * 4}[attention]
    assert D20[attention]["cache_bytes_per_token"] == 20 * kept


def test_total_flops_by_protocol():
    flops = D20["ratio"]["total_flops"]
    assert list(flops) == list(PROTOCOLS)
    assert flops["equal-tokens"] == pytest.approx(0.80, abs=0.005)
    assert flops["equal-ratio"] == pytest.approx(0.62, abs=0.005)
    assert flops["paper"] == pytest.approx(0.49)
    assert flops["equal-flops"] == pytest.approx(1.0)


def test_token_budgets_differ_for_gka_alone():
    softmax = GPTConfig(depth=4)
    gka = dataclasses.replace(softmax, attention="gka")
    assert {token_budget(protocol, softmax, 1000) for protocol in PROTOCOLS} == {1000}
    assert token_budget("equal-tokens", gka, 1000) == 1000
    assert token_budget("equal-ratio", gka, 1000) < 1000 < token_budget("equal-flops", gka, 1000)
    with pytest.raises(ValueError, match="protocol: given 'fair'"):
        token_budget("fair", gka, 1000)


def test_the_script_prints_the_counts_as_json_and_as_tables(tmp_path):
    printed = run_script("cost", "--depth", 20, "--json", home=tmp_path)
    assert json.loads(printed.stdout) == D20
    table = run_script("cost", "--depth", 20, home=tmp_path).stdout
    assert "896,533,746" in table and "378,798,346" in table and "0.4225" in table
    batches = dict(re.findall(r"^\| (paper|equal-tokens) \| (.*) \|$", table.split("tokens a step")[1], flags=re.M))
    softmax, gka, _ = batches["paper"].split(" | ")
    assert (softmax, gka) == ("1,048,576", "524,288") and set(batches["equal-tokens"].split(" | ")) == {softmax}
    bad = run_script("cost", "--depth", 0, home=tmp_path)
    assert (bad.returncode, bad.stderr) == (1, "error: model.depth: given 0, expected 1 to 1000\n")


def test_the_plan_in_the_docs_is_the_one_that_is_counted(tmp_path, monkeypatch):
    """Bytes per row take long, and are counted at depth 12 alone. A change of them shows there too."""
    count = stats.activation_bytes
    monkeypatch.setattr(stats, "activation_bytes", lambda shape, rows: count(shape, rows) if shape.depth == 12 else 0)
    printed = run_script("cost", "--config", "configs/d20.toml", "--plan", 12, 16, 20, 24, home=tmp_path).stdout
    page = (ROOT / "configs" / "README.md").read_text()
    assert printed.count("\n") == 11 and printed.count("| 0.00 |") == 6
    for line in printed.splitlines():
        assert re.search(f"^{re.escape(line)}$".replace(r"0\.00", r"\d\.\d\d"), page, flags=re.M), line


@pytest.mark.parametrize("attention", list(ATTENTIONS))
def test_the_bytes_of_a_training_state_are_those_of_its_tensors(attention):
    config = GPTConfig(attention=attention, **SMALL)
    model = GPT(config)
    optimizers = make_optimizers(model, resolve(load_config(None, ["--model.depth=2"])).optim)
    idx = torch.zeros(1, 32, dtype=torch.long)
    model(idx, idx).backward()
    n_bytes = 2 * sum(p.numel() * 4 for p in model.parameters())
    for optimizer in optimizers:
        optimizer.step()
    state = named_state(optimizers, model)
    n_bytes += sum(t.numel() * 4 for key, t in state.items() if t.ndim and "variance" not in key)
    assert state_bytes(config) == n_bytes


@pytest.mark.parametrize("attention", list(ATTENTIONS))
def test_counted_activations_are_those_a_real_forward_saves(attention):
    config = GPTConfig(attention=attention, **SMALL)
    model, saved = GPT(config, torch.bfloat16), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def save(t):
        saved[t.untyped_storage().data_ptr()] = t
        return t

    idx = torch.zeros(3, 32, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        loss = model(idx, idx)
    expected = sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in weights)
    assert loss.isfinite() and activation_bytes(config, 3) == expected
    one, two, three = (activation_bytes(config, rows) for rows in (1, 2, 3))
    assert two - one == three - two > 0
