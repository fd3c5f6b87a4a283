"""scripts.data_prep from end to end, on a local mirror laid out as a Hugging Face dataset of parquet files."""

import os
import signal
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, call

from gkachat.data.shards import read_manifest

WORDS = ["river", "stone", "lantern", "orchard", "gravel", "summit", "harbour", "meadow", "cellar", "bridge"]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """1,200 documents in four files, as in karpathy/climbmix-400b-shuffle: shard_00000.parquet with a column `text`."""
    directory = tmp_path_factory.mktemp("mirror")
    for shard in range(4):
        texts = [
            " ".join(WORDS[(i * k + shard) % len(WORDS)] for k in range(1, 400)) + f" {shard} {i}" for i in range(300)
        ]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), directory / f"shard_{shard:05d}.parquet")
    return directory


@pytest.fixture(scope="module")
def options(mirror):
    return [
        "--data.source=huggingface", f"--data.dataset={mirror}", "--data.name=mirror", "--data.shard_chars=200000",
        "--data.max_chars=100000000", "--tokenizer.vocab_size=512", "--tokenizer.train_chars=200000",
    ]  # fmt: skip


@pytest.fixture
def home(options, tmp_path):
    result = call("tok_train", *options, home=tmp_path, HF_HOME=tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    return tmp_path


def test_a_mirror_is_streamed_and_the_disk_it_takes_announced(home, options):
    result = call("data_prep", *options, home=home, HF_HOME=home / "hf")
    assert result.returncode == 0, result.stderr
    assert "disk: about" in result.stdout and "GiB are free at" in result.stdout
    assert result.stdout.index("disk:") < result.stdout.index("train_00000")
    manifest = read_manifest(home / "tokens" / "mirror-v512")
    assert manifest.complete and manifest.total("train", "documents") + manifest.total("val", "documents") == 1200


def test_killed_it_goes_on_and_tokenizes_no_finished_shard_again(home, options):
    environment = {**os.environ, "GKACHAT_HOME": str(home), "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.data_prep", *options],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("train_00002"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert not read_manifest(home / "tokens" / "mirror-v512").complete
    result = call("data_prep", *options, home=home, HF_HOME=home / "hf")
    assert result.returncode == 0, result.stderr
    kept = [line.split()[0] for line in result.stdout.splitlines() if "was there" in line]
    assert {"train_00000", "train_00001", "train_00002"} <= set(kept)
    assert read_manifest(home / "tokens" / "mirror-v512").complete


def test_too_little_disk_is_said_before_anything_is_written(home, options):
    vast = [option.replace("max_chars=100000000", "max_chars=900000000000000") for option in options]
    result = call("data_prep", *vast, home=home, HF_HOME=home / "hf")
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("error: shards of 900,000,000,000,000")
    assert not (home / "tokens").exists()
