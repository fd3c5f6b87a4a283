"""What goes wrong in one process of several ends all, with a message."""

import os
import threading
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, launch, make_trainer

from gkachat.checks import ConfigError
from gkachat.config_file import load_config
from gkachat.train import distributed
from gkachat.train.distributed import COMPILE_SECONDS, Watchdog, World, init_process_group
from gkachat.train.schedule import resolve

OPTIONS = ["configs/laptop.toml", *TINY, "--train.eval_every=0"]


def test_a_world_of_any_size_shares_a_batch_that_has_a_row_for_each():
    config = load_config(OPTIONS[0], OPTIONS[1:])
    assert resolve(config, world_size=7).train.total_batch_size == resolve(config).train.total_batch_size == 256
    message = "8 rows, fewer than the 9 processes: start 8 of them at most, or set it to 288 or more"
    with pytest.raises(ConfigError, match=message):
        resolve(config, world_size=9)


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


def test_a_step_that_compiles_has_a_longer_limit_and_collectives_wait_longer_still(monkeypatch, capfd):
    clock, ended = [0.0], threading.Event()
    monkeypatch.setattr(distributed, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(distributed.os, "_exit", lambda code: ended.set())
    watchdog = Watchdog(0.04, World())
    with watchdog.watching():
        watchdog.heartbeat("step 0", compiles=True)
        clock[0] += COMPILE_SECONDS - 1
        assert not ended.wait(0.2)
        clock[0] += 2
        assert ended.wait(60)
    assert "no progress for 1801 s in step 0" in capfd.readouterr().err

    limits = []
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda kind, timeout: limits.append(timeout))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for timeout in (600.0, 7200.0):
        init_process_group("cuda", timeout)
        assert limits.pop().total_seconds() > max(timeout, COMPILE_SECONDS)


def test_the_first_step_and_the_first_evaluation_of_a_process_may_compile(tiny_home, monkeypatch):
    trainer = make_trainer(OPTIONS[0], *TINY, "--train.eval_every=4")
    assert trainer.to_compile == set()  # nothing is compiled on this device
    trainer.to_compile = {"step", "evaluation"}
    told = {}
    monkeypatch.setattr(trainer.watchdog, "heartbeat", lambda doing, compiles=False: told.setdefault(doing, compiles))
    trainer.fit(trainer.run)
    assert {doing for doing, compiles in told.items() if compiles} == {"the evaluation at step 0", "step 0"}
    assert {"step 1", "the evaluation at step 4"} < told.keys()


@pytest.mark.skipif("RANK" in os.environ, reason="under torchrun")
def test_without_torchrun_the_world_is_one_process():
    assert init_process_group("cpu", 1.0) == World() == World(rank=0, size=1, local_rank=0)
