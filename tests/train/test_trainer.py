"""A run from start to end, interrupted and resumed; what it writes, and what it refuses."""

import json
import math
import signal

import pytest
import torch
from conftest import TINY
from gkachat.attention.layers import Linear

from gkachat.checkpoint import checkpoint_steps, load_model, open_checkpoint
from gkachat.config import ConfigError
from gkachat.config_file import load_config
from gkachat.eval.bpb import evaluate_bpb
from gkachat.model.gpt import GPT, GPTConfig
from gkachat.train.learner import use_fp8
from gkachat.train.metrics import read_metrics
from gkachat.train.trainer import Trainer


def config(*options):
    return load_config("configs/laptop.toml", [*TINY, *options])


def train(*options, report=lambda line: None, **flags):
    trainer = Trainer(config(*options), report=report, **flags)
    trainer.run()
    return trainer


def weights(run_dir):
    return load_model(run_dir)[0].state_dict()


@pytest.mark.parametrize("attention", ["softmax", "gka"])
def test_training_lowers_the_loss_and_leaves_a_whole_run_directory(tiny_home, attention):
    lines = []
    trainer = train(f"--model.attention={attention}", "--train.baseline_tokens=16384", report=lines.append)
    run_dir = tiny_home / "runs" / f"d2_{attention}"
    assert trainer.run_dir == run_dir
    names = {p.relative_to(run_dir).as_posix() for p in run_dir.rglob("*") if p.is_file()}
    assert names == {"config.toml", "tokenizer.json", "metrics.jsonl"} | {
        f"checkpoints/step_{step:06d}/{name}"
        for step in (60, 64)
        for name in ("model.safetensors", "optimizer_0-of-1.safetensors", "meta.json")
    }
    evals = [r for r in read_metrics(run_dir) if r["kind"] == "eval"]
    assert [r["step"] for r in evals] == list(range(0, 65, 4))
    assert evals[-1]["val_bpb"] < 0.85 * evals[0]["val_bpb"]
    losses = [r["loss"] for r in read_metrics(run_dir) if r["kind"] == "train"]
    assert losses[0] == pytest.approx(math.log(512), abs=0.2) and losses[-1] < losses[0] - 0.5
    assert load_config(run_dir / "config.toml") == trainer.config
    assert any("tok/s" in line and "left" in line for line in lines)
    assert any("forward" in line and "optimizer" in line for line in lines)


def test_the_same_seed_trains_to_the_same_weights(tiny_home):
    a = weights(train("--run.name=a").run_dir)
    b = weights(train("--run.name=b").run_dir)
    c = weights(train("--run.name=c", "--run.seed=1").run_dir)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_fp8_rounds_products_and_leaves_weights_names_and_the_count_of_flops_alone(tiny_home):
    """Emulated here: the same rounding, on any device."""
    pytest.importorskip("torchao")
    options = GPTConfig(depth=2, vocab_size=512, sequence_len=32, n_embd=32, head_dim=16)
    torch.manual_seed(0)
    model = GPT(options)
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):  # they start at zero
            torch.nn.init.normal_(p, std=0.1)
    weights, names, idx = list(model.parameters()), list(model.state_dict()), torch.randint(512, (4, 32))
    exact = model(idx, idx)
    exact_grads = torch.autograd.grad(exact, model.parameter_groups()["matrices"])
    use_fp8(model, emulate=True)
    rounded = model(idx, idx)
    rounded_grads = torch.autograd.grad(rounded, model.parameter_groups()["matrices"])
    assert list(model.state_dict()) == names and all(a is b for a, b in zip(weights, model.parameters(), strict=True))
    assert type(model.lm_head) is Linear and type(model.blocks[0].mlp.c_fc) is not Linear
    assert 0 < abs(rounded - exact) < 0.05
    for a, b in zip(rounded_grads, exact_grads, strict=True):
        assert 0.001 < (a - b).norm() / b.norm() < 0.3  # 3 bits of mantissa


def test_fp8_is_refused_where_there_is_none(tiny_home):
    with pytest.raises(ValueError, match=r"run\.fp8: cpu, \d+ threads has no fp8 arithmetic"):
        train("--run.fp8=true")


def test_accumulating_gradients_changes_nothing_but_rounding(tiny_home):
    whole = weights(train("--run.name=whole", "--train.device_batch_size=8").run_dir)
    pieces = weights(train("--run.name=pieces", "--train.device_batch_size=3").run_dir)
    for key in whole:
        torch.testing.assert_close(whole[key], pieces[key], rtol=0, atol=2e-3)


def test_an_interrupted_run_resumes_to_the_same_weights_and_metrics(tiny_home):
    whole = train("--run.name=whole")

    def interrupt(line):
        if "step      4/8" in line:
            signal.raise_signal(signal.SIGINT)

    half = train("--run.name=half", report=interrupt)
    assert half.interrupted and checkpoint_steps(half.run_dir)[-1] == half.step < 8
    resumed = train("--run.name=half", resume=True)
    assert resumed.step == 8 and not resumed.interrupted
    a, b = weights(whole.run_dir), weights(resumed.run_dir)
    assert all(torch.equal(a[key], b[key]) for key in a)

    def curve(run_dir):
        return [(r["step"], r["val_bpb"]) for r in read_metrics(run_dir) if r["kind"] == "eval"]

    assert curve(whole.run_dir) == curve(half.run_dir)


def test_resuming_a_finished_run_does_nothing(tiny_home):
    run_dir = train().run_dir
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    assert train(resume=True).step == 8
    assert before == {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}


def test_an_existing_name_is_refused_and_nothing_is_touched(tiny_home):
    run_dir = train().run_dir
    before = (run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match=r"--resume.*--overwrite"):
        Trainer(config())
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_overwrite_starts_anew(tiny_home):
    train("--run.checkpoint_every=3")
    run_dir = train("--train.baseline_tokens=1024", overwrite=True).run_dir
    assert checkpoint_steps(run_dir) == [4]


def test_resume_names_the_options_that_changed(tiny_home):
    train()
    with pytest.raises(ValueError, match=r"model\.depth: given 3, the run has 2.*optim\.matrix_lr"):
        Trainer(config("--run.name=d2_softmax", "--model.depth=3", "--optim.matrix_lr=0.5"), resume=True)


def test_resuming_a_run_that_is_not_there_begins_it_and_says_so(tiny_home):
    lines = []
    assert train(resume=True, report=lines.append).step == 8
    assert any("'d2_softmax' has no checkpoint yet: it begins" in line for line in lines)


def test_checkpoints_come_as_often_as_asked_and_each_loads(tiny_home):
    run_dir = train("--run.checkpoint_every=3", "--run.keep_last=10").run_dir
    assert checkpoint_steps(run_dir) == [3, 4, 6, 8]  # and before each evaluation
    assert load_model(run_dir, step=3)[2]["step"] == 3
    assert load_model(run_dir)[2]["step"] == 8


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--run.keep_last=1"], [8]),
        (["--run.keep_last=2"], [7, 8]),
        (["--run.keep_last=1", "--run.keep_every=3"], [3, 6, 8]),
    ],
)
def test_no_more_checkpoints_are_kept_than_asked(tiny_home, options, steps):
    run_dir = train("--run.checkpoint_every=1", *options).run_dir
    assert checkpoint_steps(run_dir) == steps
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {f"step_{step:06d}" for step in steps}


def test_a_loaded_model_predicts_what_the_trained_one_did(tiny_home):
    trainer = train("--model.attention=gka")
    model, tokenizer, meta = load_model(trainer.run_dir)
    assert meta["tokens"] == 2048 and not model.training
    batch = trainer.loader.batch(0)
    bpb = [evaluate_bpb(m, [batch], tokenizer.token_bytes()) for m in (model, trainer.model)]
    assert bpb[0] == bpb[1]


def break_gradients(trainer, steps, monkeypatch):
    """Make the loss of these steps NaN."""
    learn, forward = trainer.learner.step, trainer.learner.forward

    def step(number, *args):
        trainer.learner.forward = (lambda *a: forward(*a) * math.nan) if number in steps else forward
        return learn(number, *args)

    monkeypatch.setattr(trainer.learner, "step", step)


def test_a_loss_that_is_not_finite_is_skipped_counted_and_harms_nothing(tiny_home, monkeypatch):
    lines = []
    trainer = Trainer(config("--run.log_every=1"), report=lines.append)
    break_gradients(trainer, {2, 5}, monkeypatch)
    assert trainer.run() and trainer.skipped == 2
    assert sum("not taken" in line for line in lines) == 2
    records = [r for r in read_metrics(trainer.run_dir) if r["kind"] == "train"]
    assert [r["skipped"] for r in records] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert records[2]["loss"] is None and math.isfinite(records[3]["loss"])
    assert all(torch.isfinite(t).all() for t in weights(trainer.run_dir).values())
    assert open_checkpoint(trainer.run_dir)[1]["skipped"] == 2


def test_too_many_of_them_stop_training_with_a_checkpoint_from_before(tiny_home, monkeypatch):
    trainer = Trainer(config("--train.max_skipped=3"), report=lambda line: None)
    break_gradients(trainer, set(range(2, 8)), monkeypatch)
    with pytest.raises(FloatingPointError, match=r"not finite in 3 steps in a row, up to step 4 .*train\.clip_norm"):
        trainer.run()
    saved = weights(trainer.run_dir)
    undisturbed = Trainer(config("--run.name=undisturbed"), report=lambda line: None)
    for step in range(2):
        undisturbed._train_step()
        assert undisturbed.step == step + 1
    assert all(torch.equal(saved[k], t) for k, t in undisturbed.model.state_dict().items())


def test_clipping_shortens_long_gradients_only(tiny_home):
    plain, loose, tight = (
        weights(train(f"--run.name={n}", f"--train.clip_norm={n}").run_dir) for n in ("none", "1e6", "1e-3")
    )
    assert all(torch.equal(plain[k], loose[k]) for k in plain)
    assert not torch.equal(plain["blocks.0.mlp.c_fc.weight"], tight["blocks.0.mlp.c_fc.weight"])


def test_norms_and_bandwidths_are_logged(tiny_home):
    run_dir = train("--model.attention=gka").run_dir
    for record in (r for r in read_metrics(run_dir) if r["kind"] == "train"):
        assert record["grad_norm"] > 0
        assert len(record["sigma"]) == 2 and all(0 < a <= b <= c for a, b, c in record["sigma"])


def test_recomputing_blocks_changes_nothing_but_memory(tiny_home):
    a, b = (weights(train(f"--run.name={f}", f"--train.recompute_blocks={f}").run_dir) for f in ("true", "false"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_largest_batch_of_a_cpu_is_not_sought(tiny_home):
    assert Trainer(config("--train.device_batch_size=auto"), report=lambda line: None).learner.device_batch_size == 8


def test_bfloat16_trains_too(tiny_home):
    trainer = train("--run.dtype=bfloat16", "--model.attention=gka", "--train.baseline_tokens=8192")
    assert trainer.model.compute_dtype == torch.bfloat16
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    evals = [r["val_bpb"] for r in read_metrics(trainer.run_dir) if r["kind"] == "eval"]
    assert evals[-1] < 0.9 * evals[0]
    assert open_checkpoint(trainer.run_dir)[1]["dtype"] == "bfloat16"


def test_the_data_order_is_the_seeds(tiny_home):
    a, b = (Trainer(config(f"--run.name={n}", f"--run.seed={n}"), report=lambda line: None) for n in (1, 2))
    assert not torch.equal(a.loader.batch(0)[0], b.loader.batch(0)[0])


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_home):
    with pytest.raises(ConfigError, match=r"model\.vocab_size: given 300, expected at least"):
        config("--model.vocab_size=300")


def test_shards_of_another_tokenizer_are_refused(tiny_home, corpus_home):
    (tiny_home / "tokenizer").unlink()
    path = tiny_home / "tokenizer" / "python-source-v512" / "tokenizer.json"
    path.parent.mkdir(parents=True)
    tree = json.loads((corpus_home / "tokenizer" / "python-source-v512" / "tokenizer.json").read_text())
    path.write_text(json.dumps(tree))  # the same merges, other bytes: nobody can tell whether it is the same
    with pytest.raises(ValueError, match="another tokenizer"):
        Trainer(config())


def test_a_full_disk_leaves_the_earlier_checkpoints(tiny_home, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def report(line):
        if "saved" in line:
            monkeypatch.setattr("safetensors.torch.save_file", full)

    with pytest.raises(OSError, match=r"cannot write checkpoint .*No space left.*untouched"):
        train("--run.checkpoint_every=3", report=report)
    run_dir = tiny_home / "runs" / "d2_softmax"
    assert checkpoint_steps(run_dir) == [3]
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step_000003"]
    assert isinstance(load_model(run_dir)[0], GPT)
