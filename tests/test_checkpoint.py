"""Checkpoints that do not match their hashes, and runs that are not there."""

import json

import pytest
import torch
from conftest import TINY

from gkachat.checkpoint import checkpoint_steps, find_run, load_model
from gkachat.config_file import load_config
from gkachat.train.trainer import Trainer


@pytest.fixture
def run_dir(tiny_home):
    options = [*TINY, "--run.checkpoint_every=4", "--model.attention=gka"]
    trainer = Trainer(load_config("configs/laptop.toml", options), report=lambda line: None)
    trainer.run()
    return trainer.run_dir


def test_a_run_is_found_by_name_and_by_path(run_dir):
    assert find_run("d2_gka") == find_run(run_dir) == run_dir
    with pytest.raises(FileNotFoundError, match=r"no run 'd3_gka'.*there are: d2_gka"):
        find_run("d3_gka")


def test_a_run_trained_on_a_kernel_that_cannot_run_here_loads(run_dir, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    path = run_dir / "checkpoints" / "step_000008" / "meta.json"
    meta = json.loads(path.read_text())
    meta["config"]["model"]["gka"]["backend"] = "triton"
    path.write_text(json.dumps(meta))
    model, _, _ = load_model(run_dir)
    assert torch.isfinite(model(torch.zeros(1, 5, dtype=torch.long))).all()


def test_a_flipped_bit_in_the_weights_is_noticed(run_dir):
    path = run_dir / "checkpoints" / "step_000008" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"does not match the hash.*delete .* to use an earlier one"):
        load_model(run_dir)
    assert load_model(run_dir, step=4)[2]["step"] == 4


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_weights_that_are_not_whole_are_noticed(run_dir, damage):
    path = run_dir / "checkpoints" / "step_000008" / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="does not match the hash"):
        load_model(run_dir)


def test_a_damaged_meta_file_is_named(run_dir):
    (run_dir / "checkpoints" / "step_000008" / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta\.json cannot be read"):
        load_model(run_dir)


def test_another_tokenizer_in_the_run_is_noticed(run_dir):
    with open(run_dir / "tokenizer.json", "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="not the tokenizer this checkpoint was trained with"):
        load_model(run_dir)


def test_leftovers_of_a_crash_are_not_taken_for_checkpoints(run_dir):
    (run_dir / "checkpoints" / ".step_000099.1.tmp").mkdir()
    assert checkpoint_steps(run_dir) == [4, 8]


def test_a_run_without_checkpoints_says_so(run_dir):
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5; it has: 4, 8"):
        load_model(run_dir, step=5)


def test_loading_does_not_disturb_the_random_state(run_dir):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_model(run_dir)
    assert torch.rand(1) == expected
