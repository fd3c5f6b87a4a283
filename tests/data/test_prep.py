"""scripts.data_prep from end to end, on a local mirror laid out as a Hugging Face dataset of parquet files."""

import codecs
import json
import os
import random
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

from gkachat.data.shards import SPLITS, Split, read_manifest
from gkachat.files import lock
from gkachat.tokenizer import FILE_NAME, Tokenizer
from scripts import data_prep, tok_train

WORDS = ["river", "stone", "lantern", "orchard", "gravel", "summit", "harbour", "meadow", "cellar", "bridge"]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """1,200 documents in four files, as in karpathy/climbmix-400b-shuffle: shard_00000.parquet with a column `text`."""
    directory = tmp_path_factory.mktemp("mirror")
    for shard in range(4):
        texts = [f"{shard} {i} " + " ".join(random.Random(i).choices(WORDS, k=400)) for i in range(300)]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), directory / f"shard_{shard:05d}.parquet")
    return directory


@pytest.fixture
def run(mirror, tmp_path, monkeypatch):
    """Function that calls a script's main with the options of the mirror, or with others."""
    monkeypatch.setenv("GKACHAT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    options = [
        "--data.source=huggingface", f"--data.dataset={mirror}", "--data.name=mirror", "--data.shard_chars=200000",
        "--data.max_chars=100000000", "--tokenizer.vocab_size=512", "--tokenizer.train_chars=200000",
    ]  # fmt: skip

    def run(script, *more):
        monkeypatch.setattr("sys.argv", [script.__name__, *options, *more])
        script.main()

    run.options, run.home = options, tmp_path / "home"
    run.tokens = run.home / "tokens" / "mirror-v512"
    return run


def test_after_a_kill_no_finished_shard_is_tokenized_again(run, capsys):
    run(tok_train)
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.data_prep", *run.options],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    assert "GiB are free at" in process.stdout.readline()
    for line in process.stdout:
        if line.startswith("train_00002"):
            process.kill()
            break
    process.wait()
    assert not read_manifest(run.tokens).complete
    run(data_prep)
    reused = {line.split()[0] for line in capsys.readouterr().out.splitlines() if "was there" in line}
    assert {"train_00000", "train_00001", "train_00002"} <= reused
    manifest = read_manifest(run.tokens)
    assert manifest.complete and manifest.total("train", "documents") + manifest.total("val", "documents") == 1200


def test_too_little_disk_is_an_error_before_anything_is_written(run):
    run(tok_train)
    with pytest.raises(OSError, match=r"shards of 900,000,000,000,000 characters take about .* set GKACHAT_HOME"):
        run(data_prep, "--data.max_chars=900000000000000")
    assert not (run.home / "tokens").exists()


def test_a_corpus_that_another_process_writes_is_left_alone(run):
    run(tok_train)
    with (
        lock(run.tokens, busy=""),
        pytest.raises(FileExistsError, match=r"mirror-v512 is being written by another scripts\.data_prep"),
    ):
        run(data_prep)
    assert not run.tokens.exists()
    run(data_prep)
    assert read_manifest(run.tokens).complete


def test_a_damaged_corpus_of_files_is_repaired(run, tmp_path, capsys):
    texts = [f"document {i}: " + "kept in a shard " * 10 for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[0], ""]))
    options = ["--data.source=files", "--data.name=mine", "--data.val_fraction=0.2", "--data.shard_chars=4096"]
    options.append(f"--data.files={tmp_path}/*.jsonl")
    run(tok_train, *options)
    run(data_prep, *options)
    assert (run.home / "tokenizer" / "mine-v512" / FILE_NAME).exists()
    directory = run.home / "tokens" / "mine-v512"
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert read_manifest(directory).dropped == {"near_empty": 1, "duplicate": 1, "not_utf8": 0, "null": 0}
    assert capsys.readouterr().out.endswith("dropped: 1 near empty, 1 duplicate, 0 not utf8, 0 null\n")

    (directory / "train_00001.bin").write_bytes(bytes(len(before["train_00001.bin"])))
    run(data_prep, *options)
    lines = [line for line in capsys.readouterr().out.splitlines() if "_0" in line]
    assert [line.split()[0] for line in lines if "was there" not in line] == ["train_00001"]
    assert len(lines) == len(read_manifest(directory).shards) > 2
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_files_that_were_added_are_named_and_read_when_asked(run, tmp_path, capsys):
    def add(name):
        (tmp_path / name).write_text("\n".join(f"line {i} of {name}" for i in range(200)))

    options = ["--data.source=files", "--data.name=mine", f"--data.files={tmp_path}/*.txt"]
    add("a.txt")
    run(tok_train, *options)
    run(data_prep, *options)
    assert "the source was not read again" not in capsys.readouterr().out
    run(data_prep, *options)
    line = "all of it was there: the source was not read again; --reread does that"
    assert f"{line}\n" in capsys.readouterr().out
    add("b.txt")
    run(data_prep, *options)
    assert f"{line}, and data.files has changed: 1 files then, 2 now\n" in capsys.readouterr().out
    run(data_prep, *options, "--reread")
    assert "not read again" not in capsys.readouterr().out
    for path in tmp_path.glob("*.txt"):  # nobody needs them now
        path.unlink()
    run(data_prep, *options)
    assert f"{line}\n" in capsys.readouterr().out


@pytest.fixture
def mine(run, tmp_path):
    """Function that calls a script's main on files of one's own."""
    options = ["--data.source=files", "--data.name=mine", f"--data.files={tmp_path}/input.txt"]
    return lambda script, *more: run(script, *options, *more)


def test_one_text_file_is_a_corpus_with_both_splits(run, mine, tmp_path, capsys):
    text = "at first no other line comes\n" * 1000  # more than tokenizer.doc_chars
    text += "".join(f"{' '.join(random.Random(i).choices(WORDS, k=9))}\n" for i in range(2000))
    (tmp_path / "input.txt").write_bytes(codecs.BOM_UTF8 + text.encode())
    mine(tok_train)
    mine(data_prep)
    assert "the last was cut at a line end into train and val" in capsys.readouterr().out
    tokenizer, directory = Tokenizer.load(run.home / "tokenizer" / "mine-v512"), run.home / "tokens" / "mine-v512"
    train, val = (next(iter(Split(directory, split, tokenizer))).tokens for split in SPLITS)
    assert tokenizer.decode([*train, *val]) == text
    assert 0.5 < len(val) / (0.01 * len(train)) < 2
    assert [word in text and len(tokenizer.encode(f" {word}")) == 1 for word in WORDS] == [True] * len(WORDS)


def test_a_failed_preparation_is_not_in_the_way_of_another(run, mine, tmp_path):
    lines = [json.dumps({"text": f"{i} {' '.join(WORDS)}"}) for i in range(300)]
    (tmp_path / "input.txt").write_text("words to learn from " * 9)
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{"]))
    mine(tok_train)
    options = [f"--data.files={tmp_path}/a.jsonl", "--data.shard_chars=2000"]
    with pytest.raises(ValueError, match="line 301: not JSON"):
        mine(data_prep, *options)
    directory = run.home / "tokens" / "mine-v512"
    assert len(read_manifest(directory).shards) > 3
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    mine(data_prep, *options, "--data.val_fraction=0.2", "--data.shard_chars=6000")
    manifest = read_manifest(directory)
    assert manifest.complete and manifest.source["val_fraction"] == 0.2
    assert {path.stem for path in directory.glob("*_*")} == {shard.name for shard in manifest.shards}


def test_the_advice_after_another_tokenizer_or_option_works(run, mine, tmp_path, capsys):
    (tmp_path / "input.txt").write_text("\n".join(WORDS) * 30)
    mine(tok_train)
    mine(data_prep)
    (tmp_path / "input.txt").write_text("\n".join(reversed(WORDS)) * 30)
    mine(tok_train, "--overwrite")
    assert "scripts.data_prep --reread makes it again" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"\(tokenizer: given '\w{12}', it has '\w{12}'\): give --reread"):
        mine(data_prep)
    tokenizer, directory = Tokenizer.load(run.home / "tokenizer" / "mine-v512"), run.home / "tokens" / "mine-v512"
    with pytest.raises(ValueError, match=r"another tokenizer .*data_prep --reread .* the one in tokenizer/mine-v512"):
        Split(directory, "train", tokenizer)
    mine(data_prep, "--reread")
    Split(directory, "train", tokenizer)
    with pytest.raises(ValueError, match=r"\(data\.val_fraction: given 0\.5, it has 0\.01\): give --reread"):
        mine(data_prep, "--data.val_fraction=0.5")
    mine(data_prep, "--data.val_fraction=0.5", "--reread")
    assert read_manifest(directory).source["val_fraction"] == 0.5
