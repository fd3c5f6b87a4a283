"""Evaluations that fail, disks that fill, directories and shards that vanish: told, and nothing saved is lost."""

import json
import shutil
import time

import pytest
import torch
from conftest import TINY
from test_resume import differing_bytes, told

from gkachat.checkpoint import checkpoint_steps, load_model
from gkachat.config_file import load_config
from gkachat.eval.bpb import evaluate_bpb
from gkachat.model.gpt import GPT, GPTConfig
from gkachat.train import trainer as trainer_module
from gkachat.train.metrics import read_metrics
from gkachat.train.trainer import Trainer
from scripts.verify_run import problems


def trainer(name="", *options, **flags):
    flags = {"report": lambda line: None} | flags
    return Trainer(load_config("configs/laptop.toml", [*TINY, f"--run.name={name}", *options]), **flags)


def failing_from(step, error, made, monkeypatch):
    """Make evaluations of a trainer fail at and after this step."""
    sums = trainer_module.bpb_sums

    def bpb_sums(*args):
        if made.step >= step:
            raise error
        return sums(*args)

    monkeypatch.setattr(trainer_module, "bpb_sums", bpb_sums)


def test_an_evaluation_that_fails_is_told_and_training_goes_on(tiny_home, monkeypatch, capsys):
    whole, hurt = trainer("whole"), trainer("hurt")
    whole.run()
    failing_from(4, RuntimeError("the evaluation is broken"), hurt, monkeypatch)
    assert hurt.run()
    assert "evaluation at step 4 failed: RuntimeError('the evaluation is broken'); training goes on" in (
        capsys.readouterr().err
    )
    kinds = [(r["kind"], r["step"]) for r in read_metrics(hurt.run_dir) if r["kind"] != "train"]
    assert kinds == [("eval", 0), ("evaluation_failed", 4), ("evaluation_failed", 8)]
    assert differing_bytes(whole.run_dir, hurt.run_dir) == 0


def test_an_evaluation_that_fails_before_the_first_step_is_an_error(tiny_home, monkeypatch):
    made = trainer()
    failing_from(0, ValueError("no val"), made, monkeypatch)
    with pytest.raises(ValueError, match="no val"):
        made.run()


def test_a_checkpoint_is_written_before_every_evaluation(tiny_home, monkeypatch):
    made, seen = trainer("", "--run.keep_last=9"), []
    evaluate = made._evaluate

    def look():
        made.saver.wait()
        seen.append((made.step, checkpoint_steps(made.run_dir)[-1:]))
        evaluate()

    monkeypatch.setattr(made, "_evaluate", look)
    made.run()
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


@pytest.mark.parametrize("file", ["model", "optimizer"])
def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(tiny_home, monkeypatch, file):
    from safetensors.torch import save_file

    def full_at_the_second(tensors, path):
        if "000004" in str(path) and file in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr("safetensors.torch.save_file", full_at_the_second)
    lines = []
    made = trainer("", "--run.checkpoint_every=2", "--run.keep_last=9", report=lines.append)
    assert made.run()
    assert checkpoint_steps(made.run_dir) == [2, 6, 8]
    assert sum("cannot write checkpoint" in line and "No space left on device" in line for line in lines) == 1
    assert list(problems(made.run_dir)) == []


def test_a_directory_that_vanishes_is_an_error_in_the_end_and_not_before(tiny_home, monkeypatch):
    lines = []
    made = trainer("", report=lines.append)
    save = made.saver.save

    def vanish(step, *args):
        if step == 4:
            shutil.rmtree(made.run_dir)
        save(step, *args)

    monkeypatch.setattr(made.saver, "save", vanish)
    with pytest.raises(OSError, match=r"cannot write checkpoint .*No such file or directory"):
        made.run()
    assert made.step == 8


def test_a_directory_that_cannot_be_written_to_is_an_error_at_the_start(tiny_home):
    (tiny_home / "runs").write_text("a file where a directory belongs")
    with pytest.raises(OSError, match="runs"):
        trainer()


def test_a_shard_that_changes_under_a_run_ends_it_with_a_checkpoint(tiny_home, corpus_home, monkeypatch):
    (tiny_home / "tokens").unlink()
    shutil.copytree(corpus_home / "tokens", tiny_home / "tokens")
    made = trainer("", "--train.baseline_tokens=2560000", "--train.eval_every=0")
    take = made._train_step

    def damage():
        if made.step == 3:
            path = next((tiny_home / "tokens").rglob("train_00000.bin"))
            content = bytearray(path.read_bytes())
            content[100] ^= 1
            path.write_bytes(content)
        take()

    monkeypatch.setattr(made, "_train_step", damage)
    with pytest.raises(ValueError, match=r"train_00000\.bin does not match the hash .*scripts\.data_prep"):
        made.run()
    # What was read before it changed is used to the end of the epoch; the run stops where it is read again.
    assert checkpoint_steps(made.run_dir) == [made.step] and made.step == made.loader.steps_per_epoch


def test_a_clock_that_goes_backwards_changes_nothing(tiny_home, monkeypatch):
    trainer("whole").run()
    times = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: next(times))
    made = trainer("back")
    made.run()
    assert told(tiny_home / "runs" / "whole") == told(made.run_dir)
    assert all(r["seconds"] >= 0 for r in read_metrics(made.run_dir))


def test_saving_does_not_hold_the_training_thread_and_at_most_one_is_under_way(tiny_home, monkeypatch):
    from safetensors.torch import save_file

    under_way, most, slept = [0], [0], 0.3

    def slowly(tensors, path):
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        time.sleep(slept)
        save_file(tensors, path)
        under_way[0] -= 1

    monkeypatch.setattr("safetensors.torch.save_file", slowly)
    made = trainer("", "--run.checkpoint_every=4", "--train.eval_every=0")
    start = time.monotonic()
    made.saver.save(1, made.model.state_dict(), {}, {})
    assert time.monotonic() - start < slept and made.saver.thread is not None
    made.saver.save(2, made.model.state_dict(), {}, {})  # waits for the first
    assert time.monotonic() - start > 2 * slept
    made.saver.finish()
    assert most == [1] and checkpoint_steps(made.run_dir) == [1, 2]


def test_what_was_saved_is_what_stood_there_when_saving_began(tiny_home):
    made = trainer()
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    made.saver.save(1, made.model.state_dict(), {}, {})
    with torch.no_grad():
        for p in made.model.parameters():
            p.add_(1)
    made.saver.finish()
    loaded = load_model(made.run_dir)[0].state_dict()
    assert all(torch.equal(loaded[k], before[k]) for k in before)


def damage_meta(run_dir):
    path = run_dir / "checkpoints" / "step_000008" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 9}))


DAMAGE = {
    "config": (lambda d: (d / "config.toml").write_text("["), "config.toml"),
    "tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer"),
    "weights": (lambda d: (d / "checkpoints/step_000008/model.safetensors").write_bytes(b"x"), "model.safetensors"),
    "step": (damage_meta, "meta.json says step 9"),
    "leftover": (lambda d: (d / "checkpoints/.step_000009.tmp").mkdir(), "a leftover"),
    "metrics": (lambda d: (d / "metrics.jsonl").open("a").write("{\n"), "line 8: not a record"),
    "twice": (
        lambda d: (d / "metrics.jsonl").open("a").write('{"kind": "eval", "step": 8}\n'),
        "eval of step 8 comes twice",
    ),
    "no checkpoint": (lambda d: shutil.rmtree(d / "checkpoints"), "there is no checkpoint"),
}


@pytest.mark.parametrize(("damage", "told"), DAMAGE.values(), ids=DAMAGE)
def test_verify_run_names_what_is_wrong(tiny_home, damage, told):
    made = trainer()
    made.run()
    assert list(problems(made.run_dir)) == []
    damage(made.run_dir)
    assert any(told in problem for problem in problems(made.run_dir))
