"""Which commands the speedrun runs with and without GPUs, seen through a recording interpreter; the hours estimate."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, run_script

from gkachat import files, machine
from gkachat.config import ATTENTIONS
from gkachat.config_file import load_config
from scripts import estimate

# A torch that counts the GPUs which $GPUS and $CUDA_VISIBLE_DEVICES leave, without looking at any.
TORCH = """
import os
__version__ = "2.13.0"
class device: pass
class dtype: pass
class version: cuda = "13.0"
class cuda:
    def is_available(): return cuda.device_count() > 0
    def device_count():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(int(os.environ["GPUS"])))))
        return len([name for name in seen.split(",") if name not in ("", "-1")]) if os.environ["GPUS"] != "0" else 0
"""


@pytest.fixture
def start(tmp_path):
    """Start a speedrun with so many GPUs in a process group of its own. `hooks` are lines of the stand-in python.

    The command of a step is in $*, and is logged before. torch and nvidia-smi are stand-ins too.
    """

    def start(gpus, *options, hooks="", installed=True, **env):
        for name in ("scripts", ".venv/bin", "torch"):
            (tmp_path / name).mkdir(exist_ok=True, parents=True)
        for name in ("speedrun.sh", "scripts/setup.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path / name)
        if installed:
            shutil.copy(ROOT / "pyproject.toml", tmp_path / ".venv" / "installed")
        smi = "\n".join(["#!/bin/bash", *["echo '535.104.05, NVIDIA H100'"] * int(env.pop("smi", gpus))])
        python = f"""#!/bin/bash
            if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
            echo "$*" >> {tmp_path}/log
            {hooks}"""
        for path, text in (("nvidia-smi", smi), (".venv/bin/python", python), ("torch/__init__.py", TORCH)):
            (tmp_path / path).write_text(text)
            (tmp_path / path).chmod(0o755)
        (tmp_path / "log").write_text("")
        paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
        env = {**os.environ, **paths, "GKACHAT_HOME": str(tmp_path / "home"), "GPUS": str(gpus), **env}
        return subprocess.Popen(
            ["bash", tmp_path / "speedrun.sh", *options], env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip

    return start


@pytest.fixture
def commands(start, tmp_path):
    """Return the modules and options that a speedrun with so many GPUs runs, in order. Those like `broken` fail."""

    def run(gpus, *options, broken="none", code=0, message="", **env):
        process = start(gpus, *options, hooks=f'if [[ "$*" == *{broken}* ]]; then exit 3; fi', **env)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == code and message in error, error
        return [line.removeprefix("-m ") for line in (tmp_path / "log").read_text().splitlines()]

    return run


def trainings(lines):
    return [line for line in lines if "scripts.base_train" in line]


def test_on_gpus_runs_are_counted_estimated_trained_scored_and_compared_in_this_order(commands):
    lines, n = commands(2), len(ATTENTIONS)
    torchrun = "torch.distributed.run --standalone --nproc_per_node=2 -m "
    assert [line.removeprefix(torchrun).split()[0].removeprefix("scripts.") for line in lines] == [
        "preflight", "cost", "estimate", "tok_train", "data_prep", *["base_train"] * n, *["base_eval"] * 2 * n,
        "compare", *["chat_sft"] * n, *["chat_eval"] * n,
    ]  # fmt: skip
    assert lines[2].startswith("scripts.estimate configs/d20.toml --all ")
    for line, attention in zip(trainings(lines), ATTENTIONS, strict=True):
        assert line.startswith(f"{torchrun}scripts.base_train configs/d20.toml ")
        assert f"--model.attention {attention} --run.name d20_{attention} " in line
        assert {f"{torchrun}scripts.base_eval d20_{attention}{more}" for more in ("", " --eval core")} < {*lines}
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
    told = [*trainings(lines), *(line for line in lines if "scripts.estimate" in line or "preflight" in line)]
    assert len(told) == len(ATTENTIONS) + gpus + 1
    for line in told:  # the last one counts
        assert ([None, *re.findall(r"--train\.protocol[ =](\S+)", line)])[-1] == protocol
    assert all(("--overwrite" in line) == ("--overwrite" in options) for line in trainings(lines))
    tunings = [line for line in lines if "chat_sft" in line or "preflight" in line]
    assert all(("--chat.epochs 2" in line) == ("--chat.epochs" in options) for line in tunings)
    assert not any("--chat.epochs" in line or "--overwrite" in line for line in lines if "estimate" in line)


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_printed_and_nothing_is_set_up(option, tmp_path):
    shutil.copy(ROOT / "speedrun.sh", tmp_path)
    result = subprocess.run(["bash", tmp_path / "speedrun.sh", option], capture_output=True, text=True, check=True)
    assert "bash speedrun.sh --overwrite" in result.stdout and "set -e" not in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["speedrun.sh"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--fast", "unrecognized option --fast"),
        ("--model.dpeth 6", "unrecognized option --model.dpeth (did you mean --model.depth?)"),
        ("--data.max-chars 5 --model.gka.rop=true", "unrecognized option --model.gka.rop=true (did you mean"),
        ("--chat.epoch=2", "unrecognized option --chat.epoch=2 (did you mean --chat.epochs?)"),
        ("configs/d20.toml", "given 'configs/d20.toml', expected options"),
    ],
)
@pytest.mark.parametrize("installed", [False, True])
def test_unknown_options_are_one_line_before_anything_is_installed_or_run(start, tmp_path, option, message, installed):
    """A new machine has the standard library alone."""
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/bash\n[ "$1" = -c ] && exec {sys.executable} -S "$@"\necho "$*" >> {tmp_path}/log\n')
    bare.chmod(0o755)
    process = start(0, "--overwrite", *option.split(), installed=installed, PYTHON=str(bare))
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and error.startswith(f"error: {message}") and error.count("\n") == 1, error
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.parametrize("option", ["--run.name=x", "--run.name x", "--model.attention gka", "--chat.base=d4_gka"])
def test_what_the_speedrun_sets_itself_is_refused(option, tmp_path):
    shutil.copy(ROOT / "speedrun.sh", tmp_path)
    result = subprocess.run(["bash", tmp_path / "speedrun.sh", *option.split()], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"given {option.split()[0]}, which it sets itself" in result.stderr


@pytest.mark.parametrize("gpus", [0, 1])
def test_options_of_the_corpus_reach_every_step_that_needs_them(commands, gpus):
    given = "--data.files a.txt b.txt --data.source=files --tokenizer.vocab_size 600"
    lines = commands(gpus, "--run.seed", "7", *given.split(), "--chat.epochs", "2")
    for script in ("preflight", "tok_train", "data_prep", "base_train"):
        found = [line for line in lines if f"scripts.{script} " in line]
        assert found and all(given in line for line in found), script
    assert not any("--run.seed" in line for line in lines if "tok_train" in line or "data_prep" in line)
    assert not any("--data" in line for line in lines if "chat_sft" in line)


@pytest.mark.parametrize("option", ["--model.depth 6", "--model.depth=6"])
def test_runs_are_called_by_their_depth(commands, option):
    lines = commands(0, *option.split(), "--run.seed", "7")
    assert {f"scripts.base_eval d6_{attention}" for attention in ATTENTIONS} < {*lines}
    assert all(" --run.name d6_" in line and option in line for line in trainings(lines))


def test_minutes_by_step_are_printed_at_the_end(start):
    output = start(0, hooks='if [[ "$*" == *tok_train* ]]; then sleep 1.2; fi').communicate(timeout=60)[0]
    table = dict(reversed(line.strip().split("  ", 1)) for line in re.findall(r"^ +\d+:\d\d  .+$", output, flags=re.M))
    assert [*table][:3] == ["set up", "check options, GPUs and disk", "train the tokenizer"]
    assert [*table][-1] == "in all"
    assert {"train all", "evaluate all", "tune on conversations all", "ask sums and letter counts all"} < table.keys()
    assert table["train the tokenizer"].strip() in ("0:01", "0:02") and table["in all"].strip() >= "0:01"


@pytest.mark.parametrize("gpus", [0, 1])
def test_wrong_options_are_found_before_anything_is_made(commands, gpus):
    assert len(commands(gpus, "--train.protocol", "fair", broken="preflight*fair", code=3)) == 1


def test_a_step_that_fails_stops_the_speedrun_with_its_name(commands):
    message = "speedrun: train the tokenizer failed (exit code 3)\n"
    lines = commands(0, broken="tok_train", code=3, message=message)
    assert "tok_train" in lines[-1] and not any("data_prep" in line for line in lines)


@pytest.mark.parametrize(("visible", "number"), [("1", 1), ("0,2,3", 3), ("GPU-5c8d,GPU-77aa", 2), ("", 0), ("-1", 0)])
def test_cuda_visible_devices_decides_how_many_gpus_are_used(commands, visible, number):
    lines = trainings(commands(8, CUDA_VISIBLE_DEVICES=visible))
    assert all((f"--nproc_per_node={number} " in line) == (number > 0) for line in lines)
    assert all(("configs/d20.toml" in line) == (number > 0) for line in lines)


def test_gpus_that_torch_cannot_use_end_the_speedrun_in_one_line_before_anything(commands):
    message = (
        "error: torch 2.13.0 cannot use the 8 GPUs here (NVIDIA H100, driver 535.104.05): it was built for CUDA 13.0"
    )
    assert commands(0, smi="8", code=1, message=message) == []


DATA = 'if [[ "$*" == *data_prep* ]]; then echo "train_00000 5 tokens"; echo $$ > {pid}; {then}; fi'


def test_tokenization_that_fails_in_the_background_ends_the_speedrun(start, tmp_path):
    """It fails while the first training goes on, which here takes longer."""
    wait = f"until [ -e {tmp_path}/training ]; do sleep 0.05; done"
    fails = DATA.format(pid=tmp_path / "pid", then=f'{wait}; echo "error: no network" >&2; exit 4')
    process = start(2, hooks=f'{fails}; if [[ "$*" == *base_train* ]]; then touch {tmp_path}/training; sleep 1; fi')
    error = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 4
    assert {"error: no network", error[-1]} == {*error}
    assert error[-1].startswith("speedrun: tokenize the corpus failed (exit code 4); its output is in ")
    assert (tmp_path / "home" / "data_prep.log").read_text() == "train_00000 5 tokens\nerror: no network\n"
    assert len(trainings((tmp_path / "log").read_text().splitlines())) == 1


def test_what_the_log_of_an_earlier_tokenization_says_does_not_count(start, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "data_prep.log").write_text("train_00000 5 tokens\n")
    process = start(1, hooks='if [[ "$*" == *data_prep* ]]; then sleep 0.5; exit 4; fi')
    process.communicate(timeout=60)
    assert process.returncode == 4 and not trainings((tmp_path / "log").read_text().splitlines())


def test_training_does_not_wait_for_tokenization_but_evaluation_does(start, tmp_path):
    slow = DATA.format(pid=tmp_path / "pid", then=f"sleep 1; echo done >> {tmp_path}/log")
    process = start(2, hooks=slow)
    process.communicate(timeout=60)
    lines = (tmp_path / "log").read_text().splitlines()
    kinds = [re.search(r"done|base_\w+", line)[0] for line in lines if "done" in line or "scripts.base_" in line]
    assert process.returncode == 0
    assert kinds == ["base_train"] * len(ATTENTIONS) + ["done"] + ["base_eval"] * 2 * len(ATTENTIONS)


def test_ctrl_c_ends_the_tokenization_too(start, tmp_path):
    slow = DATA.format(pid=tmp_path / "pid", then="exec sleep 60")
    process = start(2, hooks=f'{slow}; if [[ "$*" == *base_train* ]]; then touch {tmp_path}/training; sleep 60; fi')
    while not (tmp_path / "training").exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    tokenization = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not os.path.exists(f"/proc/{tokenization}"):
            return
        time.sleep(0.05)
    pytest.fail("the tokenization goes on")


def test_ctrl_c_after_the_tokenization_has_its_exit_code(start, tmp_path):
    """It ends while the first training goes on."""
    ends = DATA.format(pid=tmp_path / "pid", then=f"until [ -e {tmp_path}/training ]; do sleep 0.05; done; exit 0")
    process = start(1, hooks=f'{ends}; if [[ "$*" == *base_train* ]]; then touch {tmp_path}/training; sleep 60; fi')
    while not (tmp_path / "training").exists() and process.poll() is None:
        time.sleep(0.05)
    while os.path.exists(f"/proc/{(tmp_path / 'pid').read_text().strip()}") and process.poll() is None:
        time.sleep(0.05)  # until the speedrun knows that it has ended
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130


AT_ONCE = """if [[ "$*" == *{script}* ]]; then
    echo "$OMP_NUM_THREADS" >> {path}/threads; touch {path}/here_$3; trap 'echo stopped >> {path}/stopped; exit 130' INT
    until [ -e {path}/go ]; do sleep 0.05; done
    echo "done"; echo "and stderr" >&2; [[ "$*" != *gka_conv* ]] || exit {code}
fi"""


def started_at_once(process, tmp_path):
    """Wait until one process for each attention is there."""
    while len([*tmp_path.glob("here_*")]) < len(ATTENTIONS) and process.poll() is None:
        time.sleep(0.05)


def test_without_gpus_runs_are_evaluated_at_the_same_time_and_a_failure_ends_none_of_the_others(start, tmp_path):
    process = start(0, hooks=AT_ONCE.format(script="base_eval", path=tmp_path, code=3), OMP_NUM_THREADS="7")
    started_at_once(process, tmp_path)
    (tmp_path / "go").touch()
    output, error = process.communicate(timeout=60)
    assert process.returncode == 3 and error == "speedrun: evaluate d4_gka_conv failed (exit code 3)\n"
    lines = output.splitlines()
    for attention in ATTENTIONS:
        assert {f"d4_{attention} | done", f"d4_{attention} | and stderr"} < {*lines}
    assert (tmp_path / "threads").read_text() == "2\n" * 3


def test_ctrl_c_reaches_runs_that_are_tuned_at_the_same_time(start, tmp_path):
    process = start(0, hooks=AT_ONCE.format(script="chat_sft", path=tmp_path, code=0))
    started_at_once(process, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert (tmp_path / "stopped").read_text() == "stopped\n" * len(ATTENTIONS)  # it has waited for them


def test_the_commands_at_the_end_can_be_pasted_whatever_the_home_is_called(start, tmp_path):
    home = f"{tmp_path}/100% my home"
    process = start(0, GKACHAT_HOME=home)
    lines = process.communicate(timeout=60)[0].splitlines()[-len(ATTENTIONS) - 1 :]
    assert process.returncode == 0
    for line, run in zip(lines, (*ATTENTIONS, "softmax"), strict=True):
        words = shlex.split(line)
        expected = [f"GKACHAT_HOME={home}", str(tmp_path / ".venv/bin/python"), "-m", "scripts.chat_cli"]
        assert words[:5] == [*expected, f"d4_{run}_chat"]


def preflight(home, *options):
    return run_script("preflight", "configs/laptop.toml", *TINY, "--chat.conversations=300", *options, home=home)


def test_the_plan_names_every_run_and_writes_nothing(tmp_path):
    result = preflight(tmp_path, "--train.protocol=paper", "--train.total_batch_size=320")
    assert result.returncode == 0, result.stderr
    assert not any(tmp_path.iterdir())
    assert re.search(r"disk: about \d.*GiB are free at ", result.stdout)
    for attention in ATTENTIONS:
        assert re.search(rf"\| d2_{attention} \| [\d,]+ \| 320 \| 10 \|", result.stdout)


@pytest.mark.parametrize(("option", "package"), [("--run.wandb=laptop", "wandb"), ("--run.fp8=true", "torchao")])
def test_a_package_that_a_run_would_miss_later_is_missed_first(tmp_path, monkeypatch, option, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = preflight(tmp_path, option)
    assert result.returncode == 1 and result.stderr.startswith(f"error: {package} is not installed: pip install -e ")


def test_too_little_disk_is_an_error_and_what_is_there_counts(tmp_path, monkeypatch):
    free = 4 * 2**30  # what is needed beside shards and checkpoints
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    result = preflight(tmp_path)
    assert result.returncode == 1 and re.search(r"^error: disk: about 4.* 4\.0 GiB are free at ", result.stderr)
    for directory, code in (("tokens/python-source-v512", 1), ("runs/d2_gka_chat", 0)):  # shards are no checkpoints
        (tmp_path / directory).mkdir(parents=True)
        with open(tmp_path / directory / "file", "wb") as file:
            file.truncate(2**30)
        result = preflight(tmp_path)
        there = "of which 2.0 are there" if code == 0 else "of which 1.0 are there"
        assert result.returncode == code and there in (result.stdout + result.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.bogus=2"], "--model.bogus"),
        (["--chat.epochs=0"], "chat.epochs: given 0"),
        (["--train.total_batch_size=64"], "softmax: train.total_batch_size: given 64 tokens, 2 rows, fewer than the 3"),
        (["--model.value_embeddings=true"], "gka: value_embeddings: given True"),
        ([], "a C compiler (gcc or clang)"),
    ],
)
def test_what_would_fail_later_is_one_line_first(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(machine, "count_gpus", lambda: 3)
    if options:
        monkeypatch.setattr(machine, "check_compiler", lambda: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = preflight(tmp_path, *options)
    assert result.returncode == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr


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
    assert [row[0] for row in (*rows, total)] == ["d2_softmax", "d2_gka", "d2_gka_conv", "all"]
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
