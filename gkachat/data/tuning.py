"""Tokenized conversations on disk: made by the first process that needs them, memory-mapped by all others.

    splits, counts = prepare(home() / "conversations", config.chat, seed, facts, tokenizer, sequence_len)
    splits["train"].documents

<key>/ below that directory holds train_tokens.npy, train_offsets.npy, train_mask.npy, the same of val, and meta.json
with their hashes and the counts. The key is a hash of everything that the tokens depend on. A directory can be deleted
when no run needs it: the next run makes it again.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from gkachat.config import ChatConfig
from gkachat.data import tasks
from gkachat.data.conversations import ChatSplit, chat_files, load_conversations, tokenize_conversations
from gkachat.data.shards import Documents
from gkachat.files import flush, lock, naming, read_json, sha256, write_text
from gkachat.tokenizer import Tokenizer

META = "meta.json"
FORMAT = 1  # part of the key: another format of the tokens or the files needs another number


def prepare(
    directory: Path, config: ChatConfig, seed: int, facts: dict[str, str], tokenizer: Tokenizer, sequence_len: int
) -> tuple[dict[str, ChatSplit], dict[str, int]]:
    """Return both splits and counts, as `tokenize_conversations`. One process reads and tokenizes, the others wait.

    Raises what `load_conversations` and `tokenize_conversations` raise, and ValueError for damaged files.
    """
    key = _key(config, seed, facts, tokenizer, sequence_len)
    target = directory / key
    busy = f"waiting for the process that tokenizes conversations into {target}"
    with lock(target, busy=busy, wait=True) as held:
        if not target.exists():
            if held:  # without locks each process makes its own files
                for left in directory.glob(f".{key}.*.tmp"):  # by a process that was killed
                    shutil.rmtree(left)
            print(f"tokenizing conversations into {target}", flush=True)
            conversations = load_conversations(config, seed, facts)
            _write(target, *tokenize_conversations(conversations, tokenizer, sequence_len, config.val_fraction))
            print(f"conversations are in {target}", flush=True)
    return _open(target)


def _key(config: ChatConfig, seed: int, facts: dict[str, str], tokenizer: Tokenizer, sequence_len: int) -> str:
    paths = chat_files(config) if config.source == "files" else []
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    depends_on = {
        "format": FORMAT, "source": config.source, "files": files, "conversations": config.conversations,
        "val_fraction": config.val_fraction, "seed": seed, "facts": facts if config.source == "generated" else {},
        "tokenizer": tokenizer.sha256, "sequence_len": sequence_len,
    }  # fmt: skip
    if config.source == "generated":
        depends_on["generator"] = sha256(Path(tasks.__file__))
    return f"{config.source}-{hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]}"


def _write(target: Path, splits: dict[str, ChatSplit], counts: dict[str, int]) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed and had the same number
    try:
        with naming(target):
            temporary.mkdir()
            for name, split in splits.items():
                documents = split.documents
                offsets = np.append(documents.start, documents.start[-1:] + documents.length[-1:])
                arrays = {"tokens": documents.tokens, "offsets": offsets, "mask": documents.loss_mask}
                for what, array in arrays.items():
                    np.save(temporary / f"{name}_{what}.npy", array)
                    flush(temporary / f"{name}_{what}.npy")
            hashes = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
            write_text(temporary / META, json.dumps({"counts": counts, "sha256": hashes}, indent=1) + "\n")
            try:
                os.replace(temporary, target)
            except OSError:
                if not target.exists():  # otherwise another process, without locks, has made the same files
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open(directory: Path) -> tuple[dict[str, ChatSplit], dict[str, int]]:
    try:
        meta: dict[str, Any] = read_json(directory / META, counts=dict, sha256=dict)
        for name, digest in meta["sha256"].items():
            if sha256(directory / Path(name).name) != digest:
                raise ValueError(f"{name} does not match its hash")
        return {split: ChatSplit(_documents(directory, split)) for split in ("train", "val")}, meta["counts"]
    except (ValueError, OSError) as error:
        raise ValueError(f"{directory} is damaged ({error}); delete it, and it is made again") from None


def _documents(directory: Path, split: str) -> Documents:
    tokens, offsets, mask = (
        np.load(directory / f"{split}_{what}.npy", mmap_mode="r") for what in ("tokens", "offsets", "mask")
    )
    return Documents(np.array(offsets), lambda: tokens, mask)
