"""Shared by all tests: one thread per process, ways to run scripts, and one small corpus with its tokenizer."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import runpy
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

# Triton reads it when it is first imported: kernels run in its interpreter, which needs no GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# A part of Python's standard library, which tokenizes in a second, and a model that trains in one.
TINY = [
    "--data.max_chars=600000",
    "--data.val_fraction=0.1",
    "--tokenizer.vocab_size=512",
    "--model.depth=2",
    "--model.n_embd=32",
    "--model.head_dim=16",
    "--model.sequence_len=32",
    "--train.baseline_tokens=2048",
    "--train.total_batch_size=256",
    "--train.device_batch_size=4",
    "--train.eval_every=4",
    "--train.eval_tokens=256",
    "--run.log_every=2",
    "--run.dtype=float32",  # auto depends on the CPU
]


LONG = [  # test files, the longest first
    "test_scripts.py", "test_gpu_check.py", "test_decode_triton.py", "test_gaussian_kernel_attention.py",
    "test_sweep.py", "test_conformance.py", "test_resume.py", "test_vision.py", "test_distributed.py", "test_kill.py",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    """Put long files first, so that at the end no process waits for the last file of another."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus_home(tmp_path_factory):
    """A GKACHAT_HOME with a tokenizer and shards for the TINY options."""
    home = tmp_path_factory.mktemp("home")
    for script in ("tok_train", "data_prep"):
        result = run_script(script, "configs/laptop.toml", *TINY, home=home)
        assert result.returncode == 0, result.stderr
    return home


@pytest.fixture
def tiny_home(corpus_home, tmp_path, monkeypatch):
    """A fresh GKACHAT_HOME that shares the corpus."""
    for name in ("tokenizer", "tokens"):
        (tmp_path / name).symlink_to(corpus_home / name)
    monkeypatch.setenv("GKACHAT_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def transformers_modules(tmp_path_factory):
    """Have transformers copy the code of exported models to a directory of this session, one for all test files."""
    directory = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(directory))
        patch.syspath_prepend(str(directory))
        yield


@pytest.fixture(scope="module")
def cauchy(tmp_path_factory):
    """The file that docs/attention.md makes, with its attention registered while a module's tests run."""
    from gkachat.config import ATTENTIONS

    page = (ROOT / "docs" / "attention.md").read_text()
    path = tmp_path_factory.mktemp("own") / "cauchy.py"
    path.write_text(page.split("```python\n")[1].split("```")[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        importlib.import_module("cauchy")
        yield path
    del ATTENTIONS["cauchy"], sys.modules["cauchy"]


@pytest.fixture(scope="module", params=["installed", "3.6"])
def compiled_resources(request):
    """Function that returns the figures a script prints, one for each kernel that it compiles for a Hopper.

    Tests run twice: with the Triton of torch 2.13, which pip installs, and with the one before.
    """
    path = str(ROOT)
    if request.param == "3.6":
        if not (ROOT / ".venv/triton-3.6").is_dir():
            pytest.skip("no Triton 3.6 in .venv/triton-3.6; tests/run.sh installs it where there is a network")
        path += os.pathsep + str(ROOT / ".venv/triton-3.6")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path}

    def figures(script: str, *args: str) -> list[dict]:
        command = [sys.executable, script, *args]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    return figures


def live_model(attention="softmax", *, dtype=torch.float32, seed=0, **shape):
    """A small GPT in eval mode. What starts at zero, and so hides other weights, is drawn."""
    from gkachat.config import GPTConfig
    from gkachat.model.gpt import GPT

    shape = {"depth": 2, "vocab_size": 64, "sequence_len": 200, "n_embd": 32, "head_dim": 16} | shape
    torch.manual_seed(seed)
    model = GPT(GPTConfig(attention=attention, **shape), dtype).eval()
    for name, p in model.named_parameters():
        if (
            name.endswith(("c_proj.weight", "lm_head.weight", "smear.share", "forget_gate.gate.weight"))
            or ".conv" in name
        ):
            torch.nn.init.normal_(p, std=0.2)
    return model


def untrained_run(home, name, tokenizer, *, tuned=False, **shape):
    """Make a run whose only checkpoint is of a model as it starts; `tuned`: as if tuned on conversations."""
    from gkachat.checkpoint import Saver, start_run
    from gkachat.config import Config, GPTConfig, TuningConfig
    from gkachat.model.gpt import GPT

    shape = {"depth": 1, "sequence_len": 64, "n_embd": 32, "head_dim": 16, **shape}
    config = (TuningConfig if tuned else Config)(model=GPTConfig(vocab_size=tokenizer.vocab_size, **shape))
    start_run(home / "runs" / name, config, tokenizer)
    saver = Saver(home / "runs" / name, config, tokenizer, report=lambda line: None)
    saver.save(1, GPT(config.model).state_dict(), {}, {"n_steps": 1})
    saver.finish()
    return home / "runs" / name


def make_trainer(*args, script="base_train"):
    """The trainer that a training script builds from these arguments; `trainer.fit(trainer.run)` trains it."""
    from gkachat.train.trainer import Trainer

    made = []

    def keep(trainer, run):
        trainer.run, trainer.report = run, run.report
        made.append(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, args)])
        patch.setattr(Trainer, "fit", keep)
        importlib.import_module(f"scripts.{script}").main()
    return made[0]


def call(script, *args, home, stdin=None, **env):
    """Run a script in a process of its own, as a user does. `run_script` is the faster way."""
    return subprocess.run(
        [sys.executable, "-m", f"scripts.{script}", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "GKACHAT_HOME": str(home), "OMP_NUM_THREADS": "1", **env},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_script(script, *args, home, stdin=""):
    """Run a script in this process, which has imported torch already. Same result as `call`."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("GKACHAT_HOME", str(home))
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [script, *map(str, args)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(stdin.encode()))))
        try:
            runpy.run_module(f"scripts.{script}", run_name="__main__", alter_sys=True)
        except SystemExit as exit:
            code = exit.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def launch(n, *options, home, script="scripts.base_train", timeout=300):
    """Run a script, or another module, in n processes of torchrun. `run_ranks` is the faster way."""
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
            "-m", script, *options,
        ],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "GKACHAT_HOME": str(home)},
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def run_ranks(n, script, *args, home):
    """Run a script in n processes that form a world, as `launch` does. Same result, with the output of all of them.

    They are forked from this process, which has imported torch already, and use the store that torchrun would offer.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    with tempfile.TemporaryDirectory() as directory:
        written = [Path(directory) / str(rank) for rank in range(n)]
        ranks = [
            multiprocessing.get_context("fork").Process(
                target=_run_rank,
                args=(world | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n}, path, script, args, home),
            )
            for rank, path in enumerate(written)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        texts = [json.loads(path.read_text()) for path in written if path.exists()]  # a rank that died wrote nothing
    out, err = ("".join(text[i] for text in texts) for i in (0, 1))
    return SimpleNamespace(returncode=max((rank.exitcode for rank in ranks), key=abs), stdout=out, stderr=err)


def _run_rank(environment, written, script, args, home):
    signal.alarm(300)  # ends a process that waits for one that is gone
    os.environ.update({name: str(value) for name, value in environment.items()})
    result = run_script(script, *args, home=home)
    written.write_text(json.dumps([result.stdout, result.stderr]))
    sys.exit(result.returncode)


def _wandb_records(path):
    """Yield the records of a .wandb file: 7 bytes of wandb's own, then LevelDB's log format with protobuf messages.

    wandb's reader is inside its binary, but its message classes are public.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    full, first, middle, last = range(1, 5)
    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # what is left of a block is too short for a header
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        assert kind in (full, first, middle, last)
        if kind in (full, last):
            yield Record.FromString(whole)
            whole = b""


def wandb_runs(directory):
    """Return what each wandb run below a directory holds, in the order they were made."""
    import wandb

    wandb.teardown()  # in this process, which completes its files
    found = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        told = SimpleNamespace(history=[], config={}, artifacts=[], files=path.parent / "files")
        for record in _wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                told.id, told.project, told.name = record.run.run_id, record.run.project, record.run.display_name
                told.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                told.history.append(items)
            elif kind == "artifact":
                told.artifacts.append(record.artifact)
            elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
                told.artifacts.append(record.request.log_artifact.artifact)
        found.append(told)
    return found
