"""A run that was stopped and resumed equals one that was not, to the bit."""

import shutil

import pytest
import torch
from conftest import TINY, make_trainer, run_ranks

from gkachat.checkpoint import checkpoint_steps, load_model, load_optimizer, open_checkpoint, remove, step_dir
from gkachat.config_file import load_config
from gkachat.inference.engine import Engine
from gkachat.train import schedule, setup
from gkachat.train.metrics import read_metrics
from scripts.verify_run import problems

TIMES = ("seconds", "tokens_per_second", "mfu")
OPTIONS = ["configs/laptop.toml", *TINY, "--run.keep_last=99", "--train.baseline_tokens=4096"]


def train(name, *options):
    made = make_trainer(*OPTIONS, f"--run.name={name}", *options)
    made.fit(made.run)
    return made


def cut_copy(run_dir, name, step):
    """Copy a run as if its process had been killed right after the checkpoint of that step."""
    run_dir = shutil.copytree(run_dir, run_dir.with_name(name), dirs_exist_ok=True)
    for later in checkpoint_steps(run_dir):
        if later > step:
            remove(step_dir(run_dir, later))
    return run_dir


def logged(run_dir):
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
def test_a_resumed_run_is_the_very_same_run(tiny_home, capsys, attention):
    whole = train("whole", f"--model.attention={attention}")
    rng = torch.get_rng_state()
    for step in (12, 4):
        cut_copy(whole.run.directory, "parted", step)
        parted = train("parted", f"--model.attention={attention}", "--resume")
        assert f"run 'parted' resumes at step {step}" in capsys.readouterr().out
    assert differing_bytes(whole.run.directory, parted.run.directory) == 0
    assert logged(whole.run.directory) == logged(parted.run.directory)
    assert torch.equal(torch.get_rng_state(), rng)
    batches = (made.task.loader.batch(16) for made in (whole, parted))
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    said = [
        list(Engine(model, tokenizer).generate(tokenizer.encode("def f("), max_tokens=20, seed=3))
        for model, tokenizer, _ in (load_model(made.run.directory) for made in (whole, parted))
    ]
    assert said[0] == said[1]


def test_a_finished_run_is_trained_longer_with_the_schedule_of_the_new_length(tiny_home, capsys):
    short = train("run", "--train.baseline_tokens=2048")
    assert short.step == 8
    train("run", "--train.baseline_tokens=2048", "--resume")
    assert "run 'run' is finished at step 8; a larger token budget trains it longer" in capsys.readouterr().out
    longer = train("run", "--resume")  # 4,096 tokens
    assert "is trained longer, 16 steps instead of 8: from step 8" in capsys.readouterr().out
    run_dir = longer.run.directory
    assert longer.step == 16 and longer.config.train.total_batch_size == short.config.train.total_batch_size
    assert load_config(run_dir / "config.toml") == longer.config
    rates = [r["lr"] for r in read_metrics(run_dir) if r["kind"] == "train"]
    configs = [short.config] * 8 + [longer.config] * 8
    assert rates == [schedule.lr_multiplier(step, configs[step]) for step in range(1, 16, 2)]
    assert open_checkpoint(run_dir)[1]["extended_at"] == [8] and not list(problems(run_dir))
    cut_copy(run_dir, "parted", 12)
    assert differing_bytes(run_dir, train("parted", "--resume").run.directory) == 0
    with pytest.raises(ValueError, match=r"total_tokens: given 2048, the run has 4096.*only a larger token budget"):
        train("run", "--train.baseline_tokens=2048", "--resume")
    with pytest.raises(ValueError, match=r"options \(optim\.matrix_lr: given 1\.0, the run has"):
        train("run", "--train.baseline_tokens=8192", "--optim.matrix_lr=1", "--resume")


def test_a_run_that_is_trained_longer_keeps_the_batch_that_follows_from_its_first_budget(tiny_home):
    train("run", "--train.baseline_tokens=2048")
    options = [word for word in OPTIONS[1:] if "total_batch_size" not in word]
    config = load_config(OPTIONS[0], [*options, "--run.name=run", "--train.total_batch_size=none"])
    assert setup.keep_batch(config, resume=True).train.total_batch_size == 256
    assert setup.keep_batch(config, resume=False).train.total_batch_size is None


# 20 steps of 16 rows. Embedding and head are large enough to be divided by rows. Smaller batches give gradients of low
# rank, whose rounding errors both optimizers amplify.
SHARED = [
    *OPTIONS, "--model.n_embd=64", "--model.sequence_len=128", "--train.total_batch_size=2048",
    "--train.baseline_tokens=40960", "--train.eval_every=0", "--run.checkpoint_every=8", "--run.log_every=1",
    "--train.clip_norm=10",
]  # fmt: skip


def losses(run_dir):
    return torch.tensor([record["loss"] for record in read_metrics(run_dir) if record["kind"] == "train"])


@pytest.mark.parametrize(("attention", "another"), [("softmax", 3), ("gka", 1)])
def test_two_processes_train_as_one_does_and_resume_in_a_world_of_any_size(tiny_home, attention, another):
    """Three processes cannot share 16 rows evenly."""
    options = [*SHARED, f"--model.attention={attention}"]
    one = make_trainer(*options, "--run.name=one")
    one.fit(one.run)
    result = run_ranks(2, "base_train", *options, "--run.name=many", home=tiny_home)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| saved") == 3  # only rank 0 writes and prints
    many = tiny_home / "runs" / "many"
    assert len(losses(many)) == 20
    torch.testing.assert_close(losses(many), losses(one.run.directory), rtol=0, atol=1e-5)
    # The optimizer state that each rank kept of its share is whole again when it is loaded.
    torch.testing.assert_close(tensors(many), tensors(one.run.directory), rtol=1e-3, atol=1e-3)

    parted = cut_copy(many, "parted", 8)
    result = run_ranks(2, "base_train", *options, "--run.name=parted", "--resume", home=tiny_home)
    assert result.returncode == 0, result.stderr
    assert differing_bytes(many, parted) == 0
    assert logged(many) == logged(parted)

    other = cut_copy(many, "other", 16)
    result = run_ranks(another, "base_train", *options, "--run.name=other", "--resume", home=tiny_home)
    assert "run 'other' resumes at step 16" in result.stdout, result.stderr
    torch.testing.assert_close(losses(other), losses(many), rtol=0, atol=1e-5)


def test_an_evaluation_that_was_cut_off_is_done_on_resume(tiny_home):
    whole = train("whole").run.directory
    cut = cut_copy(whole, "cut", 8)
    lines = (cut / "metrics.jsonl").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"eval"' in line and '"step": 8,' in line)
    (cut / "metrics.jsonl").write_text("\n".join(lines[:at]) + '\n{"kind": "ev')
    train("cut", "--resume")
    assert logged(whole) == logged(cut)


def test_resume_takes_the_newest_sound_checkpoint_and_sets_damaged_ones_aside(tiny_home, capsys):
    whole = train("whole").run.directory
    hurt, steps = cut_copy(whole, "hurt", 16), [4, 8, 12, 16]
    assert checkpoint_steps(hurt) == steps
    (step_dir(hurt, 16) / "meta.json").write_text("{")
    with open(step_dir(hurt, 12) / "optimizer_0-of-1.safetensors", "r+b") as file:
        file.seek(-3, 2)
        file.write(b"abc")
    capsys.readouterr()
    train("hurt", "--resume")
    lines = capsys.readouterr().out.splitlines()
    assert "step_000016" in lines[0] and "meta.json cannot be read" in lines[0]
    assert "step_000012" in lines[1] and "optimizer_0-of-1.safetensors does not match" in lines[1]
    assert lines[2].startswith("run 'hurt' resumes at step 8 of ")
    names = {path.name for path in (hurt / "checkpoints").iterdir()}
    assert names == {f"step_{s:06d}" for s in steps} | {"damaged_step_000012", "damaged_step_000016"}
    assert differing_bytes(whole, hurt) == 0
