"""What a run tells Weights & Biases, read back from the files that it writes offline."""

import json
import shutil

import pytest
from conftest import TINY, call, wandb_runs

from gkachat.train.metrics import Metrics

NAMES = {"eval": {"val_bpb": "val/bpb", "train_bpb": "train/bpb"}, "train": {"loss": "train/loss"}}


@pytest.fixture(scope="module")
def trained(corpus_home, tmp_path_factory):
    """A run that was tracked; and the same, resumed after its last checkpoint was lost."""
    home = tmp_path_factory.mktemp("tracked")
    for name in ("tokenizer", "tokens"):
        (home / name).symlink_to(corpus_home / name)
    options = ["configs/laptop.toml", *TINY, "--run.wandb=tests", "--model.attention=gka"]
    for more in ([], ["--resume"]):
        result = call("base_train", *options, *more, home=home, WANDB_MODE="offline")
        assert result.returncode == 0, result.stderr
        if not more:
            shutil.rmtree(home / "runs" / "d2_gka" / "checkpoints" / "step_000008")
    return home


def test_metrics_have_nanochats_names_and_the_values_of_the_log(trained):
    run_dir = trained / "runs" / "d2_gka"
    first, _ = wandb_runs(run_dir)
    assert (first.project, first.name) == ("tests", "d2_gka")
    assert first.config["model"]["attention"] == "gka" and first.config["train"]["total_batch_size"] == 256
    told = {}
    for items in first.history:
        told.setdefault(items["_step"], {}).update(items)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == told.keys() == {0, 2, 4, 6, 8}
    for line in lines:
        names = {"eval": {"val_bpb": "val/bpb", "train_bpb": "train/bpb"}, "train": {"loss": "train/loss"}}[
            line["kind"]
        ]
        assert {name: told[line["step"]][name] for name in names.values()} == {n: line[k] for k, n in names.items()}
    assert all(told[step]["train/tok_per_sec"] > 0 and told[step]["train/lrm"] <= 1 for step in (2, 4, 6, 8))


def test_a_resumed_run_goes_on_with_the_same_wandb_run(trained):
    first, second = wandb_runs(trained / "runs" / "d2_gka")
    assert first.id == second.id == (trained / "runs" / "d2_gka" / "wandb_id").read_text()
    assert {items["_step"] for items in second.history} == {6, 8}  # the checkpoint was of step 4


def test_a_run_that_is_begun_anew_is_another_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in "ab":
        (tmp_path / name).mkdir()
        metrics = Metrics(tmp_path / name, wandb_project="tests")
        metrics.write("train", 1, loss=2.0, mfu=0.25, sigma=[[1.0]])
        metrics.close()
    (a,), (b,) = wandb_runs(tmp_path / "a"), wandb_runs(tmp_path / "b")
    assert a.id != b.id
    assert a.history[0]["train/mfu"] == 25.0  # in percent there
    assert json.loads((tmp_path / "a" / "metrics.jsonl").read_text())["mfu"] == 0.25
