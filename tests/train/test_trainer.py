"""A run from start to end, interrupted and resumed: what it writes, and what it refuses."""

import json
import math
import shutil
import signal

import pytest
import torch
from conftest import TINY, make_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from gkachat.attention.linear import Linear
from gkachat.checkpoint import checkpoint_steps, load_model, open_checkpoint
from gkachat.checks import ConfigError
from gkachat.config import ATTENTIONS
from gkachat.config_file import load_config
from gkachat.data import shards
from gkachat.data.shards import write_shards
from gkachat.eval.bpb import evaluate_bpb
from gkachat.model.gpt import GPT, GPTConfig
from gkachat.model.loss import head_loss
from gkachat.tokenizer import Tokenizer
from gkachat.train import language
from gkachat.train.metrics import read_metrics
from gkachat.train.setup import use_fp8


def trainer(*options):
    return make_trainer("configs/laptop.toml", *TINY, *options)


def test_the_first_evaluation_reads_what_exists_and_later_ones_wait_for_the_rest(tiny_home, monkeypatch):
    """A corpus in the making: two val shards of four, with fewer tokens than an evaluation reads."""
    (tiny_home / "tokens").unlink()
    path = tiny_home / "tokens" / "python-source-v512" / "manifest.json"
    texts = [(split, f"text {i} for {split} ") for i in range(400) for split in ("train", "train", "val")]
    tokenizer = Tokenizer.load(tiny_home / "tokenizer" / path.parent.name)
    list(write_shards(texts, tokenizer, path.parent, source={}, shard_chars=4000))
    whole = path.read_text()
    manifest = json.loads(whole)
    manifest["shards"] = [shard for shard in manifest["shards"] if shard["name"] not in ("val_00002", "val_00003")]
    sizes = [shard["tokens"] for shard in manifest["shards"] if shard["split"] == "val"]
    path.write_text(json.dumps(manifest | {"complete": False}))
    made = trainer(f"--train.eval_tokens={2 * sum(sizes)}")
    task, model = made.task, made.model
    told, read = [], []
    monkeypatch.setattr(language, "broadcast_from_rank0", lambda n, *_: told.append(n) or n)

    def count_tokens(model, batches, token_bytes):
        read.append(sum(int((targets >= 0).sum()) for _, targets in batches))
        return 1.0, 1

    task.bpb_sums = count_tokens
    task.evaluate(0, model, 4, lambda: True)
    # a target more for each document that follows another in its row
    assert told[0] == 2 and sum(sizes) <= read[0] < 1.2 * sum(sizes) and not task.eval_batches

    monkeypatch.setattr(language, "broadcast_from_rank0", lambda n, *_: 1)  # what rank 0 saw
    task.evaluate(0, model, 4, lambda: True)
    assert sizes[0] <= read[2] < 1.2 * sizes[0]

    slept = []
    monkeypatch.setattr(shards.time, "sleep", slept.append)
    task.evaluate(4, model, 4, lambda: not slept)  # a signal while it waits
    assert slept and "val_bpb" not in task.eval_batches

    path.write_text(whole)
    task.evaluate(4, model, 4, lambda: True)
    assert read[-2] > 1.5 * sum(sizes) and task.eval_batches.keys() == {"val_bpb", "train_bpb"}


def train(*options):
    made = trainer(*options)
    made.fit(made.run)
    return made


@pytest.fixture(scope="module")
def finished(corpus_home, tmp_path_factory):
    """The directory of a run with the TINY options that has ended."""
    home = tmp_path_factory.mktemp("finished")
    for name in ("tokenizer", "tokens"):
        (home / name).symlink_to(corpus_home / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GKACHAT_HOME", str(home))
        return train().run.directory


@pytest.fixture
def run_dir(finished, tiny_home):
    """A copy of that run, which scripts find."""
    return shutil.copytree(finished, tiny_home / "runs" / finished.name)


def content(run_dir):
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def weights(run_dir):
    return load_model(run_dir)[0].state_dict()


def records(run_dir, kind):
    return [record for record in read_metrics(run_dir) if record["kind"] == kind]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def at_step(made, step, action, monkeypatch):
    """Have the trainer do something else once, right before this step."""
    take = made.train_step

    def train_step():
        if made.step == step:
            action()
        take()

    monkeypatch.setattr(made, "train_step", train_step)


@pytest.mark.parametrize("attention", ["softmax", "gka"])
def test_training_lowers_the_loss_and_leaves_a_whole_run_directory(tiny_home, capsys, attention):
    made = train(f"--model.attention={attention}", "--train.baseline_tokens=16384", "--train.eval_every=16")
    run_dir = tiny_home / "runs" / f"d2_{attention}"
    assert made.run.directory == run_dir
    names = {p.relative_to(run_dir).as_posix() for p in run_dir.rglob("*") if p.is_file()}
    assert names == {"config.toml", "tokenizer.json", "metrics.jsonl"} | {
        f"checkpoints/step_{step:06d}/{name}"
        for step in (48, 64)
        for name in ("model.safetensors", "optimizer_0-of-1.safetensors", "meta.json")
    }
    evals = records(made.run.directory, "eval")
    assert [r["step"] for r in evals] == [0, 16, 32, 48, 64]
    assert evals[-1]["val_bpb"] < 0.85 * evals[0]["val_bpb"]
    logged = records(made.run.directory, "train")
    assert logged[0]["loss"] == pytest.approx(math.log(512), abs=0.2) and logged[-1]["loss"] < logged[0]["loss"] - 0.5
    assert all(r["grad_norm"] > 0 for r in logged)
    if attention == "gka":
        assert all(len(r["sigma"]) == 2 and all(0 < a <= b <= c for a, b, c in r["sigma"]) for r in logged)
    assert load_config(run_dir / "config.toml") == made.config
    lines = capsys.readouterr().out.splitlines()
    assert any("tok/s" in line and "left" in line for line in lines)
    assert any("forward" in line and "optimizer" in line for line in lines)


def test_the_seed_decides_weights_and_data(finished, tiny_home):
    same_seed, other = trainer("--run.name=a"), trainer("--run.name=b", "--run.seed=1")
    assert not torch.equal(same_seed.task.loader.batch(0)[0], other.task.loader.batch(0)[0])
    assert not torch.equal(same_seed.model.lm_head.weight, other.model.lm_head.weight)
    same_seed.fit(same_seed.run)
    assert same(weights(finished), weights(same_seed.run.directory))


@pytest.mark.parametrize(
    ("option", "atol"),
    [
        ("--train.device_batch_size=8", 1e-2),  # the sums of a step round differently; AdamW steps are up to 0.6
        ("--train.device_batch_size=3", 1e-2),
        ("--train.recompute_blocks=true", 0),
        ("--train.clip_norm=1e6", 0),
    ],
)
def test_accumulation_recomputation_and_a_high_clip_norm_do_not_change_the_weights(finished, tiny_home, option, atol):
    expected, found = weights(finished), weights(train(option).run.directory)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=atol)


def test_a_low_clip_norm_changes_the_weights(finished, tiny_home):
    name = "blocks.0.mlp.c_fc.weight"
    assert not torch.equal(weights(finished)[name], weights(train("--train.clip_norm=1e-3").run.directory)[name])


def test_fp8_rounds_products_and_keeps_weights_and_their_names():
    """Emulated, with the same rounding on any device."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=2, vocab_size=512, sequence_len=32, n_embd=32, head_dim=16))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):  # they start at zero
            torch.nn.init.normal_(p, std=0.1)
    parameters, names, idx = list(model.parameters()), list(model.state_dict()), torch.randint(512, (4, 32))
    exact = model(idx, idx)
    exact_grads = torch.autograd.grad(exact, model.parameter_groups()["matrices"])
    use_fp8(model, emulate=True)
    rounded = model(idx, idx)
    rounded_grads = torch.autograd.grad(rounded, model.parameter_groups()["matrices"])
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert type(model.lm_head) is Linear and type(model.blocks[0].mlp.c_fc) is not Linear
    assert 0 < abs(rounded - exact) < 0.05
    for a, b in zip(rounded_grads, exact_grads, strict=True):
        assert 0.001 < (a - b).norm() / b.norm() < 0.3  # 3 bits of mantissa


def test_fp8_is_refused_where_the_device_has_none(tiny_home):
    with pytest.raises(ValueError, match=r"run\.fp8: cpu, \d+ threads? has no fp8 arithmetic"):
        trainer("--run.fp8=true")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_an_interrupted_run_resumes_to_the_same_weights_and_metrics(finished, tiny_home, monkeypatch, number):
    half = trainer()
    at_step(half, 4, lambda: signal.raise_signal(number), monkeypatch)
    half.fit(half.run)
    assert half.interrupted and checkpoint_steps(half.run.directory) == [4, 5] and half.step == 5
    resumed = train("--resume")
    assert resumed.step == 8 and not resumed.interrupted
    assert same(weights(finished), weights(half.run.directory))
    curves = [[(r["step"], r["val_bpb"]) for r in records(path, "eval")] for path in (finished, half.run.directory)]
    assert curves[0] == curves[1]


def test_a_finished_run_changes_only_when_it_is_overwritten(run_dir):
    before = content(run_dir)
    with pytest.raises(FileExistsError, match=r"--resume.*--overwrite"):
        trainer()
    with pytest.raises(ValueError, match=r"model\.depth: given 3, the run has 2.*optim\.matrix_lr"):
        trainer("--run.name=d2_softmax", "--model.depth=3", "--optim.matrix_lr=0.5", "--resume")
    assert train("--resume").step == 8
    assert content(run_dir) == before
    train("--train.baseline_tokens=512", "--overwrite")
    assert checkpoint_steps(run_dir) == [2]


def test_a_run_of_another_version_is_refused_in_one_line_that_names_it(run_dir):
    for step in checkpoint_steps(run_dir):
        path = run_dir / "checkpoints" / f"step_{step:06d}" / "meta.json"
        meta = {name: value for name, value in json.loads(path.read_text()).items() if name != "format"}
        path.write_text(json.dumps(meta | {"version": "089c788"}))
    expected = r"step_000008 was written by version 089c788 in format 1, expected format 6: use that version"
    for attempt in (lambda: trainer("--resume"), lambda: load_model(run_dir)):
        with pytest.raises(ValueError, match=expected) as error:
            attempt()
        assert "\n" not in str(error.value)
    assert checkpoint_steps(run_dir) == [4, 8]  # it is not damaged


def test_resuming_a_run_that_does_not_exist_starts_it_and_says_so(tiny_home, capsys):
    assert train("--resume").step == 8
    assert "'d2_softmax' has no checkpoint yet: it starts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--run.checkpoint_every=3", "--run.keep_last=10"], [3, 4, 6, 8]),  # and before each evaluation
        (["--run.checkpoint_every=1", "--run.keep_last=1", "--run.keep_every=3"], [3, 6, 8]),
    ],
)
def test_checkpoints_come_as_often_as_asked_and_no_more_are_kept(tiny_home, options, steps):
    run_dir = train(*options).run.directory
    assert checkpoint_steps(run_dir) == steps
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {f"step_{step:06d}" for step in steps}
    assert all(load_model(run_dir, step=step)[2]["step"] == step for step in steps)


def test_a_loaded_model_predicts_what_the_trained_one_did(tiny_home):
    made = train("--model.attention=gka")
    model, tokenizer, meta = load_model(made.run.directory)
    assert meta["tokens"] == 2048 and not model.training
    batch = made.task.loader.batch(0)
    bpb = [evaluate_bpb(m, [batch], tokenizer.token_bytes()) for m in (model, made.model)]
    assert bpb[0] == bpb[1]


def break_losses(made, steps, monkeypatch):
    """Make the loss of these steps NaN."""
    forward = made.forward
    monkeypatch.setattr(made, "forward", lambda *a: forward(*a) * (math.nan if made.step in steps else 1))


def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(tiny_home, monkeypatch, capsys):
    made = trainer("--run.log_every=1")
    break_losses(made, {2, 5}, monkeypatch)
    made.fit(made.run)
    assert not made.interrupted and made.skipped == 2
    assert capsys.readouterr().out.count("step skipped") == 2
    logged = records(made.run.directory, "train")
    assert [r["skipped"] for r in logged] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert logged[2]["loss"] is None and math.isfinite(logged[3]["loss"])
    assert all(torch.isfinite(t).all() for t in weights(made.run.directory).values())
    assert open_checkpoint(made.run.directory)[1]["skipped"] == 2


def test_too_many_skipped_steps_stop_training_with_the_weights_before_them(tiny_home, monkeypatch):
    made = trainer("--train.max_skipped=3")
    break_losses(made, set(range(2, 8)), monkeypatch)
    with pytest.raises(FloatingPointError, match=r"not finite in 3 steps in a row, up to step 4 .*train\.clip_norm"):
        made.fit(made.run)
    undisturbed = trainer("--run.name=undisturbed")
    for step in range(2):
        undisturbed.train_step()
        assert undisturbed.step == step + 1
    assert same(weights(made.run.directory), undisturbed.model.state_dict())


class ForbidHostWaits(TorchDispatchMode):
    """Fails on operations that make the host wait for a GPU. Counts of targets are read where batches are, on the host.

    They are: a number read from a tensor, a tensor made of Python numbers, and lengths that depend on numbers.
    """

    WAITS = ("aten._local_scalar_dense", "aten.lift_fresh", "aten.nonzero", "aten.masked_select")

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        masked = op is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masked or (str(op).startswith(self.WAITS) and args[0].dtype != torch.int64):
            pytest.fail(f"{op} makes the host wait for the GPU")
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_step_reads_no_number_from_a_tensor_and_makes_no_tensor_of_one(tiny_home, attention):
    made = trainer("--model.attention", attention, "--train.clip_norm=1.0")
    model = made.model
    model.head_loss = model.head_loss._replace(compute=head_loss)  # that of a GPU: a CPU's counts the scored tokens
    made.train_step()  # makes the optimizers' state
    with ForbidHostWaits():
        made.train_step()


def test_the_largest_device_batch_of_a_cpu_is_not_searched(tiny_home):
    assert trainer("--train.device_batch_size=auto").device_batch_size == 8


def test_bfloat16_activations_train_float32_weights(tiny_home):
    made = train(
        "--run.dtype=bfloat16", "--model.attention=gka", "--train.baseline_tokens=8192", "--train.eval_every=0"
    )
    assert made.model.compute_dtype == torch.bfloat16
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    evals = [r["val_bpb"] for r in records(made.run.directory, "eval")]
    assert evals[-1] < 0.9 * evals[0]
    assert open_checkpoint(made.run.directory)[1]["dtype"] == "bfloat16"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_home):
    with pytest.raises(ConfigError, match=r"model\.vocab_size: given 300, expected at least"):
        trainer("--model.vocab_size=300")


def test_a_warm_up_that_the_run_does_not_reach_is_said(tiny_home, capsys):
    train("--train.warmup_steps=32", "--train.warmdown_fraction=0", "--run.name=short")
    line = "learning rates rise to x0.250 of those in optim at most: of 8 steps, train.warmup_steps is 32 and"
    assert line in capsys.readouterr().out
    train("--train.warmup_steps=2", "--run.name=enough")
    assert "learning rates rise" not in capsys.readouterr().out


def test_data_options_that_contradict_the_shards_are_refused_and_not_in_the_way(tiny_home):
    with pytest.raises(ValueError, match=r"made with other options \(data\.val_fraction: given 0\.2, it has 0\.1\)"):
        trainer("--data.val_fraction=0.2")
    assert trainer("--data.loader=crop").config.data.val_fraction == 0.1


def test_shards_of_another_tokenizer_are_refused(tiny_home, corpus_home):
    (tiny_home / "tokenizer").unlink()
    path = tiny_home / "tokenizer" / "python-source-v512" / "tokenizer.json"
    path.parent.mkdir(parents=True)
    tree = json.loads((corpus_home / "tokenizer" / "python-source-v512" / "tokenizer.json").read_text())
    path.write_text(json.dumps(tree))  # the same merges in other bytes: nobody can tell that they are the same
    with pytest.raises(ValueError, match="another tokenizer"):
        trainer()
