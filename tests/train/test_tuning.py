"""Tuning on conversations: from another run's weights, by the same trainer."""

import dataclasses
import shutil
from functools import partial

import pytest
import torch
from conftest import TINY

from gkachat.checkpoint import checkpoint_steps, load_model, load_weights, open_checkpoint, step_dir
from gkachat.config import TuningConfig
from gkachat.config_file import load_config
from gkachat.data.conversations import load_conversations, tokenize_conversations
from gkachat.train import schedule
from gkachat.train.metrics import read_metrics
from gkachat.train.trainer import Start, Trainer

QUIET = {"report": lambda line: None}


@pytest.fixture
def base(tiny_home):
    trainer = Trainer(load_config("configs/laptop.toml", [*TINY, "--model.attention=gka", "--run.name=base"]), **QUIET)
    trainer.run()
    return trainer.run_dir


def tuner(base, name, **flags):
    options = [f"--run.name={name}", "--chat.conversations=200", "--train.total_tokens=3072", "--train.eval_every=4"]
    change = partial(schedule.tuning, base="base")
    config = load_config(base / "config.toml", options, TuningConfig, change)
    model, tokenizer, _ = load_model(base)
    found = load_conversations(config.chat, 1, schedule.facts_of(model.config))
    splits, _ = tokenize_conversations(found, tokenizer, config.model.sequence_len, 0.1)
    start = Start(tokenizer, load_weights(open_checkpoint(base)[0]), splits["train"], splits["val"])
    return Trainer(config, start=start, **QUIET, **flags)


def test_the_recipe_keeps_the_batch_and_lets_the_learning_rate_fall_to_nothing(base):
    config = load_config(
        base / "config.toml", ["--train.total_tokens=4096"], TuningConfig, partial(schedule.tuning, base="b")
    )
    resolved = schedule.resolve(config)
    before = load_config(base / "config.toml")
    assert resolved.run.name == "b_chat" and resolved.chat.base == "b"
    assert resolved.train.total_batch_size == before.train.total_batch_size
    assert resolved.optim == dataclasses.replace(before.optim, weight_decay=0.0)
    assert schedule.lr_multiplier(schedule.n_steps(resolved) - 1, resolved) == 0
    assert resolved.model == before.model


def test_tuning_begins_with_the_runs_weights_learns_and_goes_on_to_the_bit(base):
    whole = tuner(base, "whole")
    for name, tensor in load_model(base)[0].state_dict().items():
        assert torch.equal(whole.model.state_dict()[name], tensor)
    whole.run()
    bpb = [record["val_bpb"] for record in read_metrics(whole.run_dir) if record["kind"] == "eval"]
    assert bpb[-1] < 0.95 * bpb[0]
    parted = tuner(base, "parted")
    parted.run()
    for step in checkpoint_steps(parted.run_dir)[1:]:  # as if it had been killed then
        shutil.rmtree(step_dir(parted.run_dir, step))
    again = tuner(base, "parted", resume=True)
    assert 0 < again.step < again.n_steps
    again.run()
    a, b = (load_model(run.run_dir)[0].state_dict() for run in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
