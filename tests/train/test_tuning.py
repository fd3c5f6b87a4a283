"""Fine-tuning on conversations: the trainer goes on from another run's weights."""

import dataclasses
import shutil

import pytest
import torch
from conftest import TINY, make_trainer

from gkachat.checkpoint import checkpoint_steps, load_model, step_dir
from gkachat.config import TuningConfig
from gkachat.config_file import load_config
from gkachat.train import schedule
from gkachat.train.metrics import read_metrics
from scripts.chat_sft import tuning_batch, tuning_defaults

SFT = ["base", "--chat.conversations=200", "--train.total_tokens=3072", "--train.eval_every=4"]


@pytest.fixture
def base(tiny_home):
    made = make_trainer("configs/laptop.toml", *TINY, "--model.attention=gka", "--run.name=base")
    made.fit(made.run)
    return made.run.directory


@pytest.mark.parametrize(("tokens", "batch"), [(2_048_000, 4096), (2_047_999, 2048), (1_023_999, 1024), (10, 1024)])
def test_short_tunings_take_smaller_steps(tokens, batch):
    assert tuning_batch(4096, tokens) == batch


def test_tuning_keeps_the_options_and_lets_the_learning_rate_fall_to_zero(base):
    config = schedule.resolve(load_config(tuning_defaults(base), ["--train.total_tokens=4096"], TuningConfig))
    before = load_config(base / "config.toml")
    assert config.run.name == "base_chat" and config.chat.base == "base"
    assert config.optim == dataclasses.replace(before.optim, weight_decay=0.0)
    steps = schedule.n_steps(config)
    assert schedule.lr_multiplier(steps - 1, config) == pytest.approx(1 / steps)  # and 0 after the last step
    assert config.model == before.model


def test_tuning_starts_from_the_runs_weights_learns_and_resumes_to_the_bit(base):
    whole, parted = (make_trainer(*SFT, f"--run.name={name}", script="chat_sft") for name in ("whole", "parted"))
    rows = load_config(base / "config.toml").train.total_batch_size // whole.config.model.sequence_len
    assert whole.config.train.total_batch_size == -(-rows // 4) * whole.config.model.sequence_len
    for name, tensor in load_model(base)[0].state_dict().items():
        assert torch.equal(whole.model.state_dict()[name], tensor)
    for made in (whole, parted):
        made.fit(made.run)
    bpb = [record["val_bpb"] for record in read_metrics(whole.run.directory) if record["kind"] == "eval"]
    assert bpb[-1] < 0.95 * bpb[0]
    for step in checkpoint_steps(parted.run.directory)[1:]:  # as if it had been killed then
        shutil.rmtree(step_dir(parted.run.directory, step))
    again = make_trainer(*SFT, "--run.name=parted", "--resume", script="chat_sft")
    again.fit(again.run)
    a, b = (load_model(made.run.directory)[0].state_dict() for made in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    # So long a tuning would take the base's batch; one that goes on keeps its own.
    longer = make_trainer(*SFT, "--train.total_tokens=200000", "--run.name=parted", "--resume", script="chat_sft")
    assert longer.config.train.total_batch_size == whole.config.train.total_batch_size
