"""Conversations are tokenized once, whoever needs them."""

import os
import threading
import time

import numpy as np
import pytest
from filelock import FileLock

from gkachat.config import ChatConfig
from gkachat.data import tuning
from gkachat.data.conversations import load_conversations, tokenize_conversations
from gkachat.tokenizer import Tokenizer

FACTS = {"attention": "softmax", "parameters": "10", "depth": "2"}
CONFIG = ChatConfig(conversations=300)


@pytest.fixture
def tokenizer(corpus_home):
    return Tokenizer.load(corpus_home / "tokenizer" / "python-source-v512")


@pytest.fixture
def read(tmp_path, tokenizer, monkeypatch):
    """Prepares conversations; `read.times` says how often their source was read."""
    lock = threading.Lock()

    def load(*args):
        with lock:
            read.times += 1
        return load_conversations(*args)

    def read(config=CONFIG, seed=1, facts=FACTS, tokenizer=tokenizer, sequence_len=128):
        return tuning.prepare(tmp_path / "conversations", config, seed, facts, tokenizer, sequence_len)

    read.times, read.directory = 0, tmp_path / "conversations"
    read.key = lambda: tuning._key(CONFIG, 1, FACTS, tokenizer, 128)
    monkeypatch.setattr(tuning, "load_conversations", load)
    return read


def test_many_readers_share_one_that_tokenizes_and_find_what_it_made(read, tokenizer):
    expected, counts = tokenize_conversations(load_conversations(CONFIG, 1, FACTS), tokenizer, 128, 0.05)
    found = []
    threads = [threading.Thread(target=lambda: found.append(read())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read.times == 1 and len(found) == 4
    for splits, counted in found:
        assert counted == counts
        for name, split in expected.items():
            one, other = split.documents, splits[name].documents
            assert isinstance(other.tokens, np.memmap)
            for what in ("start", "length", "tokens", "loss_mask", "n_targets"):
                assert np.array_equal(getattr(one, what), getattr(other, what))


def test_what_the_tokens_depend_on_makes_other_files_and_nothing_else_does(read, tmp_path, corpus_home):
    talk = '{"messages": [{"role": "user", "content": "%d?"}, {"role": "assistant", "content": "yes"}]}\n'
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(talk % n for n in range(100)))
    files = ChatConfig(source="files", files=(str(file),))
    for options, times in [
        ({}, 1), ({}, 1), ({"config": ChatConfig(conversations=300, epochs=3)}, 1),
        ({"config": ChatConfig(conversations=400)}, 2), ({"seed": 2}, 3), ({"facts": FACTS | {"depth": "3"}}, 4),
        ({"sequence_len": 64}, 5), ({"config": files}, 6), ({"config": files, "facts": {}}, 6),
    ]:  # fmt: skip
        read(**options)
        assert read.times == times, options
    file.write_text("".join(talk % n for n in range(200)))
    assert read(config=files)[1]["conversations"] == 200


def test_damaged_files_are_named(read):
    read()
    path = next(read.directory.glob("*/train_mask.npy"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is damaged \(train_mask\.npy does not match its hash\); delete it"):
        read()


def test_what_a_killed_process_left_is_removed(read):
    read.directory.mkdir()
    key = read.key()
    for number in (1, os.getpid()):
        (read.directory / f".{key}.{number}.tmp").mkdir()
        (read.directory / f".{key}.{number}.tmp" / "train_mask.npy").touch()
    read()
    assert {path.name for path in read.directory.iterdir()} <= {key, f".{key}.lock"}


def test_without_locks_the_first_process_that_finishes_wins(read, monkeypatch):
    monkeypatch.setattr(FileLock, "acquire", lambda self, **_: (_ for _ in ()).throw(NotImplementedError))
    write, written = tuning._write, []

    def write_after_another(target, *args):
        if not written:
            written.append(target)
            write(target, *args)
            (target / "first").touch()
        write(target, *args)

    monkeypatch.setattr(tuning, "_write", write_after_another)
    read()
    assert (written[0] / "first").exists() and [*read.directory.glob(".*.tmp")] == []


def test_a_process_that_waits_says_so(read, capsys):
    lock = FileLock(read.directory / f".{read.key()}.lock", thread_local=False)
    read.directory.mkdir()
    lock.acquire()
    thread = threading.Thread(target=read)
    thread.start()
    while "waiting for the process that tokenizes" not in capsys.readouterr().out:
        time.sleep(0.02)
    lock.release()
    thread.join()
    assert read.times == 1


def test_another_generator_makes_other_files(read, tmp_path, monkeypatch):
    key = read.key()
    monkeypatch.setattr(tuning.tasks, "__file__", str(tmp_path / "tasks.py"))
    (tmp_path / "tasks.py").write_text("changed")
    assert read.key() != key


def test_a_source_that_fails_leaves_nothing_behind(read):
    with pytest.raises(FileNotFoundError):
        read(config=ChatConfig(source="files", files=("none.jsonl",)))
    with pytest.raises(ValueError, match="no conversation for train"):
        read(config=ChatConfig(conversations=1, val_fraction=0.999999))
    assert not any(path.is_dir() for path in read.directory.iterdir())


def test_a_full_disk_names_the_directory(read, monkeypatch):
    def save(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(OSError, match=r"cannot write \S*conversations/generated-\w+: No space left on device"):
        read()
    assert not any(path.is_dir() for path in read.directory.iterdir())
