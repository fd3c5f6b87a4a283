"""Checkpoints that do not match their hashes, and runs that do not exist."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_trainer

from gkachat.checkpoint import checkpoint_steps, find_run, load_model


@pytest.fixture(scope="module")
def trained(corpus_home, tmp_path_factory):
    """A run with checkpoints of steps 4 and 8."""
    home = tmp_path_factory.mktemp("trained")
    for name in ("tokenizer", "tokens"):
        (home / name).symlink_to(corpus_home / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GKACHAT_HOME", str(home))
        made = make_trainer("configs/laptop.toml", *TINY, "--run.checkpoint_every=4", "--model.attention=gka")
        made.fit(made.run)
    return made.run.directory


@pytest.fixture
def run_dir(trained, tiny_home):
    """A copy of the run, to be damaged."""
    return shutil.copytree(trained, tiny_home / "runs" / "d2_gka")


@pytest.fixture
def last(run_dir):
    return run_dir / "checkpoints" / "step_000008"


def test_a_run_is_found_by_name_and_by_path(run_dir):
    assert find_run("d2_gka") == find_run(run_dir) == run_dir
    with pytest.raises(FileNotFoundError, match=r"no run 'd3_gka'.*there are: d2_gka"):
        find_run("d3_gka")
    for i in range(20):
        shutil.copytree(run_dir, run_dir.with_name(f"other_{i}"), ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(FileNotFoundError, match=r"no run 'd2_gak'; in \S+ there are: d2_gka and 20 more$"):
        find_run("d2_gak")


def test_a_run_without_its_tokenizer_says_which_one_to_copy(run_dir):
    (run_dir / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"is missing: copy \S+/python-source-v512/tokenizer\.json there"):
        load_model(run_dir)


def test_a_run_trained_with_a_kernel_that_cannot_run_here_loads(run_dir, last, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    meta = json.loads((last / "meta.json").read_text())
    meta["config"]["model"]["gka"]["backend"] = "triton"
    (last / "meta.json").write_text(json.dumps(meta))
    model, _, _ = load_model(run_dir)
    assert torch.isfinite(model(torch.zeros(1, 5, dtype=torch.long))).all()


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def append(path):
    path.write_bytes(path.read_bytes() + b"\n")


WEIGHTS, META = "checkpoints/step_000008/model.safetensors", "checkpoints/step_000008/meta.json"
ANOTHER = r"does not match the hash.*delete .* to use an earlier one"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (WEIGHTS, flip_a_bit, ANOTHER),
        (WEIGHTS, Path.unlink, ANOTHER),
        (WEIGHTS, append, ANOTHER),
        (META, lambda path: path.write_text("{"), r"meta\.json cannot be read"),
        ("tokenizer.json", append, "not the tokenizer this checkpoint was trained with"),
    ],
    ids=["weights flipped", "weights missing", "weights longer", "meta", "tokenizer"],
)
def test_a_damaged_file_is_named(run_dir, name, damage, message):
    damage(run_dir / name)
    with pytest.raises(ValueError, match=message):
        load_model(run_dir)
    if name == WEIGHTS:
        assert load_model(run_dir, step=4)[2]["step"] == 4


def test_leftovers_of_a_crash_are_not_taken_for_checkpoints(run_dir):
    (run_dir / "checkpoints" / ".step_000099.1.tmp").mkdir()
    assert checkpoint_steps(run_dir) == [4, 8]


def test_a_missing_checkpoint_is_named_with_those_there_are(run_dir):
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5; it has: 4, 8"):
        load_model(run_dir, step=5)


def test_loading_does_not_disturb_the_random_state(run_dir):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_model(run_dir)
    assert torch.rand(1) == expected
