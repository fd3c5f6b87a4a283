"""A run that was stopped and gone on with is the same as one that was not, to the bit."""

import shutil

import pytest
import torch
from conftest import TINY, launch

from gkachat.checkpoint import checkpoint_steps, load_model, load_optimizer, open_checkpoint, step_dir
from gkachat.config_file import load_config
from gkachat.inference.engine import Engine
from gkachat.train.metrics import read_metrics
from gkachat.train.trainer import Trainer

TIMES = ("seconds", "tokens_per_second", "mfu")
OPTIONS = ["configs/laptop.toml", *TINY, "--run.keep_last=99", "--train.baseline_tokens=4096", "--run.dtype=float32"]


def trainer(name, *options, **flags):
    config = load_config(OPTIONS[0], [*OPTIONS[1:], f"--run.name={name}", *options])
    return Trainer(config, report=lambda line: None, **flags)


def go_back_to(run_dir, step):
    """As if the process had been killed right after the checkpoint of that step."""
    for later in checkpoint_steps(run_dir):
        if later > step:
            shutil.rmtree(step_dir(run_dir, later))


def told(run_dir):
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(run_dir)]


def tensors(run_dir):
    directory, meta = open_checkpoint(run_dir)
    weights = load_model(run_dir)[0].state_dict()
    return weights | dict(load_optimizer(directory, meta["world_size"]))


def differing_bytes(one, other):
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys() and len(a) > 30
    return sum(int((a[k].reshape(-1).view(torch.uint8) != b[k].reshape(-1).view(torch.uint8)).sum()) for k in a)


@pytest.mark.parametrize("attention", ["softmax", "gka"])
def test_going_on_gives_the_very_same_run(tiny_home, attention):
    whole = trainer("whole", f"--model.attention={attention}")
    whole.run()
    rng = torch.get_rng_state()
    parted = trainer("parted", f"--model.attention={attention}")
    parted.run()
    for step in (12, 8, 4):  # killed three times, ever earlier
        go_back_to(parted.run_dir, step)
        parted = trainer("parted", f"--model.attention={attention}", resume=True)
        assert parted.step == step
        parted.run()
    assert differing_bytes(whole.run_dir, parted.run_dir) == 0
    assert told(whole.run_dir) == told(parted.run_dir)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(a, b) for a, b in zip(whole.loader.batch(16), parted.loader.batch(16), strict=True))
    said = [
        list(Engine(model, tokenizer).generate(tokenizer.encode("def f("), max_tokens=20, seed=3))
        for model, tokenizer, _ in (load_model(run.run_dir) for run in (whole, parted))
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize("attention", ["softmax", "gka"])
def test_going_on_with_two_processes_gives_the_very_same_run(tiny_home, attention):
    options = [*OPTIONS, f"--model.attention={attention}"]
    for name in ("whole", "parted"):
        result = launch(2, *options, f"--run.name={name}", home=tiny_home)
        assert result.returncode == 0, result.stderr
    whole, parted = (tiny_home / "runs" / name for name in ("whole", "parted"))
    go_back_to(parted, 8)
    assert launch(2, *options, "--run.name=parted", "--resume", home=tiny_home).returncode == 0
    assert differing_bytes(whole, parted) == 0
    assert told(whole) == told(parted)


def test_an_evaluation_that_was_cut_off_is_made_up_for(tiny_home):
    whole = trainer("whole")
    whole.run()
    cut = trainer("cut")
    cut.run()
    go_back_to(cut.run_dir, 8)
    lines = (cut.run_dir / "metrics.jsonl").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"eval"' in line and '"step": 8,' in line)
    (cut.run_dir / "metrics.jsonl").write_text("\n".join(lines[:at]) + '\n{"kind": "ev')
    trainer("cut", resume=True).run()
    assert told(whole.run_dir) == told(cut.run_dir)


def test_the_newest_sound_checkpoint_is_taken_and_the_others_named_and_set_aside(tiny_home):
    whole = trainer("whole")
    whole.run()
    hurt = trainer("hurt")
    hurt.run()
    steps = checkpoint_steps(hurt.run_dir)
    assert steps == [4, 8, 12, 16]
    (step_dir(hurt.run_dir, 16) / "meta.json").write_text("{")
    with open(step_dir(hurt.run_dir, 12) / "optimizer_0-of-1.safetensors", "r+b") as file:
        file.seek(-3, 2)
        file.write(b"abc")
    lines = []
    config = load_config(OPTIONS[0], [*OPTIONS[1:], "--run.name=hurt"])
    again = Trainer(config, resume=True, report=lines.append)
    assert again.step == 8
    assert any("step_000016" in line and "meta.json cannot be read" in line for line in lines)
    assert any("step_000012" in line and "optimizer_0-of-1.safetensors does not match" in line for line in lines)
    again.run()
    names = {path.name for path in (hurt.run_dir / "checkpoints").iterdir()}
    assert names == {f"step_{s:06d}" for s in steps} | {"damaged_step_000012", "damaged_step_000016"}
    assert differing_bytes(whole.run_dir, hurt.run_dir) == 0
