"""scripts/gpu_check.py without a GPU: every step at tiny sizes where only torch is installed, and steps that fail."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from conftest import ROOT, run_script

from scripts import gpu_check
from scripts.gpu_steps import SMALL, Check
from scripts.gpu_steps.decoding import differs
from scripts.gpu_steps.numbers import Comparisons
from scripts.gpu_steps.page import marks, page

# Runs the check's command line in a process where these packages cannot be imported.
BARE = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
ABSENT = {"tyro", "wandb", "datasets", "rich", "tomli_w", "scipy", "lm_eval", "pyarrow", "yaml", "torchao"}
sys.meta_path.insert(0, Absent())
sys.argv[0] = "gpu_check"
runpy.run_module("scripts.gpu_check", run_name="__main__", alter_sys=True)
"""


def bare(*words):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BARE, "--small", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_every_step_ends_well_where_only_torch_is_installed(tmp_path):
    carried, out = tmp_path / "carried", tmp_path / "out"
    prepared = bare("--prepare", "--carried", carried)
    assert prepared.returncode == 0, prepared.stderr
    result = bare("--carried", carried, "--out", out, "--device", "cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((out / "summary.json").read_text())
    planned = {name for stage in gpu_check.PLAN for name in (*stage.steps, *stage.background)}
    assert summary.keys() == planned and {record["status"] for record in summary.values()} == {"done"}
    assert all(summary[name]["comparisons"] for name in planned if name.startswith(("operator", "layers", "tok", "tr")))
    text = (out / "page.md").read_text()
    assert "not measured" not in text and "torch " + torch.__version__ in text
    assert not list(out.glob("run_*"))
    again = bare("--step", "tokens-gka", "--carried", carried, "--out", out, "--device", "cpu")
    assert again.returncode == 0, again.stderr


# The driver


def raises(check, argument, save):
    save(found=1)
    raise RuntimeError("injected")


def hangs(check, argument, save):
    save(found=2)
    subprocess.Popen(["sleep", "600"])
    time.sleep(600)


def dies(check, argument, save):
    os.kill(os.getpid(), signal.SIGKILL)


def works(check, argument, save):
    save(found=argument)


def run_plan(out, plan, seconds=60.0):
    out.mkdir(exist_ok=True)
    functions = {"raises": raises, "hangs": hangs, "dies": dies, "works": works}
    return gpu_check.run_plan(plan, functions, Check("cpu", SMALL, out, out), seconds)


def test_steps_that_raise_hang_or_die_stop_nothing(tmp_path):
    stages = [(("raises", "dies"), 30), (("hangs",), 0.2), (("works-a",), 30)]
    plan = tuple(gpu_check.Stage(*stage) for stage in stages)
    records = run_plan(tmp_path, plan)
    assert {name: record["status"] for name, record in records.items()} == {
        "raises": "failed", "dies": "died with exit code -9", "hangs": "ended after 0 s", "works-a": "done",
    }  # fmt: skip
    assert records["raises"]["error"] == "RuntimeError: injected" and records["raises"]["found"] == 1
    assert records["hangs"]["found"] == 2 and records["works-a"]["found"] == "a"
    assert json.loads((tmp_path / "summary.json").read_text()) == records
    with tarfile.open(tmp_path / "report.tar") as archive:
        written = {f"{name}.{suffix}" for name in records for suffix in ("json", "log")}
        assert {*archive.getnames()} == {"page.md", "summary.json"} | written
        assert json.load(archive.extractfile("summary.json")) == records
    assert "RuntimeError: injected" in (tmp_path / "page.md").read_text()


def test_the_time_of_all_steps_is_bounded_and_the_report_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 0.5)
    start = time.monotonic()
    plan = gpu_check.Stage(("hangs",), 600, background=("hangs-too",)), gpu_check.Stage(("works",), 600, waits=True)
    records = run_plan(tmp_path, plan, seconds=1.9)
    assert time.monotonic() - start < 20
    assert records["hangs"]["status"] == records["hangs-too"]["status"] == "ended after 2 s"
    assert records["works"]["status"] == "not started: no time left"
    assert "no time left" in (tmp_path / "page.md").read_text()


def test_a_stage_that_waits_starts_after_the_background_and_others_do_not(tmp_path):
    def record(seconds):
        def step(check, argument, save):
            save(start=time.monotonic())
            time.sleep(seconds)
            save(end=time.monotonic())

        return step

    Stage = gpu_check.Stage
    plan = Stage(("quick-1",), 9, background=("slow",)), Stage(("quick-2",), 9), Stage(("quick-3",), 9, waits=True)
    functions = {"quick": record(0), "slow": record(1.5)}
    found = gpu_check.run_plan(plan, functions, Check("cpu", SMALL, tmp_path, tmp_path), 60)
    assert found["quick-2"]["start"] < found["slow"]["end"] <= found["quick-3"]["start"]


def test_without_a_carried_folder_one_line_says_what_to_do(tmp_path):
    result = bare("--carried", tmp_path / "none", "--out", tmp_path)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "--prepare" in result.stderr


def test_what_cannot_work_is_one_line_before_any_step(tmp_path, monkeypatch):
    carried, out = tmp_path / "carried", tmp_path / "out"
    carried.mkdir()
    (carried / "commit.txt").touch()
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    words = ["--small", "--carried", carried, "--out", out]
    result = run_script("gpu_check", *words, "--step", "speed", home=tmp_path)
    assert result.returncode == 1 and re.search(
        r"^error: --step: given speed, expected one of .*warm-gka.*memory.*\n$", result.stderr
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    result = run_script("gpu_check", *words, home=tmp_path)
    assert result.returncode == 1 and "a C compiler" in result.stderr and not out.exists()


def test_nothing_runs_beside_what_is_timed_or_fills_the_memory():
    """Only steps that end before the next stage, and no warmers, may be beside numbers that depend on the GPU."""
    for stage in gpu_check.PLAN:
        kinds = {name.partition("-")[0] for name in stage.steps}
        if kinds & {"kernels", "steps", "memory", "decode"}:
            assert stage.waits and not stage.background and len(stage.steps) == 1, stage


# What is compared and reported


def test_a_wrong_tensor_nan_and_an_exception_are_wrong():
    saved = []
    comparisons = Comparisons(lambda **found: saved.append(found))
    exact = torch.ones(4, dtype=torch.float64)
    comparisons.tensor("right", exact.float(), exact, 1e-6)
    comparisons.tensor("wrong", 1.3 * exact, exact, 0.25)
    comparisons.tensor("nan", exact * torch.nan, exact, 0.25)
    comparisons.attempt("raised", lambda: torch.zeros(2) @ torch.zeros(3))
    assert [c["right"] for c in saved[-1]["comparisons"]] == [True, False, False, False]
    text = page({"operator-x": {"status": "done", **saved[-1]}}, "command", 1.0)
    assert "1 of 4 are within" in text and "RuntimeError" in text and "| wrong | 0.3 | 0.25 |" in text


@pytest.mark.parametrize(
    ("got", "same"), [([1, 2, 3], False), ([1, 2, 9], False), ([1, 9, 9], False), ([9, 2, 3], True)]
)
def test_texts_may_differ_only_from_an_uncertain_token_on(got, same):
    assert differs(got, [1, 2, 3], [1.0, 1e-5, 1.0]) == same


def test_marks_are_met_or_not_or_not_measured():
    def sublayer(name, window, ms):
        return {"level": "sublayer", "name": name, "window": window, "both_ms": ms}

    kernels = [
        sublayer("softmax (flex)", 512, 2.0), sublayer("softmax (sdpa)", None, 6.0),
        sublayer("gka (triton)", 512, 1.0), sublayer("gka (triton)", None, 3.0),
    ]  # fmt: skip
    steps = [{"name": "softmax", "speed_over_softmax": 1, "mfu": 0.4}, {"name": "gka", "speed_over_softmax": 1.2}]
    found = marks({"kernels": {"rows": kernels}, "steps": {"rows": steps}})
    assert [(m["figure"], m["result"]) for m in found] == [
        ("2.000", "met"), ("1.200", "met"), ("0.400", "not met"), ("", "not measured"),
    ]  # fmt: skip
