"""What the speedrun does where there are GPUs, seen through an interpreter that only writes down what it is asked; and
the hours it tells beforehand."""

import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, TINY, call

from scripts import estimate


@pytest.fixture
def commands(tmp_path):
    """Modules and options that a speedrun on so many GPUs runs, in order; those that contain `broken` fail."""

    def run(gpus, *options, broken="none", code=0):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        (tmp_path / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
        for name in ("speedrun.sh", "scripts/setup.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path / name)
        shutil.copy(ROOT / "pyproject.toml", tmp_path / ".venv" / "installed")
        smi = "\n".join(["#!/bin/bash", *(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'" for i in range(gpus))])
        python = f'#!/bin/bash\necho "$*" >> {tmp_path}/log\nif [[ "$*" == *{broken}* ]]; then exit 3; fi\n'
        for path, text in (("nvidia-smi", smi), (".venv/bin/python", python)):
            (tmp_path / path).write_text(text)
            (tmp_path / path).chmod(0o755)
        (tmp_path / "log").unlink(missing_ok=True)
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "GKACHAT_HOME": str(tmp_path / "home")}
        result = subprocess.run(["bash", tmp_path / "speedrun.sh", *options], env=env, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        return [line.removeprefix("-m ") for line in (tmp_path / "log").read_text().splitlines()]

    return run


def trainings(lines):
    return [line for line in lines if "scripts.base_train" in line]


def protocol(line):
    """That counts: the last one."""
    return (re.findall(r"--train\.protocol[ =](\S+)", line) or [None])[-1]


ATTENTIONS = ("softmax", "gka", "gka_plus")


def test_on_gpus_runs_are_counted_estimated_trained_scored_and_compared_in_this_order(commands):
    lines = commands(2)
    torchrun = "torch.distributed.run --standalone --nproc_per_node=2 -m "
    assert [line.removeprefix(torchrun).split()[0].removeprefix("scripts.") for line in lines] == [
        "cost", "estimate", "tok_train", "data_prep", *["base_train"] * 3, *["base_eval"] * 6, "compare",
        *["chat_sft"] * 3, *["chat_eval"] * 3,
    ]  # fmt: skip
    configs = [f"configs/d20_{attention}.toml" for attention in ATTENTIONS]
    assert lines[1].split()[1:4] == configs and all((ROOT / config).exists() for config in configs)
    assert [line for line in lines if "--eval core" in line] == [
        f"{torchrun}scripts.base_eval d20_{attention} --eval core" for attention in ATTENTIONS
    ]
    for line, config, attention in zip(trainings(lines), configs, ATTENTIONS, strict=True):
        assert line.startswith(f"{torchrun}scripts.base_train {config} ")
        assert f"--model.attention {attention} --run.name d20_{attention} " in line
    assert "scripts.compare d20_softmax d20_gka d20_gka_plus" in lines


def test_without_gpus_nothing_is_estimated_or_scored_on_core(commands):
    lines = commands(0)
    assert not any("estimate" in line or "core" in line or "torch.distributed" in line for line in lines)
    assert len(trainings(lines)) == 3 and all("--resume" in line for line in trainings(lines))


@pytest.mark.parametrize(
    ("gpus", "options", "expected"),
    [
        (1, [], "paper"),
        (1, ["--protocol", "equal-flops"], "equal-flops"),
        (1, ["--protocol=equal-ratio", "--run.seed", "7"], "equal-ratio"),
        (1, ["--train.protocol=equal-tokens"], "equal-tokens"),
        (1, ["--chat.epochs", "2", "--protocol", "equal-tokens", "--overwrite"], "equal-tokens"),
        (0, [], None),  # the config's own, equal-tokens
        (0, ["--protocol", "paper"], "paper"),
    ],
)
def test_the_protocol_holds_for_all_trainings_and_the_estimate(commands, gpus, options, expected):
    lines = commands(gpus, *options)
    told = [*trainings(lines), *(line for line in lines if "scripts.estimate" in line)]
    assert len(told) == 3 + gpus and [protocol(line) for line in told] == [expected] * len(told)
    assert all(("--overwrite" in line) == ("--overwrite" in options) for line in trainings(lines))
    assert all(("--chat.epochs 2" in line) == ("--chat.epochs" in options) for line in lines if "chat_sft" in line)
    assert not any(re.search(r"--protocol|--overwrite", line) for line in lines if "estimate" in line)


def test_options_that_are_wrong_are_found_before_anything_is_made(commands):
    assert len(commands(1, "--protocol", "fair", broken="estimate*fair", code=3)) == 2


def test_hours_follow_from_steps_passes_and_devices(tmp_path):
    """16 rows a step, 4 a pass."""
    options = [*TINY, "--train.total_batch_size=512", "--train.baseline_tokens=51200"]
    result = call("estimate", "configs/laptop.toml", "configs/d20_gka.toml", *options, home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert not any(tmp_path.iterdir())
    *rows, total = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines()[2:5]]
    assert [row[0] for row in (*rows, total)] == ["d2_softmax", "d2_gka", "all"]
    for row in rows:
        steps, a_pass, optimizers = int(row[2]), *(float(cell.split()[0]) for cell in row[4:6])
        assert steps == 100 and a_pass > 0
        for n, hours in zip((1, 4, 8), row[-3:], strict=True):
            assert float(hours) == pytest.approx(steps * (4 / n * a_pass + optimizers) / 3600, rel=0.01)
    assert float(total[-1]) == pytest.approx(sum(float(row[-1]) for row in rows), rel=0.02)
    assert re.search(r"d2_gka over d2_softmax: 0\.\d{4} of the parameters, 0\.\d{4} of the FLOPs", result.stdout)


def test_under_the_papers_protocol_the_estimate_counts_its_share_of_flops(tmp_path):
    options = ["--train.protocol=paper", "--train.baseline_tokens=1024000", "--model.depth=2", "--model.n_embd=64"]
    options += ["--train.total_batch_size=1024", "--train.device_batch_size=1", "--tokenizer.vocab_size=512"]
    result = call("estimate", "configs/laptop.toml", "configs/d20_gka.toml", *options, "--model.sequence_len=64",
                  "--model.head_dim=32", home=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert float(re.search(r"parameters, ([\d.]+) of the FLOPs", result.stdout)[1]) == pytest.approx(0.49, rel=0.002)


def test_steps_too_short_to_tell_apart_give_no_negative_time(monkeypatch):
    """A clock by which steps of two passes take no longer than those of one."""
    from gkachat.config_file import load_config

    ticks = iter(range(10**6))
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: float(next(ticks)))
    from gkachat.train.trainer import Trainer

    monkeypatch.setattr(Trainer, "train_step", lambda self: None)
    told = estimate.estimate(load_config(ROOT / "configs/laptop.toml", TINY))
    assert (told["a_pass"], told["optimizers"]) == (0.5, 0.5)
