"""The log of a run on Weights & Biases, read back from the files that wandb writes offline."""

import json

import pytest
from conftest import TINY, make_trainer, wandb_runs

from gkachat.checkpoint import remove
from gkachat.train.metrics import Metrics, format_duration

NAMES = {"eval": {"val_bpb": "val/bpb", "train_bpb": "train/bpb"}, "train": {"loss": "train/loss"}}


@pytest.fixture(scope="module")
def run_dir(corpus_home, tmp_path_factory):
    """A run that was tracked, and resumed after its last checkpoint was lost."""
    home = tmp_path_factory.mktemp("tracked")
    for name in ("tokenizer", "tokens"):
        (home / name).symlink_to(corpus_home / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GKACHAT_HOME", str(home))
        patch.setenv("WANDB_MODE", "offline")
        for flags in ([], ["--resume"]):
            made = make_trainer("configs/laptop.toml", *TINY, "--run.wandb=tests", "--model.attention=gka", *flags)
            made.fit(made.run)
            if not flags:
                remove(made.run.directory / "checkpoints" / "step_000008")
    return home / "runs" / "d2_gka"


def test_metrics_have_nanochats_names_and_the_values_of_the_log(run_dir):
    first, _ = wandb_runs(run_dir)
    assert (first.project, first.name) == ("tests", "d2_gka")
    assert first.config["model"]["attention"] == "gka" and first.config["train"]["total_batch_size"] == 256
    sent = {}
    for items in first.history:
        sent.setdefault(items["_step"], {}).update(items)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {record["step"] for record in records} == sent.keys() == {0, 2, 4, 6, 8}
    for record in records:
        for name, sent_name in NAMES[record["kind"]].items():
            assert sent[record["step"]][sent_name] == record[name]
    assert all(sent[step]["train/tok_per_sec"] > 0 and sent[step]["train/lrm"] <= 1 for step in (2, 4, 6, 8))


def test_a_resumed_run_continues_the_same_wandb_run(run_dir):
    first, second = wandb_runs(run_dir)
    assert first.id == second.id == (run_dir / "wandb_id").read_text()
    assert {items["_step"] for items in second.history} == {6, 8}  # the checkpoint was of step 4


def test_a_run_that_starts_anew_is_another_wandb_run(tmp_path, monkeypatch):
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


def test_durations_are_hours_minutes_and_seconds():
    assert [format_duration(s) for s in (5, 184.4, 3720)] == ["5s", "3m04s", "1h02m"]
