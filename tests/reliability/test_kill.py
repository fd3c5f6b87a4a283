"""Ended from outside: killed, asked to stop, asked twice, started twice."""

import os
import re
import signal
import subprocess
import sys
import time

from conftest import ROOT, TINY, make_trainer, run_script
from soak import soak
from test_resume import differing_bytes, logged

from gkachat.checkpoint import checkpoint_steps

LONG = ["configs/laptop.toml", *TINY, "--train.total_tokens=2560000", "--train.eval_every=0", "--run.log_every=1"]


def test_a_run_that_is_killed_again_and_again_loses_nothing(tiny_home):
    result = soak(tiny_home, kills=2, steps=200, longest=1.0, seed=0)
    assert result["survived"] == 2 and result["checkpoints_passed_over"] == 0
    assert result["bytes_that_differ"] == 0
    assert result["records_twice_or_missing"] == 0 and not result["records_differ"]
    assert result["verify_run"] == "no problems"


def start(home, *options, module="scripts.base_train", until="norm", **env):
    command = [sys.executable, "-u", "-m", module, *LONG, *options]
    env = os.environ | {"GKACHAT_HOME": str(home), "OMP_NUM_THREADS": "1"} | env
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while until not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    return process


def test_a_run_that_is_asked_to_stop_saves_and_exits_with_0(tiny_home):
    process = start(tiny_home)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # a launcher passes on what the scheduler has sent already
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    step = int(re.search(r"interrupted at step (\d+); give --resume", out)[1])
    assert checkpoint_steps(tiny_home / "runs" / "d2_softmax") == [step]


SLOW = """
import time
from gkachat.train.trainer import Trainer
from scripts.base_train import main
take = Trainer.train_step
def step(self):
    take(self)
    if self.step == 3:
        print("slow", flush=True)
        for _ in range(600):
            time.sleep(0.1)
Trainer.train_step = step
main()
"""


def test_a_second_signal_during_a_long_step_ends_the_process_at_once(tiny_home, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    process = start(tiny_home, module="slow", until="slow", PYTHONPATH=f"{tmp_path}:{ROOT}")
    process.send_signal(signal.SIGTERM)
    while "once more" not in process.stdout.readline():
        pass
    time.sleep(1.5)  # any sooner, and it would pass for the same signal
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM


def test_two_processes_cannot_train_one_run(tiny_home):
    process = start(tiny_home)
    try:
        for flag in ("--resume", "--overwrite"):
            second = run_script("base_train", *LONG, flag, home=tiny_home)
            assert second.returncode == 1
            assert second.stderr.startswith(f"error: run 'd2_softmax' is in use by process {process.pid} on ")
    finally:
        process.kill()
        process.communicate()
    make_trainer(*LONG, "--resume")  # the dead hold no lock


def test_a_run_stopped_during_an_evaluation_repeats_it_on_resume(tiny_home, monkeypatch):
    def trainer(*options):
        return make_trainer("configs/laptop.toml", *TINY, *options)

    whole, stopped = trainer("--run.name=whole"), trainer("--run.name=stopped")
    whole.fit(whole.run)
    evaluate = stopped.task.evaluate

    def stop(*args):
        if stopped.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(stopped.task, "evaluate", stop)
    stopped.fit(stopped.run)
    assert stopped.interrupted and stopped.step == 4
    assert checkpoint_steps(stopped.run.directory) == [4]
    resumed = trainer("--run.name=stopped", "--resume")
    resumed.fit(resumed.run)
    assert not resumed.interrupted
    assert logged(whole.run.directory) == logged(stopped.run.directory)
    assert differing_bytes(whole.run.directory, stopped.run.directory) == 0
