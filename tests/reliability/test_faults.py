"""Evaluations that fail, disks that fill, directories and shards that vanish: reported, and nothing saved is lost."""

import json
import math
import os
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, make_trainer
from test_resume import differing_bytes, logged

from gkachat.checkpoint import checkpoint_steps, load_model
from gkachat.eval.bpb import evaluate_bpb
from gkachat.model.gpt import GPT, GPTConfig
from gkachat.train.metrics import read_metrics
from scripts.verify_run import problems


def trainer(name="", *options):
    return make_trainer("configs/laptop.toml", *TINY, f"--run.name={name}", *options)


def fail_from(step, error, made, monkeypatch):
    """Make evaluations of a trainer fail at and after this step."""
    evaluate = made.task.evaluate

    def failing(*args):
        if made.step >= step:
            raise error
        return evaluate(*args)

    monkeypatch.setattr(made.task, "evaluate", failing)


def test_an_evaluation_that_fails_is_reported_and_training_goes_on(tiny_home, monkeypatch, capsys):
    whole, hurt = trainer("whole"), trainer("hurt")
    whole.fit(whole.run)
    fail_from(4, RuntimeError("the evaluation is broken"), hurt, monkeypatch)
    hurt.fit(hurt.run)
    message = "evaluation at step 4 failed: RuntimeError('the evaluation is broken'); training goes on"
    assert message in capsys.readouterr().err
    kinds = [(r["kind"], r["step"]) for r in read_metrics(hurt.run.directory) if r["kind"] != "train"]
    assert kinds == [("eval", 0), ("evaluation_failed", 4), ("evaluation_failed", 8)]
    assert differing_bytes(whole.run.directory, hurt.run.directory) == 0


def test_an_evaluation_that_fails_before_the_first_step_is_an_error_and_not_in_the_way(tiny_home, monkeypatch):
    made = trainer()
    fail_from(0, ValueError("no val"), made, monkeypatch)
    with pytest.raises(ValueError, match="no val"):
        made.fit(made.run)
    again = trainer()
    again.fit(again.run)
    assert again.step == 8
    with pytest.raises(FileExistsError, match="'d2_softmax' exists"):
        trainer()
    for path in (again.run.directory / "checkpoints").iterdir():  # set aside, not gone
        path.rename(path.with_name(f"damaged_{path.name}"))
    with pytest.raises(FileExistsError, match="'d2_softmax' exists"):
        trainer()


def test_a_checkpoint_is_written_before_every_evaluation(tiny_home, monkeypatch):
    made, seen = trainer("", "--run.keep_last=9"), []
    evaluate = made.evaluate

    def look():
        made.saver.wait()
        seen.append((made.step, checkpoint_steps(made.run.directory)[-1:]))
        evaluate()

    monkeypatch.setattr(made, "evaluate", look)
    made.fit(made.run)
    assert seen == [(0, []), (4, [4]), (8, [8])]


def test_an_evaluation_without_enough_memory_goes_on_with_fewer_rows():
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=1, vocab_size=64, sequence_len=16, n_embd=16, head_dim=8))
    torch.nn.init.normal_(model.lm_head.weight)
    idx = torch.randint(64, (13, 16))
    batches, token_bytes = [(idx, idx.roll(-1, 1))], torch.ones(64, dtype=torch.long)
    expected, forward, tried = evaluate_bpb(model, batches, token_bytes), model.forward, []

    def short_of_memory(idx):
        tried.append(len(idx))
        if len(idx) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(idx)

    model.forward = short_of_memory
    assert evaluate_bpb(model, batches, token_bytes) == pytest.approx(expected, rel=1e-6)
    assert sum(n for n in tried if n <= 3) == 13
    model.forward = lambda idx: (_ for _ in ()).throw(torch.OutOfMemoryError("not even one"))
    with pytest.raises(torch.OutOfMemoryError):
        evaluate_bpb(model, batches, token_bytes)


def fill_disk(monkeypatch, is_full):
    """Make writing fail halfway for the files for which `is_full(path)` holds."""
    from safetensors.torch import save_file

    def save(tensors, path):
        if is_full(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr("safetensors.torch.save_file", save)


@pytest.mark.parametrize("file", ["model", "optimizer"])
def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(tiny_home, monkeypatch, capsys, file):
    fill_disk(monkeypatch, lambda path: "000004" in str(path) and file in path.name)
    made = trainer("", "--run.checkpoint_every=2", "--run.keep_last=9")
    made.fit(made.run)
    assert checkpoint_steps(made.run.directory) == [2, 6, 8]
    assert capsys.readouterr().out.count("cannot write checkpoint") == 1
    assert list(problems(made.run.directory)) == []


def test_a_disk_that_stays_full_is_an_error_that_leaves_the_earlier_checkpoints(tiny_home, monkeypatch):
    fill_disk(monkeypatch, lambda path: "000003" not in str(path))
    made = trainer("", "--run.checkpoint_every=3")
    with pytest.raises(OSError, match=r"cannot write checkpoint .*No space left.*untouched"):
        made.fit(made.run)
    assert [p.name for p in (made.run.directory / "checkpoints").iterdir()] == ["step_000003"]
    assert load_model(made.run.directory)[2]["step"] == 3


def test_a_full_disk_is_named_with_the_log_that_does_not_fit(tiny_home, monkeypatch):
    made = trainer()

    def full(text):
        raise OSError(28, "No space left on device")

    def fill():
        made.metrics.file = SimpleNamespace(write=full, fileno=made.metrics.file.fileno)

    monkeypatch.setattr(made, "report_start", fill)
    with pytest.raises(OSError, match=r"cannot write \S*d2_softmax/metrics\.jsonl: No space left on device"):
        made.fit(made.run)


def test_a_directory_that_vanishes_is_an_error_at_the_end_and_not_before(tiny_home, monkeypatch):
    made = trainer()
    save = made.save_checkpoint

    def vanish():
        if made.step == 4:
            shutil.rmtree(made.run.directory)
        save()

    monkeypatch.setattr(made, "save_checkpoint", vanish)
    with pytest.raises(OSError, match=r"cannot write checkpoint .*No such file or directory"):
        made.fit(made.run)
    assert made.step == 8


def test_a_directory_that_cannot_be_written_to_is_an_error_at_the_start(tiny_home):
    (tiny_home / "runs").write_text("a file where a directory belongs")
    with pytest.raises(OSError, match="runs"):
        trainer()


def test_a_shard_that_changes_under_a_run_ends_it_with_a_checkpoint(tiny_home, corpus_home, monkeypatch):
    (tiny_home / "tokens").unlink()
    shutil.copytree(corpus_home / "tokens", tiny_home / "tokens")
    options = ["--train.total_batch_size=8192", "--train.device_batch_size=256", "--train.total_tokens=819200"]
    made = trainer("", *options, "--train.eval_every=0")
    take = made.train_step

    def damage():
        if made.step == 3:
            path = next((tiny_home / "tokens").rglob("train_00000.bin"))
            content = bytearray(path.read_bytes())
            content[100] ^= 1
            path.write_bytes(content)
        take()

    monkeypatch.setattr(made, "train_step", damage)
    with pytest.raises(ValueError, match=r"train_00000\.bin does not match the hash .*scripts\.data_prep"):
        made.fit(made.run)
    # Data that was read before it changed serves to the end of the epoch. The run stops where it is read again.
    assert checkpoint_steps(made.run.directory) == [made.step] and made.step == made.task.loader.steps_per_epoch


def test_a_clock_that_goes_backwards_changes_nothing(tiny_home, monkeypatch):
    whole, back = trainer("whole"), trainer("back")
    whole.fit(whole.run)
    times = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: next(times))
    back.fit(back.run)
    assert logged(whole.run.directory) == logged(back.run.directory)
    assert all(r["seconds"] >= 0 for r in read_metrics(back.run.directory))


def test_saving_does_not_block_training_and_writes_one_checkpoint_at_a_time(tiny_home, monkeypatch):
    from safetensors.torch import save_file

    from gkachat.checkpoint import Saver, start_run

    made, may_write, writing, most = trainer(), threading.Event(), [0], [0]

    def slowly(tensors, path):
        writing[0] += 1
        most[0] = max(most[0], writing[0])
        assert may_write.wait(60)
        save_file(tensors, path)
        writing[0] -= 1

    monkeypatch.setattr("safetensors.torch.save_file", slowly)
    start_run(made.run.directory, made.config, made.task.tokenizer)
    saver = Saver(made.run.directory, made.config, made.task.tokenizer, lambda line: None)
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    saver.save(1, made.model.state_dict(), {}, {})  # returns, though nothing can be written yet
    with torch.no_grad():
        for p in made.model.parameters():
            p.add_(1)
    may_write.set()
    saver.save(2, made.model.state_dict(), {}, {})  # waits for the first
    assert checkpoint_steps(made.run.directory)[0] == 1
    saver.finish()
    assert most == [1] and checkpoint_steps(made.run.directory) == [1, 2]
    first = load_model(made.run.directory, step=1)[0].state_dict()
    assert all(torch.equal(first[k], before[k]) for k in before)  # the weights when saving began


LONG = ["--train.baseline_tokens=4096", "--run.checkpoint_every=2", "--run.keep_last=1"]


def spoil(made, factor, monkeypatch):
    """Multiply a weight before step 5, as an update that goes wrong may."""
    take = made.train_step

    def train_step():
        if made.step == 5:
            made.model.blocks[0].mlp.c_fc.weight.data.mul_(factor)
        take()

    monkeypatch.setattr(made, "train_step", train_step)


def test_weights_that_are_not_finite_are_not_saved_and_the_last_sound_checkpoint_stays(tiny_home, monkeypatch, capsys):
    made = trainer("", *LONG, "--train.max_skipped=4")
    spoil(made, math.inf, monkeypatch)
    with pytest.raises(
        FloatingPointError, match=r"not finite in 4 steps .*train\.clip_norm.*--resume goes on from step 4$"
    ):
        made.fit(made.run)
    out = capsys.readouterr().out
    assert "weights of step 6 are not finite (blocks.0.mlp.c_fc.weight): they are not saved" in out
    assert checkpoint_steps(made.run.directory)[-1] == 4 and not list(problems(made.run.directory))
    again = trainer("", *LONG, "--resume")
    again.fit(again.run)
    assert again.step == 16 and "resumes at step 4" in capsys.readouterr().out


def test_a_run_that_ends_with_weights_that_are_not_finite_says_so(tiny_home, monkeypatch):
    made = trainer("", "--run.checkpoint_every=2")
    spoil(made, math.nan, monkeypatch)
    with pytest.raises(FloatingPointError, match=r"weights of step 8 are not finite .*--resume goes on from step 4"):
        made.fit(made.run)


def test_a_checkpoint_stays_until_a_newer_one_has_given_finite_numbers(tiny_home, monkeypatch, capsys):
    made = trainer("", *LONG, "--train.max_skipped=6")
    spoil(made, 1e30, monkeypatch)  # finite, but no loss is
    with pytest.raises(FloatingPointError, match=r"goes on from step 11; .* delete those after step 4, from which"):
        made.fit(made.run)
    assert checkpoint_steps(made.run.directory) == [4, 11]
    again = trainer("", *LONG, "--train.max_skipped=3", "--resume")
    with pytest.raises(FloatingPointError, match=r"goes on from step 14; if that fails again, delete the newest"):
        again.fit(again.run)
    assert checkpoint_steps(made.run.directory)[0] == 4
    for step in checkpoint_steps(made.run.directory)[1:]:  # as it says
        shutil.rmtree(made.run.directory / "checkpoints" / f"step_{step:06d}")
    again = trainer("", *LONG, "--resume")
    again.fit(again.run)
    assert checkpoint_steps(made.run.directory) == [16]


def test_a_checkpoint_with_weights_that_are_not_finite_is_passed_over(tiny_home, monkeypatch, capsys):
    made = trainer("", "--run.checkpoint_every=2")
    spoil(made, math.inf, monkeypatch)
    with monkeypatch.context() as patch:  # an earlier version wrote such weights
        patch.setattr("gkachat.checkpoint._is_finite", lambda tensor: True)
        made.fit(made.run)
    with pytest.raises(
        ValueError, match=r"has numbers that are not finite, expected finite float32; delete .*step_000008"
    ):
        load_model(made.run.directory)
    capsys.readouterr()
    none = shutil.copytree(made.run.directory, made.run.directory.with_name("none"))
    shutil.rmtree(none / "checkpoints" / "step_000004")
    for name, message in (
        ("d2_softmax", "'d2_softmax' resumes at step 4"),
        ("none", "no sound checkpoint: it starts anew"),
    ):
        again = trainer(name, "--resume")
        again.fit(again.run)
        out = capsys.readouterr().out
        assert out.count("passed over") == 2 and message in out and checkpoint_steps(again.run.directory)[-1] == 8


def test_files_of_a_checkpoint_may_be_read_by_whom_the_umask_says(tiny_home):
    before = os.umask(0o027)
    try:
        made = trainer()
        made.fit(made.run)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in made.run.directory.rglob("*") if path.is_file()} == {0o640}


def damage_meta(run_dir):
    path = run_dir / "checkpoints" / "step_000008" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 9}))


def append(text):
    return lambda run_dir: (run_dir / "metrics.jsonl").open("a").write(text)


DAMAGE = {
    "config": (lambda d: (d / "config.toml").write_text("["), "config.toml"),
    "tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer"),
    "weights": (lambda d: (d / "checkpoints/step_000008/model.safetensors").write_bytes(b"x"), "model.safetensors"),
    "step": (damage_meta, "meta.json says step 9"),
    "leftover": (lambda d: (d / "checkpoints/.step_000009.tmp").mkdir(), "a leftover"),
    "metrics": (append("{\n"), "line 8: not a record"),
    "brackets": (append("[" * 200_000), "line 8: not a record"),
    "twice": (append('{"kind": "eval", "step": 8}\n'), "eval of step 8 comes twice"),
    "no checkpoint": (lambda d: shutil.rmtree(d / "checkpoints"), "there is no checkpoint"),
}


def test_verify_run_names_what_is_wrong(tiny_home, tmp_path):
    made = trainer("sound")
    made.fit(made.run)
    assert list(problems(made.run.directory)) == []
    for name, (damage, message) in DAMAGE.items():
        run_dir = tmp_path / "runs" / name
        shutil.copytree(made.run.directory, run_dir)
        damage(run_dir)
        assert any(message in problem for problem in problems(run_dir)), name
