"""Readers meet hostile files: a clear error, or a result. fuzz.py itself runs longer."""

import json
import shutil

import pytest
import torch
from conftest import TINY, make_trainer
from fuzz import fuzz, rehash, targets

from gkachat.checkpoint import checkpoint_steps, load_model, step_dir

TRIES = 60


@pytest.fixture(scope="module")
def home(corpus_home, tmp_path_factory):
    home = tmp_path_factory.mktemp("fuzz")
    for name in ("tokenizer", "tokens"):
        shutil.copytree(corpus_home / name, home / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GKACHAT_HOME", str(home))
        made = make_trainer("configs/laptop.toml", *TINY, "--model.attention=gka")
        made.fit(made.run)
    return home


def test_every_reader_refuses_or_reads(home):
    found = fuzz(home, TRIES, seed=0)
    assert all(outcomes.get("refused", 0) > TRIES / 4 for name, outcomes in found.items() if name != "metrics.jsonl")
    assert found["model, hash wrong"].get("read", 0) <= 3  # a few mutations change nothing
    for target in targets(home).values():
        target.read()  # every file is restored


@pytest.fixture
def checkpoint(home, tmp_path):
    shutil.copytree(home / "runs", tmp_path / "runs")
    run_dir = tmp_path / "runs" / "d2_gka"
    return step_dir(run_dir, checkpoint_steps(run_dir)[-1])


def spoil(checkpoint, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")
    rehash(checkpoint / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["x0_mix"].fill_(torch.nan), "x0_mix has numbers that are not finite, expected finite float32"),
        (lambda t: t.update(x0_mix=t["x0_mix"].double()), "x0_mix is torch.float64, expected finite float32"),
        (lambda t: t.update(x0_mix=torch.ones(3)), "not of the shape in its meta.json"),
        (lambda t: t.pop("x0_mix"), "not of the shape in its meta.json"),
        (lambda t: t.update(another=torch.ones(3)), "not of the shape in its meta.json"),
    ],
)
def test_weights_that_fit_no_model_are_refused(checkpoint, change, message):
    spoil(checkpoint, change)
    with pytest.raises(ValueError, match=message):
        load_model(checkpoint.parents[1])


@pytest.mark.parametrize("changes", [{"depth": 10**9}, {"n_embd": 2**40, "head_dim": 2}, {"sequence_len": 2**40}])
def test_a_shape_that_no_machine_holds_is_refused_at_once(checkpoint, changes):
    meta = json.loads((checkpoint / "meta.json").read_text())
    meta["config"]["model"] |= changes
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"depth|shape|layers|sequence_len|n_embd"):
        load_model(checkpoint.parents[1])


def test_a_link_out_of_the_run_directory_is_not_followed_into_weights(checkpoint, tmp_path):
    (tmp_path / "secret").write_text("not weights")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").symlink_to(tmp_path / "secret")
    rehash(checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(checkpoint.parents[1])
