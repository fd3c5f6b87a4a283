"""Two processes train as one does."""

import os
import subprocess
import sys

import torch
from conftest import ROOT, TINY, call

from gkachat.checkpoint import load_model
from gkachat.train.metrics import read_metrics


def test_two_processes_reach_the_weights_of_one(tiny_home):
    options = ["configs/laptop.toml", *TINY, "--model.attention=gka"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*launch, "-m", "scripts.base_train", *options, "--run.name=two"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| saved") == 1
    one = call("base_train", *options, "--run.name=one", home=tiny_home)
    assert one.returncode == 0, one.stderr
    runs = [tiny_home / "runs" / name for name in ("one", "two")]
    a, b = (load_model(run)[0].state_dict() for run in runs)
    for key in a:  # gradients are summed in another order
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-3)
    curves = [[r["val_bpb"] for r in read_metrics(run) if r["kind"] == "eval"] for run in runs]
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-3, atol=0)
