"""Tokenized corpora on disk: content, interruption, damage, full disks."""

import errno
import hashlib
import io
import json
import os
import random
import shutil
import stat
import threading

import numpy as np
import pytest

from gkachat import files
from gkachat.data.shards import MANIFEST, SPLITS, Split, read_manifest, write_shards
from gkachat.tokenizer import FILE_NAME, train_tokenizer
from scripts import data_prep, tok_train

SHARD_CHARS = 2000
SOURCE = {"source": "files", "files": ["a.txt"], "val_fraction": 0.25, "max_chars": None}


def made_up_text(rng):
    words = ["shard", "token", "déjà", "漢字", "\U0001f600", "<|bos|>", "1234", "\n\n", "    return x"]
    return " ".join(rng.choices(words, k=rng.choice([1, 10, 50, 150])))


RNG = random.Random(0)
DOCUMENTS = [("val" if i % 4 == 3 else "train", made_up_text(RNG)) for i in range(40)]
TOKENIZER = train_tokenizer([text for _, text in DOCUMENTS], 512)
OTHER_TOKENIZER = train_tokenizer(["another text " * 10], 512)


def write(directory, documents=DOCUMENTS, tokenizer=TOKENIZER, source=SOURCE, **options):
    return write_shards(documents, tokenizer, directory, source=source, shard_chars=SHARD_CHARS, **options)


def write_and_hear(directory, documents=DOCUMENTS, **options):
    """What progress heard: {name of a shard: was it there already}."""
    heard = {}
    write(directory, documents, progress=lambda shard, reused: heard.update({shard.name: reused}), **options)
    return heard


def open_(directory, split="train"):
    """All shards of a split, read."""
    shards = list(Split(directory, split, TOKENIZER))
    assert all(shard.tokens is not None for shard in shards)
    return shards


def texts_of(split):
    for shard in split:
        for start, length in zip(shard.start, shard.length, strict=True):
            yield TOKENIZER.decode(shard.tokens[start : start + length].tolist())


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def stopping_after(n, error=KeyboardInterrupt):
    """The documents, until something happens."""
    yield from DOCUMENTS[:n]
    raise error


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished corpus, to look at only."""
    directory = tmp_path_factory.mktemp("corpora") / "whole"
    write(directory, dropped=lambda: {"duplicate": 3})
    return directory


@pytest.fixture
def corpus(whole, tmp_path):
    """A finished corpus, to damage."""
    return shutil.copytree(whole, tmp_path / "corpus")


@pytest.mark.parametrize("split", ["train", "val"])
def test_documents_come_back_in_order(whole, split):
    opened = open_(whole, split)
    assert list(texts_of(opened)) == [text for s, text in DOCUMENTS if s == split]
    assert len(opened) > 1
    assert {shard.tokens.dtype for shard in opened} == {np.dtype(np.uint16)}


def test_no_special_token_is_stored(whole):
    assert all(shard.tokens.max() < TOKENIZER.bos for split in ("train", "val") for shard in open_(whole, split))


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_manifest_counts_what_is_there(whole, split):
    manifest, texts = read_manifest(whole), [text for s, text in DOCUMENTS if s == split]
    assert manifest.total(split, "documents") == len(texts)
    assert manifest.total(split, "bytes") == sum(len(text.encode()) for text in texts)
    assert manifest.total(split, "tokens") == sum(len(TOKENIZER.encode(text)) for text in texts)
    for shard in manifest.shards:
        assert (whole / f"{shard.name}.bin").stat().st_size == 2 * shard.tokens
        assert (whole / f"{shard.name}.idx").stat().st_size == 8 * (shard.documents + 1)


def test_the_manifest_says_where_the_corpus_is_from(whole):
    manifest = read_manifest(whole)
    assert manifest.complete
    assert manifest.source == SOURCE
    assert manifest.tokenizer_sha256 == TOKENIZER.sha256
    assert manifest.dropped == {"duplicate": 3}
    names = {f"{shard.name}.{suffix}" for shard in manifest.shards for suffix in ("bin", "idx")}
    assert {path.name for path in whole.iterdir()} == names | {MANIFEST}


def test_a_shard_ends_once_it_has_enough_characters(whole):
    manifest, texts = read_manifest(whole), [text for split, text in DOCUMENTS if split == "train"]
    shards = [shard for shard in manifest.shards if shard.split == "train"]
    assert [shard.name for shard in shards] == [f"train_{i:05d}" for i in range(len(shards))]
    for shard in shards:
        lengths = [len(text) for text in texts[: shard.documents]]
        texts = texts[shard.documents :]
        assert sum(lengths[:-1]) < SHARD_CHARS
        assert sum(lengths) >= SHARD_CHARS or shard is shards[-1]
    assert not texts


def test_val_shards_end_with_those_of_train(whole):
    documents = {split: [s.documents for s in read_manifest(whole).shards if s.split == split] for split in SPLITS}
    assert len(documents["train"]) > 2
    trained = np.cumsum(documents["train"])
    # Where the last of a train shard's documents stands in the source, and how many of val were met up to there.
    positions = [i for i, (split, _) in enumerate(DOCUMENTS) if split == "train"]
    met = [sum(split == "val" for split, _ in DOCUMENTS[: positions[n - 1]]) for n in trained[:-1]]
    assert list(np.cumsum(documents["val"])[:-1]) == met


def test_shards_are_read_while_later_ones_are_still_being_made(tmp_path, whole):
    expected = list(Split(whole, "train", TOKENIZER))
    begun, go_on = threading.Event(), threading.Event()

    def slowly():
        for number, document in enumerate(DOCUMENTS):
            if (tmp_path / "train_00000.bin").exists() and number < len(DOCUMENTS) - 1:
                begun.set()
                go_on.wait(30)
            yield document

    writer = threading.Thread(target=write, args=(tmp_path, slowly()))
    writer.start()
    assert begun.wait(30)
    split = Split(tmp_path, "train", TOKENIZER, patience=30)
    assert split.n_shards is None
    first = split.shard(0)
    assert np.array_equal(first.tokens, expected[0].tokens) and np.array_equal(first.start, expected[0].start)
    threading.Timer(0.5, go_on.set).start()
    assert [shard.tokens.tolist() for shard in split] == [shard.tokens.tolist() for shard in expected]
    assert split.n_shards == len(expected)
    writer.join()


def test_a_shard_that_does_not_come_is_missed_in_time(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, stopping_after(39))
    split = Split(tmp_path, "train", TOKENIZER, patience=0.1)
    with pytest.raises(TimeoutError, match=r"no train_\d+ after 0 s of waiting; is scripts\.data_prep running\?"):
        list(split)


def test_a_shard_that_changes_while_it_is_in_use_is_an_error(corpus):
    split = Split(corpus, "train", TOKENIZER)
    first = split.shard(0)
    flip("train_00000.bin")(corpus)
    with pytest.raises(ValueError, match=r"train_00000\.bin does not match the hash in its manifest; run"):
        first.tokens  # noqa: B018


@pytest.mark.parametrize(
    ("suffix", "number", "value", "message"),
    [("idx", 1, 2**40, "do not rise"), ("idx", 0, 1, "do not rise"), ("bin", 3, 60_000, "token 60000 is not in the")],
)
def test_a_hostile_shard_with_a_manifest_to_match_is_an_error(corpus, suffix, number, value, message):
    path = corpus / f"train_00000.{suffix}"
    numbers = np.frombuffer(path.read_bytes(), np.uint64 if suffix == "idx" else np.uint16).copy()
    numbers[number] = value
    path.write_bytes(numbers.tobytes())
    manifest = json.loads((corpus / MANIFEST).read_text())
    record = next(shard for shard in manifest["shards"] if shard["name"] == "train_00000")
    record[f"{suffix}_sha256"] = hashlib.sha256(numbers.tobytes()).hexdigest()
    (corpus / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        open_(corpus)


def test_the_number_of_threads_makes_no_difference(whole, tmp_path):
    write(tmp_path / "one", threads=1, dropped=lambda: {"duplicate": 3})
    assert content(tmp_path / "one") == content(whole)


@pytest.mark.parametrize("reread", [False, True])
def test_a_second_run_keeps_every_shard_and_changes_nothing(tmp_path, reread):
    assert not any(write_and_hear(tmp_path).values())
    before, inodes = content(tmp_path), {path.name: path.stat().st_ino for path in tmp_path.glob("*_*")}
    heard = write_and_hear(tmp_path, reread=reread)
    assert len(heard) == len(read_manifest(tmp_path).shards)
    assert all(heard.values())
    assert content(tmp_path) == before
    assert {path.name: path.stat().st_ino for path in tmp_path.glob("*_*")} == inodes


@pytest.mark.parametrize("n", [0, 1, 10, 25, 39, 40])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, n):
    write(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "stopped", stopping_after(n))
    finished = {path.stem for path in (tmp_path / "stopped").glob("*.bin")}
    assert bool(finished) == (n > 10)
    if finished:
        assert not read_manifest(tmp_path / "stopped").complete

    heard = write_and_hear(tmp_path / "stopped")
    assert {name for name, reused in heard.items() if reused} == finished
    assert content(tmp_path / "stopped") == content(tmp_path / "straight")


def test_a_second_interruption_loses_no_finished_shard(tmp_path):
    for n in (39, 25):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "stopped", stopping_after(n))
    finished = {path.stem for path in (tmp_path / "stopped").glob("*.bin")}
    assert len(finished) >= 3
    heard = write_and_hear(tmp_path / "stopped")
    assert {name for name, reused in heard.items() if reused} == finished
    write(tmp_path / "straight")
    assert content(tmp_path / "stopped") == content(tmp_path / "straight")


def test_what_is_complete_is_read_again_only_when_asked(corpus):
    manifest = read_manifest(corpus)
    assert write(corpus, stopping_after(0, error=RuntimeError)) == manifest
    with pytest.raises(KeyboardInterrupt):
        write(corpus, stopping_after(0), reread=True)
    remove("train_00001.bin")(corpus)
    with pytest.raises(KeyboardInterrupt):
        write(corpus, stopping_after(0))


@pytest.mark.parametrize(
    "change",
    [lambda before, last: (before, "changed " * 20), lambda before, last: (before + last[0], last[1:])],
    ids=["another text", "another boundary"],
)
def test_only_shards_whose_text_has_changed_are_made_anew(corpus, change):
    documents = list(DOCUMENTS)
    changed = change(documents[-3][1], documents[-2][1])
    documents[-3:-1] = (("train", text) for text in changed)
    heard = write_and_hear(corpus, documents, reread=True)
    last = max(name for name in heard if name.startswith("train"))
    assert {name for name, reused in heard.items() if not reused} == {last}
    assert tuple(texts_of(open_(corpus)))[-2:] == changed


def flip(name):
    def damage(directory):
        data = bytearray((directory / name).read_bytes())
        data[len(data) // 2] ^= 1
        (directory / name).write_bytes(data)

    return damage


def cut(name):
    def damage(directory):
        (directory / name).write_bytes((directory / name).read_bytes()[:-2])

    return damage


def remove(name):
    return lambda directory: (directory / name).unlink()


DAMAGE = {
    "a flipped bit in a bin": (flip("train_00001.bin"), r"train_00001\.bin does not match the hash"),
    "a flipped bit in an idx": (flip("train_00001.idx"), r"train_00001\.idx does not match the hash"),
    "a truncated bin": (cut("train_00001.bin"), r"train_00001\.bin has \d+ bytes, its manifest says \d+"),
    "a truncated idx": (cut("train_00001.idx"), r"train_00001\.idx has \d+ bytes, its manifest says \d+"),
    "a missing bin": (remove("train_00001.bin"), r"train_00001\.bin is missing"),
    "a missing idx": (remove("train_00001.idx"), r"train_00001\.idx is missing"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_shard_is_named_and_mended(corpus, damage, message):
    before = content(corpus)
    damage(corpus)
    with pytest.raises(ValueError, match=message + r".*; run scripts\.data_prep again to mend it$"):
        open_(corpus)
    open_(corpus, "val")

    heard = write_and_hear(corpus, dropped=lambda: {"duplicate": 3})
    assert [name for name, reused in heard.items() if not reused] == ["train_00001"]
    assert content(corpus) == before


def edited(**changes):
    return lambda text: json.dumps(json.loads(text) | changes)


def with_shard(**changes):
    def edit(text):
        tree = json.loads(text)
        tree["shards"][0] |= changes
        return json.dumps(tree)

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"shards"', '"shard"'),
        edited(unheard_of=1),
        edited(shards=None),
        edited(shards=[{}]),
        with_shard(tokens="many"),
        with_shard(colour="red"),
    ],
)
def test_a_damaged_manifest_is_named(corpus, edit):
    path = corpus / MANIFEST
    path.write_text(edit(path.read_text()))
    for read in (open_, write):
        with pytest.raises(ValueError, match=r"manifest\.json is damaged .*; delete it and run scripts\.data_prep"):
            read(corpus)


def test_a_corpus_without_a_manifest_is_made_anew(corpus):
    before = content(corpus)
    (corpus / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenized corpus at .*scripts\.data_prep"):
        open_(corpus)
    write(corpus, dropped=lambda: {"duplicate": 3})
    assert content(corpus) == before


def test_an_incomplete_corpus_is_not_opened(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, stopping_after(39))
    with pytest.raises(ValueError, match=r"is not complete; run scripts\.data_prep again"):
        open_(tmp_path)


def test_a_corpus_of_another_tokenizer_is_not_opened(whole):
    with pytest.raises(ValueError, match="made with another tokenizer"):
        Split(whole, "train", OTHER_TOKENIZER)


@pytest.mark.parametrize("other", [{"tokenizer": OTHER_TOKENIZER}, {"source": SOURCE | {"val_fraction": 0.5}}])
def test_a_directory_of_another_source_or_tokenizer_is_left_alone(corpus, other):
    before = content(corpus)
    with pytest.raises(ValueError, match="made from another source or tokenizer"):
        write(corpus, **other)
    assert content(corpus) == before


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_split_is_an_error(tmp_path, split):
    with pytest.raises(ValueError, match=f"the {split} split is empty"):
        write(tmp_path, [(s, text) for s, text in DOCUMENTS if s != split])
    with pytest.raises(ValueError, match="is not complete"):
        open_(tmp_path)


@pytest.fixture(params=["write", "fsync", "replace"])
def full_disk(request, monkeypatch):
    """Makes every write after the first few meet a full disk, at one of its stages."""

    def fill(after):
        def fail():
            nonlocal after
            after -= 1
            if after < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        class File(io.BufferedWriter):
            def write(self, data):
                super().write(data[: len(data) // 2])
                fail()
                return super().write(data[len(data) // 2 :])

        def instead_of(function):
            def failing(*args):
                # Flushing a directory is no write of a file.
                if request.param != "fsync" or not stat.S_ISDIR(os.fstat(args[0]).st_mode):
                    fail()
                return function(*args)

            return failing

        if request.param == "write":

            def open_file(path, mode):
                return File(io.FileIO(path, mode)) if "w" in mode else open(path, mode)

            monkeypatch.setattr(files, "open", open_file, raising=False)
        else:
            monkeypatch.setattr(os, request.param, instead_of(getattr(os, request.param)))

    yield fill
    monkeypatch.undo()


def test_a_full_disk_leaves_the_old_file(tmp_path, full_disk):
    path = tmp_path / "file"
    files.write_text(path, "old")
    full_disk(after=1)
    files.write_text(path, "new")
    with pytest.raises(OSError, match=r"cannot write .*/file: No space left on device; what stood there .*untouched"):
        files.write_text(path, "newer")
    assert content(tmp_path) == {"file": b"new"}


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    files.write_text(tmp_path / "file", "old")
    with pytest.raises(KeyError), files.atomic_write(tmp_path / "file") as file:
        file.write(b"half of the n")
        raise KeyError
    assert content(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("after", [0, 1, 2, 3, 10])
def test_a_full_disk_leaves_whole_shards_to_go_on_from(tmp_path, whole, full_disk, monkeypatch, after):
    full_disk(after)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path)
    left = content(tmp_path)
    assert len(left) == after - max(0, after // 3 - 1)  # of three files a shard, the manifest is the same each time
    if left.pop(MANIFEST, None):
        assert not read_manifest(tmp_path).complete
    assert left.items() <= content(whole).items()

    monkeypatch.undo()
    write(tmp_path, dropped=lambda: {"duplicate": 3})
    assert content(tmp_path) == content(whole)


@pytest.mark.parametrize(("after", "file"), [(0, "train_00001.bin"), (1, "train_00001.idx"), (2, MANIFEST)])
def test_a_full_disk_while_mending_leaves_everything_else(corpus, whole, full_disk, monkeypatch, after, file):
    remove("train_00001.bin")(corpus)
    before = content(corpus)
    # Manifests are written for the shards before this one, too.
    ahead = [shard.name for shard in read_manifest(corpus).shards].index("train_00001")
    full_disk(ahead + after)
    with pytest.raises(OSError, match=f"cannot write .*/{file}: No space left"):
        write(corpus)
    left = content(corpus)
    before.pop(MANIFEST), left.pop(MANIFEST)
    assert before.items() <= left.items() <= content(whole).items()
    assert not read_manifest(corpus).complete

    monkeypatch.undo()
    write(corpus, dropped=lambda: {"duplicate": 3})
    assert content(corpus) == content(whole)


def test_a_full_disk_at_the_first_file_that_is_mended_leaves_the_manifest(corpus, full_disk):
    remove("train_00000.bin")(corpus)
    before = content(corpus)
    full_disk(after=0)
    with pytest.raises(OSError, match=r"cannot write .*/train_00000\.bin"):
        write(corpus)
    assert content(corpus) == before


def test_data_prep_mends_a_corpus(tmp_path, monkeypatch, capsys):
    texts = [f"document {i}: " + "kept in a shard " * 10 for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[0], ""]))
    monkeypatch.setenv("GKACHAT_HOME", str(tmp_path))
    options = ["--data.source=files", "--data.name=mine", "--data.val_fraction=0.2", "--data.shard_chars=4096"]
    monkeypatch.setattr("sys.argv", ["", *options, f"--data.files={tmp_path}/*.jsonl", "--tokenizer.vocab_size=512"])
    tok_train.main()
    data_prep.main()
    assert (tmp_path / "tokenizer" / "mine-v512" / FILE_NAME).exists()
    directory = tmp_path / "tokens" / "mine-v512"
    before = content(directory)
    assert read_manifest(directory).dropped == {"near_empty": 1, "duplicate": 1, "not_utf8": 0}
    assert capsys.readouterr().out.endswith("dropped: 1 near empty, 1 duplicate, 0 not utf8\n")

    flip("train_00001.bin")(directory)
    data_prep.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if "_0" in line]
    assert [line.split()[0] for line in lines if "was there" not in line] == ["train_00001"]
    assert len(lines) == len(read_manifest(directory).shards) > 2
    assert content(directory) == before
