"""Tokenized corpora on disk: content, interruption, damage, full disks."""

import errno
import hashlib
import io
import json
import os
import random
import shutil
import threading

import numpy as np
import pytest

from gkachat import files
from gkachat.data.shards import MANIFEST, SPLITS, Split, read_manifest, write_shards
from gkachat.tokenizer import train_tokenizer

SHARD_CHARS = 2000
SOURCE = {"source": "files", "files": ["a.txt"], "val_fraction": 0.25, "max_chars": None}
DROPPED = {"duplicate": 3}


def random_text(rng):
    words = ["shard", "token", "déjà", "漢字", "\U0001f600", "<|bos|>", "1234", "\n\n", "    return x"]
    return " ".join(rng.choices(words, k=rng.choice([1, 10, 50, 150])))


RNG = random.Random(0)
DOCUMENTS = [("val" if i % 4 == 3 else "train", random_text(RNG)) for i in range(40)]
TOKENIZER = train_tokenizer([text for _, text in DOCUMENTS], 512)
OTHER_TOKENIZER = train_tokenizer(["another text " * 10], 512)


def write(directory, documents=DOCUMENTS, tokenizer=TOKENIZER, source=SOURCE, **options):
    """Write shards, and return whether each was reused."""
    options |= {"source": source, "shard_chars": SHARD_CHARS, "dropped": lambda: DROPPED}
    return {shard.name: reused for shard, reused in write_shards(documents, tokenizer, directory, **options)}


def read(directory, split="train"):
    """All shards of a split, with their tokens."""
    shards = list(Split(directory, split, TOKENIZER))
    assert all(shard.tokens is not None for shard in shards)
    return shards


def texts_of(shards):
    for shard in shards:
        for start, length in zip(shard.start, shard.length, strict=True):
            yield TOKENIZER.decode(shard.tokens[start : start + length].tolist())


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def documents_until(n, error=KeyboardInterrupt):
    yield from DOCUMENTS[:n]
    raise error


def write_interrupted(directory, n):
    with pytest.raises(KeyboardInterrupt):
        write(directory, documents_until(n))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished corpus that no test changes."""
    directory = tmp_path_factory.mktemp("corpora") / "whole"
    write(directory)
    return directory


@pytest.fixture
def corpus(whole, tmp_path):
    """A finished corpus to damage."""
    return shutil.copytree(whole, tmp_path / "corpus")


@pytest.mark.parametrize("split", SPLITS)
def test_documents_come_back_in_order_without_special_tokens(whole, split):
    shards, texts = read(whole, split), [text for s, text in DOCUMENTS if s == split]
    assert list(texts_of(shards)) == texts and len(shards) > 1
    assert all(shard.tokens.dtype == np.uint16 and shard.tokens.max() < TOKENIZER.bos for shard in shards)


def test_the_manifest_describes_the_source_and_every_file(whole):
    manifest = read_manifest(whole)
    assert (manifest.complete, manifest.source, manifest.dropped) == (True, SOURCE, DROPPED)
    assert manifest.tokenizer_sha256 == TOKENIZER.sha256
    sizes = {f"{shard.name}.bin": 2 * shard.tokens for shard in manifest.shards}
    sizes |= {f"{shard.name}.idx": 8 * (shard.documents + 1) for shard in manifest.shards}
    assert {path.name: path.stat().st_size for path in whole.glob("*_*")} == sizes
    for split in SPLITS:
        texts = [text for s, text in DOCUMENTS if s == split]
        assert manifest.total(split, "documents") == len(texts)
        assert manifest.total(split, "bytes") == sum(len(text.encode()) for text in texts)
        assert manifest.total(split, "tokens") == sum(len(TOKENIZER.encode(text)) for text in texts)


def test_a_train_shard_ends_at_shard_chars_and_its_val_shard_with_it(whole):
    shards = read_manifest(whole).shards
    train = [shard for shard in shards if shard.split == "train"]
    positions = [i for i, (split, _) in enumerate(DOCUMENTS) if split == "train"]
    first, met = 0, []
    for number, shard in enumerate(train):
        assert shard.name == f"train_{number:05d}"
        lengths = [len(DOCUMENTS[i][1]) for i in positions[first : first + shard.documents]]
        first += shard.documents
        assert sum(lengths[:-1]) < SHARD_CHARS and (sum(lengths) >= SHARD_CHARS or shard is train[-1])
        met.append(sum(split == "val" for split, _ in DOCUMENTS[: positions[first - 1]]))
    val = np.cumsum([shard.documents for shard in shards if shard.split == "val"])
    assert list(val[:-1]) == met[:-1]


def test_shards_are_read_while_later_ones_are_being_written(tmp_path, whole):
    expected = read(whole)
    first_is_written, go_on = threading.Event(), threading.Event()

    def slow_documents():
        for number, document in enumerate(DOCUMENTS):
            if (tmp_path / "train_00000.bin").exists() and number < len(DOCUMENTS) - 1:
                first_is_written.set()
                go_on.wait(30)
            yield document

    writer = threading.Thread(target=write, args=(tmp_path, slow_documents()))
    writer.start()
    assert first_is_written.wait(30)
    split = Split(tmp_path, "train", TOKENIZER, timeout=30)
    assert split.n_shards is None
    first = split.shard(0)
    assert np.array_equal(first.tokens, expected[0].tokens) and np.array_equal(first.start, expected[0].start)
    go_on.set()
    assert [shard.tokens.tolist() for shard in split] == [shard.tokens.tolist() for shard in expected]
    assert split.n_shards == len(expected)
    writer.join()


def test_the_next_shard_is_read_while_one_is_tokenized(tmp_path):
    """Tokenizing the first shard takes until the second is read."""
    second_is_read = threading.Event()

    class Slow:
        sha256 = TOKENIZER.sha256

        def encode_to_numpy(self, text):
            assert second_is_read.wait(30), "the second shard is not read"
            return TOKENIZER.encode_to_numpy(text)

    def documents():
        yield "train", "first " * SHARD_CHARS
        yield "val", "held out"
        second_is_read.set()
        yield "train", "second " * SHARD_CHARS
        yield "val", "held out as well"

    assert len(write(tmp_path, documents(), Slow())) == 4


def test_an_incomplete_corpus_is_waited_for_only_within_the_timeout(tmp_path):
    write_interrupted(tmp_path, 39)
    with pytest.raises(ValueError, match=r"is not complete; run scripts\.data_prep again"):
        read(tmp_path)
    with pytest.raises(TimeoutError, match=r"no train_\d+ after 0 s of waiting; is scripts\.data_prep running\?"):
        list(Split(tmp_path, "train", TOKENIZER, timeout=0.1))


@pytest.mark.parametrize("interruptions", [[0], [10], [25], [40], [39, 25]])
def test_an_interrupted_run_continues_with_all_finished_shards(tmp_path, whole, interruptions):
    for n in interruptions:
        write_interrupted(tmp_path, n)
    finished = {path.stem for path in tmp_path.glob("*.bin")}
    assert bool(finished) == (interruptions[0] > 10)
    assert not finished or not read_manifest(tmp_path).complete
    assert {name for name, reused in write(tmp_path).items() if reused} == finished
    assert content(tmp_path) == content(whole)


def test_a_complete_corpus_is_read_again_only_when_asked_or_damaged(corpus):
    before, inodes = content(corpus), {path.name: path.stat().st_ino for path in corpus.glob("*_*")}
    for reused in (write(corpus, documents_until(0, error=RuntimeError)), write(corpus, reread=True)):
        assert len(reused) == len(read_manifest(corpus).shards) and all(reused.values())
    assert content(corpus) == before
    assert {path.name: path.stat().st_ino for path in corpus.glob("*_*")} == inodes
    with pytest.raises(RuntimeError):
        write(corpus, documents_until(0, error=RuntimeError), reread=True)
    (corpus / "train_00001.bin").unlink()
    with pytest.raises(RuntimeError):
        write(corpus, documents_until(0, error=RuntimeError))


@pytest.mark.parametrize(
    "change",
    [lambda before, last: (before, "changed " * 20), lambda before, last: (before + last[0], last[1:])],
    ids=["another text", "another boundary"],
)
def test_only_shards_whose_text_has_changed_are_replaced(corpus, change):
    documents = list(DOCUMENTS)
    changed = change(documents[-3][1], documents[-2][1])
    documents[-3:-1] = (("train", text) for text in changed)
    reused = write(corpus, documents, reread=True)
    last = max(name for name in reused if name.startswith("train"))
    assert [name for name in reused if not reused[name]] == [last]
    assert tuple(texts_of(read(corpus)))[-2:] == changed


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "does not match the hash in its manifest"),
        (cut, r"has \d+ bytes, its manifest says \d+"),
        (os.unlink, "is missing"),
    ],
)
def test_a_damaged_shard_is_named_and_repaired(corpus, suffix, damage, message):
    before = content(corpus)
    damage(corpus / f"train_00001.{suffix}")
    with pytest.raises(ValueError, match=rf"train_00001\.{suffix} {message}; run scripts\.data_prep again to repair"):
        read(corpus)
    read(corpus, "val")
    reused = write(corpus)
    assert [name for name in reused if not reused[name]] == ["train_00001"]
    assert content(corpus) == before


def test_a_shard_that_changes_while_it_is_in_use_is_an_error(corpus):
    first = Split(corpus, "train", TOKENIZER).shard(0)
    flip(corpus / "train_00000.bin")
    with pytest.raises(ValueError, match=r"train_00000\.bin does not match the hash in its manifest; run"):
        first.tokens  # noqa: B018


@pytest.mark.parametrize(
    ("suffix", "number", "value", "message"),
    [("idx", 1, 2**40, "do not rise"), ("idx", 0, 1, "do not rise"), ("bin", 3, 60_000, "token 60000 is not in the")],
)
def test_a_bad_shard_with_hashes_to_match_is_an_error(corpus, suffix, number, value, message):
    path = corpus / f"train_00000.{suffix}"
    numbers = np.frombuffer(path.read_bytes(), np.uint64 if suffix == "idx" else np.uint16).copy()
    numbers[number] = value
    path.write_bytes(numbers.tobytes())
    manifest = json.loads((corpus / MANIFEST).read_text())
    record = next(shard for shard in manifest["shards"] if shard["name"] == "train_00000")
    record[f"{suffix}_sha256"] = hashlib.sha256(numbers.tobytes()).hexdigest()
    (corpus / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        read(corpus)


def manifest_with(shard=None, **changes):
    def edit(text):
        tree = json.loads(text) | changes
        if shard:
            tree["shards"][0] |= shard
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
        manifest_with(unheard_of=1),
        manifest_with(shards=None),
        manifest_with(shards=[{}]),
        manifest_with(shard={"tokens": "many"}),
        manifest_with(shard={"colour": "red"}),
    ],
)
def test_a_damaged_manifest_is_named(corpus, edit):
    path = corpus / MANIFEST
    path.write_text(edit(path.read_text()))
    for use in (read, write):
        with pytest.raises(ValueError, match=r"manifest\.json is damaged .*; delete it and run scripts\.data_prep"):
            use(corpus)


def test_a_corpus_without_a_manifest_is_written_again(corpus, whole):
    (corpus / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenized corpus at .*scripts\.data_prep"):
        read(corpus)
    assert not any(write(corpus).values())
    assert content(corpus) == content(whole)


@pytest.mark.parametrize("other", [{"tokenizer": OTHER_TOKENIZER}, {"source": SOURCE | {"val_fraction": 0.5}}])
def test_a_directory_of_another_source_or_tokenizer_is_left_alone(corpus, whole, other):
    with pytest.raises(ValueError, match="made from another source or tokenizer"):
        write(corpus, **other)
    assert content(corpus) == content(whole)
    with pytest.raises(ValueError, match="made with another tokenizer"):
        Split(corpus, "train", OTHER_TOKENIZER)


@pytest.mark.parametrize("split", SPLITS)
def test_an_empty_split_is_an_error(tmp_path, split):
    with pytest.raises(ValueError, match=f"the {split} split is empty"):
        write(tmp_path, [(s, text) for s, text in DOCUMENTS if s != split])
    with pytest.raises(ValueError, match="is not complete"):
        read(tmp_path)


class FullFile(io.BytesIO):
    """File on a full disk, of which only a part is written."""

    def __init__(self, path, mode):
        path.write_bytes(b"part")

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full_disk(monkeypatch):
    """Function that lets the next `after` files be written, and has all others meet a full disk."""

    def fill(after):
        left = iter(range(after))
        monkeypatch.setattr(
            files, "open", lambda *args: (open if next(left, None) is not None else FullFile)(*args), raising=False
        )
        monkeypatch.setattr(files, "flush", lambda path: None)  # opens a directory, which is no file to be written

    yield fill
    monkeypatch.undo()


@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, full_disk, monkeypatch, stage):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    files.write_text(path, "old")
    if stage == "write":
        full_disk(after=0)
    else:
        monkeypatch.setattr(os, stage, fail)
    with pytest.raises(OSError, match=r"cannot write .*/file: No space left on device"):
        files.write_text(path, "new")
    assert content(tmp_path) == {"file": b"old"}


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    files.write_text(tmp_path / "file", "old")
    with pytest.raises(KeyError), files.atomic_write(tmp_path / "file") as file:
        file.write(b"half of the n")
        raise KeyError
    assert content(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("after", [0, 1, 2, 3, 10])
def test_a_full_disk_leaves_whole_shards_to_continue_from(tmp_path, whole, full_disk, monkeypatch, after):
    full_disk(after)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path)
    left = content(tmp_path)
    assert len(left) == after - max(0, after // 3 - 1)  # a shard is three writes, the third always of the manifest
    if left.pop(MANIFEST, None):
        assert not read_manifest(tmp_path).complete
    assert left.items() <= content(whole).items()
    monkeypatch.undo()
    write(tmp_path)
    assert content(tmp_path) == content(whole)


@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize(("after", "name"), [(0, "train_0000{}.bin"), (1, "train_0000{}.idx"), (2, MANIFEST)])
def test_a_full_disk_during_a_repair_leaves_everything_else(corpus, whole, full_disk, monkeypatch, shard, after, name):
    (corpus / f"train_0000{shard}.bin").unlink()
    before = content(corpus)
    n_before = [s.name for s in read_manifest(corpus).shards].index(f"train_0000{shard}")  # each writes a manifest
    full_disk(n_before + after)
    with pytest.raises(OSError, match=f"cannot write .*/{name.format(shard)}: No space left"):
        write(corpus)
    left = content(corpus)
    assert n_before or left[MANIFEST] == before[MANIFEST]
    assert not n_before or not read_manifest(corpus).complete
    before.pop(MANIFEST), left.pop(MANIFEST)
    assert before.items() <= left.items() <= content(whole).items()
    monkeypatch.undo()
    write(corpus)
    assert content(corpus) == content(whole)
