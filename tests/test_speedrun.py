"""Which commands the speedrun runs with and without GPUs, seen through a recording interpreter; the hours estimate."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, run_script

from gkachat.config import ATTENTIONS
from gkachat.config_file import load_config
from scripts import estimate


@pytest.fixture
def commands(tmp_path):
    """Return the modules and options that a speedrun with so many GPUs runs, in order. Those like `broken` fail."""

    def run(gpus, *options, broken="none", code=0):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        (tmp_path / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
        for name in ("speedrun.sh", "scripts/setup.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path / name)
        shutil.copy(ROOT / "pyproject.toml", tmp_path / ".venv" / "installed")
        smi = "\n".join(["#!/bin/bash", *(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'" for i in range(gpus))])
        python = f"""#!/bin/bash
            if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
            echo "$*" >> {tmp_path}/log
            if [[ "$*" == *{broken}* ]]; then exit 3; fi"""
        for path, text in (("nvidia-smi", smi), (".venv/bin/python", python)):
            (tmp_path / path).write_text(text)
            (tmp_path / path).chmod(0o755)
        (tmp_path / "log").unlink(missing_ok=True)
        path = f"{tmp_path}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "GKACHAT_HOME": str(tmp_path / "home")}
        result = subprocess.run(["bash", tmp_path / "speedrun.sh", *options], env=env, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        return [line.removeprefix("-m ") for line in (tmp_path / "log").read_text().splitlines()]

    return run


def trainings(lines):
    return [line for line in lines if "scripts.base_train" in line]


def test_on_gpus_runs_are_counted_estimated_trained_scored_and_compared_in_this_order(commands):
    lines, n = commands(2), len(ATTENTIONS)
    torchrun = "torch.distributed.run --standalone --nproc_per_node=2 -m "
    assert [line.removeprefix(torchrun).split()[0].removeprefix("scripts.") for line in lines] == [
        "cost", "estimate", "tok_train", "data_prep", *["base_train"] * n, *["base_eval"] * 2 * n, "compare",
        *["chat_sft", "chat_eval"] * n,
    ]  # fmt: skip
    assert lines[1].startswith("scripts.estimate configs/d20.toml --all ")
    for line, attention in zip(trainings(lines), ATTENTIONS, strict=True):
        assert line.startswith(f"{torchrun}scripts.base_train configs/d20.toml ")
        assert f"--model.attention {attention} --run.name d20_{attention} " in line
        assert f"{torchrun}scripts.base_eval d20_{attention} --eval core" in lines
        assert f"scripts.chat_eval d20_{attention}_chat --tasks addition counting" in lines
    assert f"scripts.compare {' '.join(f'd20_{attention}' for attention in ATTENTIONS)}" in lines


def test_without_gpus_nothing_is_estimated_or_scored_on_core(commands):
    lines = commands(0)
    assert not any("estimate" in line or "core" in line or "torch.distributed" in line for line in lines)
    assert len(trainings(lines)) == len(ATTENTIONS)
    assert all("--resume" in line for line in lines if "base_train" in line or "chat_sft" in line)
    assert all("configs/laptop.toml" in line for line in trainings(lines))


@pytest.mark.parametrize(
    ("gpus", "options", "protocol"),
    [
        (1, "", "paper"),
        (1, "--protocol equal-flops", "equal-flops"),
        (1, "--protocol=equal-ratio --run.seed 7", "equal-ratio"),
        (1, "--chat.epochs 2 --train.protocol equal-tokens --overwrite", "equal-tokens"),
        (0, "", None),  # that of the config
        (0, "--train.protocol paper", "paper"),
    ],
)
def test_options_reach_all_trainings_the_estimate_or_all_tunings(commands, gpus, options, protocol):
    lines = commands(gpus, *options.split())
    told = [*trainings(lines), *(line for line in lines if "scripts.estimate" in line)]
    assert len(told) == len(ATTENTIONS) + gpus
    for line in told:  # the last one counts
        assert ([None, *re.findall(r"--train\.protocol[ =](\S+)", line)])[-1] == protocol
    assert all(("--overwrite" in line) == ("--overwrite" in options) for line in trainings(lines))
    assert all(("--chat.epochs 2" in line) == ("--chat.epochs" in options) for line in lines if "chat_sft" in line)
    assert not any("--chat.epochs" in line or "--overwrite" in line for line in lines if "estimate" in line)


def test_wrong_options_are_found_before_anything_is_made(commands):
    assert len(commands(1, "--train.protocol", "fair", broken="estimate*fair", code=3)) == 2


def test_an_activated_environment_has_the_memory_settings_of_setup(tmp_path):
    """An interpreter that makes an empty environment and installs nothing."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").touch()
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\nif [ "$2" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi\n')
    fake.chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    show = "echo $MALLOC_TRIM_THRESHOLD_ $MALLOC_MMAP_MAX_"
    for _ in range(2):
        for script in ("scripts/setup.sh", ".venv/bin/activate"):
            words = ["bash", "-c", f"source {script} >/dev/null; {show}"]
            env = {"PATH": os.environ["PATH"], "PYTHON": str(fake)}
            result = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
            assert result.stdout == "2147483647 0\n", result.stderr
        (tmp_path / "pyproject.toml").write_text("changed")
    assert (tmp_path / ".venv" / "bin" / "activate").read_text().count("MALLOC_MMAP_MAX_") == 1


def test_hours_follow_from_steps_passes_and_devices(tmp_path):
    """A step has 16 rows, a pass 4."""
    options = [*TINY, "--train.total_batch_size=512", "--train.baseline_tokens=51200"]
    result = run_script("estimate", "configs/laptop.toml", "--all", *options, home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert not any(tmp_path.iterdir())
    *rows, total = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines()[2:6]]
    assert [row[0] for row in (*rows, total)] == ["d2_softmax", "d2_gka", "d2_gka_plus", "all"]
    for row in rows:
        steps, a_pass, optimizers = int(row[2]), *(float(cell.split()[0]) for cell in row[4:6])
        assert steps == 100 and a_pass > 0
        for n, hours in zip((1, 4, 8), row[-3:], strict=True):
            assert float(hours) == pytest.approx(steps * (4 / n * a_pass + optimizers) / 3600, rel=0.01)
    assert float(total[-1]) == pytest.approx(sum(float(row[-1]) for row in rows), rel=0.02)
    assert re.search(r"d2_gka to d2_softmax: 0\.\d{4} of the parameters, 0\.\d{4} of the FLOPs", result.stdout)


def test_steps_too_short_to_tell_apart_give_no_negative_time(monkeypatch):
    """A clock by which steps of two passes take no longer than those of one, under the paper's protocol."""
    from gkachat.train.trainer import Trainer

    ticks = iter(range(10**6))
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(Trainer, "train_step", lambda self: None)
    options = [*TINY, "--train.protocol=paper", "--train.baseline_tokens=1024000"]
    softmax, gka = (
        estimate.estimate(load_config(ROOT / "configs/laptop.toml", [*options, f"--model.attention={attention}"]))
        for attention in ("softmax", "gka")
    )
    assert (gka["pass_seconds"], gka["optimizer_seconds"]) == (0.5, 0.5)
    assert gka["flops"] / softmax["flops"] == pytest.approx(0.49, rel=0.002)
