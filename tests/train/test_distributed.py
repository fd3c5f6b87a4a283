"""Any number of processes trains as one does; what goes wrong in one ends all, with a word."""

import os
import time

import pytest
import torch
from conftest import ROOT, TINY, launch

from gkachat.checkpoint import load_model, load_optimizer, load_weights, open_checkpoint
from gkachat.config import ConfigError
from gkachat.config_file import load_config
from gkachat.train import distributed
from gkachat.train.distributed import Watchdog, World
from gkachat.train.metrics import read_metrics
from gkachat.train.schedule import resolve

# 20 steps of 16 rows; embedding and head are large enough to be shared out by rows. Smaller batches than this make
# gradients of low rank, whose rounding errors both optimizers blow up.
OPTIONS = [
    "configs/laptop.toml",
    *TINY,
    "--model.n_embd=64",
    "--model.sequence_len=128",
    "--train.total_batch_size=2048",
    "--train.baseline_tokens=40960",
    "--train.eval_every=0",
    "--run.log_every=1",
    "--train.clip_norm=10",
]


def losses(home, name):
    return torch.tensor([r["loss"] for r in read_metrics(home / "runs" / name) if r["kind"] == "train"])


@pytest.mark.parametrize("attention", ["softmax", "gka"])
def test_one_two_and_four_processes_have_the_same_losses(tiny_home, attention):
    for n in (1, 2, 4):
        name = f"--run.name=n{n}"
        result = launch(n, *OPTIONS, f"--model.attention={attention}", name, home=tiny_home)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("| saved") == 1  # only one writes and speaks
        assert len(losses(tiny_home, f"n{n}")) == 20
    for n in (2, 4):
        torch.testing.assert_close(losses(tiny_home, f"n{n}"), losses(tiny_home, "n1"), rtol=0, atol=1e-5)
    whole, parts = (open_checkpoint(tiny_home / "runs" / name) for name in ("n1", "n4"))
    # What each process remembered of its share is whole again when it is loaded.
    for load in (lambda at, meta: load_weights(at), lambda at, meta: dict(load_optimizer(at, meta["world_size"]))):
        a, b = load(*whole), load(*parts)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-3, msg=key)


def test_a_run_goes_on_in_a_world_of_another_size(tiny_home):
    two = launch(2, *OPTIONS, "--run.name=two", "--run.checkpoint_every=8", home=tiny_home)
    assert two.returncode == 0, two.stderr
    for step in (16, 20):
        directory = tiny_home / "runs" / "two" / "checkpoints" / f"step_{step:06d}"
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
    expected = losses(tiny_home, "two")
    one = launch(1, *OPTIONS, "--run.name=two", "--resume", home=tiny_home)
    assert one.returncode == 0, one.stderr
    torch.testing.assert_close(losses(tiny_home, "two"), expected, rtol=0, atol=1e-5)
    assert load_model(tiny_home / "runs" / "two")[2]["step"] == 20


def test_a_world_that_cannot_share_the_batch_is_told_which_can():
    config = load_config(OPTIONS[0], OPTIONS[1:])
    told = r"16 rows, which 3 processes cannot share evenly: start as many as one of 1, 2, 4, 8, 16, or set it to 2304"
    with pytest.raises(ConfigError, match=told):
        resolve(config, world_size=3)
    suggested = load_config(OPTIONS[0], [*OPTIONS[1:], "--train.total_batch_size=2304"])
    assert resolve(suggested, world_size=3).train.total_batch_size == 2304


FAILING = """
import os, sys
from gkachat.train import trainer
from scripts.base_train import main
from scripts.cli import run
take = trainer.Trainer._train_step
def step(self):
    if self.step == 3 and self.world.rank == 1:
        {what}
    take(self)
trainer.Trainer._train_step = step
if __name__ == "__main__":
    run(main)
"""


def test_a_failing_process_ends_all_with_its_message(tiny_home, tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text(FAILING.format(what='raise OSError("the disk of rank 1 is gone")'))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    start = time.monotonic()
    result = launch(2, *OPTIONS, "--run.name=failing", home=tiny_home, script="failing")
    assert result.returncode != 0 and time.monotonic() - start < 120
    assert "error: the disk of rank 1 is gone" in result.stderr


def test_a_process_that_hangs_is_given_up_on_and_the_step_named(tiny_home, tmp_path, monkeypatch):
    (tmp_path / "hanging.py").write_text(FAILING.format(what="import time; time.sleep(600)"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    result = launch(2, *OPTIONS, "--run.name=hanging", "--run.timeout=5", home=tiny_home, script="hanging")
    assert result.returncode != 0
    assert "no progress for" in result.stderr and "in step 3; run.timeout" in result.stderr


def test_the_watchdog_is_silent_while_something_is_heard(capfd):
    dog = Watchdog(0.4, World())
    with dog.watching():
        for step in range(8):
            dog.heard(f"step {step}")
            time.sleep(0.1)
    assert capfd.readouterr().err == ""
    assert distributed.start("cpu", 1.0) == World() or "RANK" in os.environ
