"""Ended from outside: killed, asked to stop, asked twice, started twice."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, call
from soak import soak
from test_resume import differing_bytes, told

from gkachat.checkpoint import checkpoint_steps
from gkachat.config_file import load_config
from gkachat.train.trainer import Trainer

LONG = ["configs/laptop.toml", *TINY, "--train.total_tokens=2560000", "--train.eval_every=0", "--run.log_every=1"]


def test_a_run_that_is_killed_again_and_again_loses_nothing(tiny_home):
    result = soak(tiny_home, kills=2, steps=200, longest=1.0, seed=0)
    assert result["survived"] == 2 and result["checkpoints_passed_over"] == 0
    assert result["bytes_that_differ"] == 0
    assert result["records_twice_or_missing"] == 0 and not result["records_differ"]
    assert result["verify_run"] == "no problems"


def start(home, *options):
    command = [sys.executable, "-u", "-m", "scripts.base_train", *LONG, *options]
    env = os.environ | {"GKACHAT_HOME": str(home), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "norm" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_saves_and_exits_well(tiny_home, number):
    process = start(tiny_home)
    begin = time.monotonic()
    process.send_signal(number)
    process.send_signal(number)  # a launcher passes on what the scheduler has sent already
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert time.monotonic() - begin < 10
    step = int(re.search(r"interrupted at step (\d+); give --resume", out)[1])
    assert checkpoint_steps(tiny_home / "runs" / "d2_softmax") == [step]


SLOW = """
import signal, sys, time
from gkachat.train import trainer
from scripts.base_train import main
take = trainer.Trainer._train_step
def step(self):
    take(self)
    if self.step == 3:
        print("slow", flush=True)
        for _ in range(600):
            time.sleep(0.1)
trainer.Trainer._train_step = step
main()
"""


def test_a_second_signal_in_a_step_that_takes_long_exits_at_once(tiny_home, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    env = os.environ | {"GKACHAT_HOME": str(tiny_home), "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", "-m", "slow", *LONG]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    while "slow" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM


def test_two_runs_of_one_name_do_not_meet(tiny_home):
    process = start(tiny_home)
    try:
        for flag in ("--resume", "--overwrite"):
            second = call("base_train", *LONG, flag, home=tiny_home)
            assert second.returncode == 1
            assert re.search(rf"run 'd2_softmax' is in use by process {process.pid} on \S+; wait", second.stderr)
    finally:
        process.kill()
        process.communicate()
    again = Trainer(load_config(LONG[0], LONG[1:]), resume=True, report=lambda line: None)  # the dead hold no lock
    again.lock.close()


def test_a_run_interrupted_in_an_evaluation_stops_there_and_makes_up_for_it(tiny_home, monkeypatch):
    options = ["configs/laptop.toml", *TINY]

    def trainer(name, **flags):
        return Trainer(load_config(options[0], [*options[1:], f"--run.name={name}"]), report=lambda line: None, **flags)

    trainer("whole").run()
    stopped = trainer("stopped")
    evaluate = stopped._evaluate

    def and_stop():
        if stopped.step == 4:
            signal.raise_signal(signal.SIGTERM)
        evaluate()

    monkeypatch.setattr(stopped, "_evaluate", and_stop)
    assert not stopped.run() and stopped.step == 4
    assert checkpoint_steps(stopped.run_dir) == [4]
    assert trainer("stopped", resume=True).run()
    assert told(tiny_home / "runs" / "whole") == told(stopped.run_dir)
    assert differing_bytes(tiny_home / "runs" / "whole", stopped.run_dir) == 0
