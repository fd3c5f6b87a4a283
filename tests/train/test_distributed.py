"""Any number of processes trains as one does. What goes wrong in one ends all, with a message."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, launch, make_trainer

from gkachat.checkpoint import load_model, load_optimizer, load_weights, open_checkpoint, remove, step_dir
from gkachat.config import ConfigError
from gkachat.config_file import load_config
from gkachat.train import distributed
from gkachat.train.distributed import Watchdog, World, init_process_group
from gkachat.train.metrics import read_metrics
from gkachat.train.schedule import resolve

# 20 steps of 16 rows; embedding and head are large enough to be divided by rows. Smaller batches give gradients of low
# rank, whose rounding errors both optimizers amplify.
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


@pytest.mark.parametrize(("attention", "n"), [("softmax", 4), ("gka", 2)])
def test_several_processes_train_as_one_does(tiny_home, attention, n):
    one = make_trainer(*OPTIONS, f"--model.attention={attention}", "--run.name=one")
    one.fit(one.run)
    result = launch(n, *OPTIONS, f"--model.attention={attention}", "--run.name=many", home=tiny_home)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| saved") == 1  # only rank 0 writes and prints
    assert len(losses(tiny_home, "one")) == 20
    torch.testing.assert_close(losses(tiny_home, "many"), losses(tiny_home, "one"), rtol=0, atol=1e-5)
    whole, parts = (open_checkpoint(tiny_home / "runs" / name) for name in ("one", "many"))
    # The optimizer state that each rank kept of its share is whole again when it is loaded.
    for load in (lambda at, meta: load_weights(at), lambda at, meta: dict(load_optimizer(at, meta["world_size"]))):
        a, b = load(*whole), load(*parts)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-3, msg=key)


def test_a_run_resumes_in_a_world_of_another_size(tiny_home, capsys):
    two = launch(2, *OPTIONS, "--run.name=two", "--run.checkpoint_every=8", home=tiny_home)
    assert two.returncode == 0, two.stderr
    remove(step_dir(tiny_home / "runs" / "two", 20))
    expected = losses(tiny_home, "two")
    one = make_trainer(*OPTIONS, "--run.name=two", "--resume")
    one.fit(one.run)
    assert "resumes at step 16" in capsys.readouterr().out
    torch.testing.assert_close(losses(tiny_home, "two"), expected, rtol=0, atol=1e-5)
    assert load_model(one.run.directory)[2]["step"] == 20


def test_a_world_that_cannot_share_the_batch_is_told_which_can():
    config = load_config(OPTIONS[0], OPTIONS[1:])
    message = (
        r"16 rows, which 3 processes cannot share evenly: start one of 1, 2, 4, 8, 16 processes, or set it to 2304"
    )
    with pytest.raises(ConfigError, match=message):
        resolve(config, world_size=3)
    suggested = load_config(OPTIONS[0], [*OPTIONS[1:], "--train.total_batch_size=2304"])
    assert resolve(suggested, world_size=3).train.total_batch_size == 2304


FAILING = """
from gkachat.train.trainer import Trainer
from scripts.base_train import main
from scripts.cli import run
take = Trainer.train_step
def step(self):
    if self.step == 3 and self.world.rank == 1:
        {action}
    take(self)
Trainer.train_step = step
if __name__ == "__main__":
    run(main)
"""


@pytest.mark.parametrize(
    ("action", "messages"),
    [
        ('raise OSError("the disk of rank 1 is gone")', ["error: the disk of rank 1 is gone"]),
        ("import time; time.sleep(600)", ["no progress for", "in step 3; run.timeout"]),
    ],
    ids=["fails", "hangs"],
)
def test_a_process_that_fails_or_hangs_ends_all_with_a_message(tiny_home, tmp_path, monkeypatch, action, messages):
    (tmp_path / "failing.py").write_text(FAILING.format(action=action))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    result = launch(2, *OPTIONS, "--run.name=failing", "--run.timeout=5", home=tiny_home, script="failing")
    assert result.returncode != 0
    assert all(message in result.stderr for message in messages)


def test_the_watchdog_ends_the_process_only_without_heartbeats(monkeypatch, capfd):
    clock, codes, ended = [0.0], [], threading.Event()
    monkeypatch.setattr(distributed, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(distributed.os, "_exit", lambda code: (codes.append(code), ended.set()))
    watchdog = Watchdog(0.04, World())
    with watchdog.watching():
        for step in range(10):
            clock[0] += 0.03
            watchdog.heartbeat(f"step {step}")
        assert codes == []
        clock[0] += 60
        assert ended.wait(60)
    assert codes[0] == 1 and "no progress for 60 s in step 9; run.timeout" in capfd.readouterr().err


@pytest.mark.skipif("RANK" in os.environ, reason="under torchrun")
def test_without_torchrun_the_world_is_one_process():
    assert init_process_group("cpu", 1.0) == World() == World(rank=0, size=1, local_rank=0)
