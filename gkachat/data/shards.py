"""Tokenized corpora on disk.

tokens/<dataset>/
    manifest.json              the shards, their hashes and the tokenizer's; "complete" once all are written
    train_00000.bin            uint16 tokens, document after document
    train_00000.idx            uint64 offsets: document i is bin[idx[i] : idx[i + 1]]
    val_00000.bin, ...

A train shard is made of the next `shard_chars` characters, a val shard of the val documents met meanwhile. An
interrupted run that starts over meets the same boundaries: it reads the texts again, and tokenizes only the shards that
are not in the manifest yet. Shards are read in order, each whole and against its hash, so that training can begin while
later ones are still being made.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from gkachat.config_file import from_dict
from gkachat.files import atomic_write, read_json, write_text
from gkachat.tokenizer import Tokenizer

SPLITS = ("train", "val")
MANIFEST = "manifest.json"
REMEDY = "run scripts.data_prep again to mend it"


@dataclass
class Shard:
    split: str
    name: str
    documents: int
    tokens: int
    bytes: int  # of the text
    text_sha256: str
    bin_sha256: str
    idx_sha256: str


@dataclass
class Manifest:
    source: dict[str, object]
    tokenizer_sha256: str
    complete: bool = False
    dropped: dict[str, int] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)

    def total(self, split: str, what: str) -> int:
        """Sum of `documents`, `tokens` or `bytes` over a split."""
        return sum(getattr(shard, what) for shard in self.shards if shard.split == split)

    def save(self, directory: Path) -> None:
        write_text(directory / MANIFEST, json.dumps(asdict(self), indent=1) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Raises FileNotFoundError where there is none, ValueError where it cannot be read."""
    path = directory / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"no tokenized corpus at {directory}; make one with python -m scripts.data_prep CONFIG")
    try:
        tree = read_json(path)
        return Manifest(**tree | {"shards": [from_dict(Shard, shard) for shard in tree["shards"]]})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run scripts.data_prep again") from None


def write_shards(
    documents: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    directory: Path,
    *,
    source: dict[str, object],
    shard_chars: int,
    dropped: Callable[[], dict[str, int]] = dict,
    progress: Callable[[Shard, bool], None] = lambda shard, reused: None,
    reread: bool = False,
    threads: int | None = None,
) -> Manifest:
    """Tokenize (split, text) documents into `directory`; finished shards of an earlier, interrupted run are kept.

    What is complete and undamaged is not read again, unless `reread` asks whether the documents have changed since.
    `source` is what the documents depend on: when it or the tokenizer differs from what stands there, ValueError.
    `progress` hears of each shard, and whether it was there already. Raises ValueError when a split stays empty.
    """
    manifest = Manifest(source, tokenizer.sha256)
    finished: dict[str, Shard] = {}
    if (directory / MANIFEST).exists():
        before = read_manifest(directory)
        if (before.source, before.tokenizer_sha256) != (source, tokenizer.sha256):
            raise ValueError(f"{directory} was made from another source or tokenizer; delete it or set data.name")
        finished = {shard.name: shard for shard in before.shards if _sound(directory, shard)}
        if before.complete and len(finished) == len(before.shards) and not reread:
            for shard in before.shards:
                progress(shard, True)
            return before

    pending: dict[str, list[str]] = {split: [] for split in SPLITS}
    characters = 0  # of train, that are pending

    def flush(split: str, pool: ThreadPoolExecutor) -> None:
        if not pending[split]:
            return
        name = f"{split}_{sum(shard.split == split for shard in manifest.shards):05d}"
        texts = [text.encode() for text in pending[split]]
        text_sha256 = _digest(texts)
        shard = finished.get(name)
        reused = shard is not None and shard.text_sha256 == text_sha256
        if not reused:
            tokens = list(pool.map(tokenizer.encode_to_numpy, pending[split]))
            shard = _write_shard(directory, split, name, tokens, sum(map(len, texts)), text_sha256)
        manifest.shards.append(shard)
        # Finished shards that are still ahead stay on record, or a second interruption would lose them.
        ahead = [later for later in finished.values() if later.name not in {s.name for s in manifest.shards}]
        Manifest(source, tokenizer.sha256, False, {}, manifest.shards + ahead).save(directory)
        progress(shard, reused)
        pending[split] = []

    with ThreadPoolExecutor(threads) as pool:  # tiktoken lets go of the interpreter lock
        for split, text in documents:
            pending[split].append(text)
            characters += len(text) if split == "train" else 0
            if characters >= shard_chars:
                for each in SPLITS:
                    flush(each, pool)
                characters = 0
        for each in SPLITS:
            flush(each, pool)
    for split in SPLITS:
        if not manifest.total(split, "tokens"):
            raise ValueError(f"the {split} split is empty; give more documents, or another data.val_fraction")
    manifest.complete, manifest.dropped = True, dropped()
    manifest.save(directory)
    return manifest


def _digest(texts: list[bytes]) -> str:
    """One hash for a list of texts and where each ends."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.hexdigest()


def _write_shard(
    directory: Path, split: str, name: str, tokens: list[np.ndarray], n_bytes: int, text_sha256: str
) -> Shard:
    offsets = np.zeros(len(tokens) + 1, dtype=np.uint64)
    np.cumsum([len(document) for document in tokens], out=offsets[1:])
    content = {"bin": np.concatenate(tokens).tobytes(), "idx": offsets.tobytes()}
    for suffix, data in content.items():
        with atomic_write(directory / f"{name}.{suffix}") as file:
            file.write(data)
    hashes = {f"{suffix}_sha256": hashlib.sha256(data).hexdigest() for suffix, data in content.items()}
    return Shard(split, name, len(tokens), int(offsets[-1]), n_bytes, text_sha256, **hashes)


FILES = {"idx": np.dtype(np.uint64), "bin": np.dtype(np.uint16)}


def _check_size(directory: Path, shard: Shard, suffix: str) -> Path:
    """The path of one of a shard's two files. ValueError when it has not the size that the manifest says."""
    size = FILES[suffix].itemsize * (shard.tokens if suffix == "bin" else shard.documents + 1)
    path = directory / f"{shard.name}.{suffix}"
    if not path.exists():
        raise ValueError(f"{path} is missing")
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, its manifest says {size}")
    return path


def _read(directory: Path, shard: Shard, suffix: str) -> np.ndarray:
    """One of a shard's two files, whole. ValueError when it is not what its manifest says."""
    path = _check_size(directory, shard, suffix)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != getattr(shard, f"{suffix}_sha256"):
        raise ValueError(f"{path} does not match the hash in its manifest")
    return np.frombuffer(data, FILES[suffix])


def _sound(directory: Path, shard: Shard) -> bool:
    try:
        return all(_read(directory, shard, suffix) is not None for suffix in FILES)
    except ValueError:
        return False


class Documents:
    """The documents of a shard; the tokens of document i are tokens[start[i] : start[i] + length[i]]."""

    def __init__(self, offsets: np.ndarray, read: Callable[[], np.ndarray], scored: np.ndarray | None = None):
        """`read` gives the tokens, when they are asked for; `scored` which of them are learned from, if not all are."""
        self.start, self.length, self._read, self.scored = offsets[:-1], np.diff(offsets), read, scored
        if scored is not None:
            self.n_scored = np.diff(np.concatenate(([0], np.cumsum(scored)))[offsets])

    @cached_property
    def tokens(self) -> np.ndarray:
        return self._read()


class Split:
    """One split of a corpus, shard by shard."""

    def __init__(self, directory: Path, split: str, tokenizer: Tokenizer, patience: float = 0.0):
        """`patience`: seconds to wait for a shard that is still being made; 0: the corpus must be complete.

        Raises FileNotFoundError or ValueError that says what to run.
        """
        self.directory, self.split, self.tokenizer, self.patience = directory, split, tokenizer, patience
        self._records: dict[str, Shard] = {}
        self.n_shards: int | None = None
        self._look()
        if self.n_shards is None and not patience:
            raise ValueError(f"{directory} is not complete; run scripts.data_prep again to finish it")

    def _look(self) -> None:
        """See how far the corpus has come. A shard that has been seen may not change any more."""
        manifest = read_manifest(self.directory)
        if manifest.tokenizer_sha256 != self.tokenizer.sha256:
            raise ValueError(
                f"{self.directory} was made with another tokenizer than the one in use; run scripts.data_prep again"
            )
        for shard in manifest.shards:
            if shard.split == self.split and shard.name not in self._records:
                try:  # hashes are compared when it is read
                    for suffix in FILES:
                        _check_size(self.directory, shard, suffix)
                except ValueError as error:
                    raise ValueError(f"{error}; {REMEDY}") from None
                self._records[shard.name] = shard
        self.n_shards = len(self._records) if manifest.complete else None

    def shard(self, index: int) -> Documents | None:
        """None after the last. TimeoutError when a shard is not made in time, ValueError when it is damaged."""
        name, since = f"{self.split}_{index:05d}", time.monotonic()
        while name not in self._records:
            if self.n_shards is not None:
                return None
            self._look()
            if name in self._records or self.n_shards is not None:
                continue
            if time.monotonic() - since >= self.patience:
                raise TimeoutError(
                    f"{self.directory}: no {name} after {self.patience:.0f} s of waiting; is scripts.data_prep running?"
                )
            time.sleep(min(1.0, self.patience))
        record = self._records[name]
        try:
            offsets = _read(self.directory, record, "idx").astype(np.int64)
            if offsets[0] != 0 or offsets[-1] != record.tokens or (np.diff(offsets) < 0).any():
                raise ValueError(f"{self.directory / name}.idx: its offsets do not rise from 0 to {record.tokens}")
            return Documents(offsets, lambda: self._tokens(record))
        except ValueError as error:
            raise ValueError(f"{error}; {REMEDY}") from None

    def _tokens(self, record: Shard) -> np.ndarray:
        try:
            tokens = _read(self.directory, record, "bin")
            if tokens.size and tokens.max() >= self.tokenizer.vocab_size:
                raise ValueError(f"{self.directory / record.name}.bin: token {tokens.max()} is not in the vocabulary")
            return tokens
        except ValueError as error:
            raise ValueError(f"{error}; {REMEDY}") from None

    def __iter__(self) -> Iterator[Documents]:
        index = 0
        while (documents := self.shard(index)) is not None:
            yield documents
            index += 1
