"""Tokenized corpora on disk.

    for shard, reused in write_shards(corpus, tokenizer, directory, source=..., shard_chars=...): ...
    for documents in Split(directory, "train", tokenizer): ...    # shard by shard

tokens/<name>/
    manifest.json              every shard with its hashes, the tokenizer's hash, and whether all shards are written
    train_00000.bin            uint16 tokens, document after document
    train_00000.idx            uint64 offsets: document i is bin[idx[i] : idx[i + 1]]
    val_00000.bin, ...

A train shard holds the next `shard_chars` characters. The val shard that follows holds the val documents from the same
part of the corpus. After an interruption, `write_shards` reads the texts again, cuts them at the same places, and
tokenizes only the shards that the manifest does not have yet. It reads the texts of one shard while it tokenizes those
of the shard before. Training can begin while later shards are still being written.
"""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gkachat.config_file import from_dict
from gkachat.files import atomic_write, read_json, write_text
from gkachat.text import list_near
from gkachat.tokenizer import Tokenizer

SPLITS = ("train", "val")
MANIFEST = "manifest.json"
CHUNK = 16  # documents that a thread tokenizes at a time
DTYPES = {"idx": np.dtype(np.uint64), "bin": np.dtype(np.uint16)}


@dataclass
class Shard:
    """Manifest entry of one shard."""

    split: str
    name: str
    documents: int
    tokens: int
    bytes: int  # of the text in UTF-8
    text_sha256: str
    bin_sha256: str
    idx_sha256: str


@dataclass
class Manifest:
    """Contents of a tokenized corpus."""

    source: dict[str, object]
    tokenizer_sha256: str
    complete: bool = False
    dropped: dict[str, int] = field(default_factory=dict)
    files: dict[str, object] = field(default_factory=dict)  # what was read, as sources.file_stamp has it
    shards: list[Shard] = field(default_factory=list)

    def total(self, split: str, what: str) -> int:
        """Return the sum of `documents`, `tokens` or `bytes` over a split."""
        return sum(getattr(shard, what) for shard in self.shards if shard.split == split)

    def save(self, directory: Path) -> None:
        write_text(directory / MANIFEST, json.dumps(asdict(self), indent=1) + "\n")


class Documents:
    """The documents of one shard. The tokens of document i are `tokens[start[i] : start[i] + length[i]]`.

    `loss_mask` marks the tokens that are learned from, and `n_targets` counts them in each document, none of which may
    be empty. Without a mask (None), all tokens are learned from.
    """

    def __init__(self, offsets: np.ndarray, read: Callable[[], np.ndarray], loss_mask: np.ndarray | None = None):
        """`read` returns the tokens. It is called when they are first used, since planning needs only the offsets."""
        self.start, self.length, self._read, self.loss_mask = offsets[:-1], np.diff(offsets), read, loss_mask
        if loss_mask is not None:
            self.n_targets = np.add.reduceat(loss_mask, self.start, dtype=np.int64)

    @cached_property
    def tokens(self) -> np.ndarray:
        return self._read()


class Split:
    """Shards of one split of a corpus, each checked against its hash when it is read."""

    def __init__(self, directory: Path, split: str, tokenizer: Tokenizer, timeout: float = 0.0):
        """Open a split. `n_shards` is None while data_prep is still writing shards.

        `timeout` is the number of seconds to wait for a shard that is not written yet; 0 demands a complete corpus.
        Raises FileNotFoundError or ValueError that say what to run.
        """
        self.directory, self.split, self.tokenizer, self.timeout = directory, split, tokenizer, timeout
        self._records: dict[str, Shard] = {}
        self.n_shards: int | None = None
        self._read_manifest()
        if self.n_shards is None and not timeout:
            raise ValueError(f"{directory} is not complete; run scripts.data_prep again to finish it")

    def n_written(self) -> int | None:
        """Return the number of shards that are there by now, or None if they are all that there will be."""
        self._read_manifest()
        written = takewhile(lambda index: f"{self.split}_{index:05d}" in self._records, count())
        return sum(1 for _ in written) if self.n_shards is None else None

    def shard(self, index: int, proceed: Callable[[], bool] = lambda: True) -> Documents | None:
        """Return the documents of a shard, or None after the last one, or where `proceed` ends the wait for it.

        `proceed` is called about once a second while the shard is not written yet.

        Raises TimeoutError if the shard is not written in time, ValueError if it is damaged.
        """
        name, start = f"{self.split}_{index:05d}", time.monotonic()
        while name not in self._records:
            if self.n_shards is not None:
                return None
            self._read_manifest()
            if name in self._records or self.n_shards is not None:
                continue
            if time.monotonic() - start >= self.timeout:
                raise TimeoutError(
                    f"{self.directory}: no {name} after {self.timeout:.0f} s of waiting; is scripts.data_prep running?"
                )
            if not proceed():
                return None
            time.sleep(min(1.0, self.timeout))
        record = self._records[name]
        offsets = _read_array(self.directory, record, "idx").astype(np.int64)
        if offsets[0] != 0 or offsets[-1] != record.tokens or (np.diff(offsets) < 0).any():
            raise _damaged(f"{self.directory / name}.idx: its offsets do not rise from 0 to {record.tokens}")
        return Documents(offsets, lambda: self._read_tokens(record))

    def __iter__(self) -> Iterator[Documents]:
        index = 0
        while (documents := self.shard(index)) is not None:
            yield documents
            index += 1

    def _read_manifest(self) -> None:
        """Add the shards that were written since. A shard that is known already may not change any more."""
        manifest = read_manifest(self.directory)
        if manifest.tokenizer_sha256 != self.tokenizer.sha256:
            made, given = manifest.tokenizer_sha256[:12], self.tokenizer.sha256[:12]
            raise ValueError(
                f"{self.directory} was made with another tokenizer ({made}, given {given}); scripts.data_prep --reread "
                f"makes it again with the one in tokenizer/{self.directory.name}"
            )
        for shard in manifest.shards:
            if shard.split == self.split and shard.name not in self._records:
                for suffix in DTYPES:
                    _check_size(self.directory, shard, suffix)
                self._records[shard.name] = shard
        self.n_shards = len(self._records) if manifest.complete else None

    def _read_tokens(self, record: Shard) -> np.ndarray:
        tokens = _read_array(self.directory, record, "bin")
        if tokens.size and tokens.max() >= self.tokenizer.vocab_size:
            raise _damaged(f"{self.directory / record.name}.bin: token {tokens.max()} is not in the vocabulary")
        return tokens


def read_manifest(directory: Path) -> Manifest:
    """Read a corpus's manifest. Raises FileNotFoundError if there is none, ValueError if it is damaged."""
    path = directory / MANIFEST
    if not path.exists():
        known = sorted(found.parent.name for found in directory.parent.glob(f"*/{MANIFEST}"))
        raise FileNotFoundError(
            f"no tokenized corpus at {directory}; make one with python -m scripts.data_prep and the same config and "
            f"options (config.toml has those of a run); there are: {list_near(directory.name, known)}"
        )
    try:
        tree = read_json(path, tokenizer_sha256=str)
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
    files: Callable[[], dict[str, object]] = dict,
    reread: bool = False,
) -> Iterator[tuple[Shard, bool]]:
    """Tokenize documents into shards; yield each shard, and whether it was there from an earlier, interrupted run.

    Args:
        documents: (split, text) pairs.
        source: What the documents depend on. It is stored, and a later call must give the same.
        shard_chars: Characters of train text in a shard.
        dropped: Called at the end for the counts of dropped documents, which are stored.
        files: Called at the end for what identifies the files that were read, which is stored too.
        reread: Read the documents even if the corpus is complete, and replace what differs: shards whose text has
            changed, or all shards of another source or tokenizer.

    Raises ValueError if a split stays empty, or if the directory holds a complete corpus of another source or
    tokenizer. An unfinished one is replaced.
    """
    manifest = Manifest(source, tokenizer.sha256)
    earlier = _earlier_manifest(directory, manifest, reread)
    intact = [shard for shard in earlier.shards if _is_intact(directory, shard)]
    if earlier.complete and len(intact) == len(earlier.shards) and not reread:
        yield from ((shard, True) for shard in intact)
        return
    groups = _group_into_shards(documents, shard_chars)
    yield from _write_groups(groups, tokenizer, directory, manifest, {shard.name: shard for shard in intact})
    for split in SPLITS:
        if not manifest.total(split, "tokens"):
            raise ValueError(f"the {split} split is empty; give more documents, or another data.val_fraction")
    manifest.complete, manifest.dropped, manifest.files = True, dropped(), files()
    manifest.save(directory)


def check_source(directory: Path, source: dict[str, object]) -> None:
    """Raise ValueError if the shards in a directory were made with other options, as far as their manifest has them."""
    before = read_manifest(directory)
    known = {name: value for name, value in source.items() if name in before.source}
    if differences := _differences(before, replace(before, source=before.source | known)):
        raise ValueError(
            f"{directory} was made with other options ({'; '.join(differences)}): take them back, make it again with "
            "scripts.data_prep --reread, or give another data.name"
        )


def _differences(before: Manifest, now: Manifest) -> list[str]:
    """Return a line for each option, and for the tokenizer, that differs between two manifests."""
    names = dict.fromkeys((*before.source, *now.source))
    pairs = {f"data.{name}": (now.source.get(name), before.source.get(name)) for name in names}
    pairs["tokenizer"] = (now.tokenizer_sha256[:12], before.tokenizer_sha256[:12])
    return [f"{name}: given {new!r}, it has {old!r}" for name, (new, old) in pairs.items() if new != old]


def _earlier_manifest(directory: Path, now: Manifest, reread: bool) -> Manifest:
    """Return the manifest in a directory, or `now` if there is none of the same source and tokenizer.

    Shards of others are removed. Raises ValueError if they are complete, unless `reread` is set.
    """
    if not (directory / MANIFEST).exists():
        return now
    earlier = read_manifest(directory)
    differences = _differences(earlier, now)
    if not differences:
        return earlier
    if earlier.complete and not reread:
        raise ValueError(
            f"{directory} was made from another source or tokenizer ({'; '.join(differences)}): "
            "give --reread to make it again, or another data.name"
        )
    _remove(directory, earlier)  # one that was never finished is in nobody's way
    return now


def _remove(directory: Path, manifest: Manifest) -> None:
    """Remove a corpus, its manifest first."""
    (directory / MANIFEST).unlink()
    for shard in manifest.shards:
        for suffix in DTYPES:
            (directory / f"{Path(shard.name).name}.{suffix}").unlink(missing_ok=True)


def _group_into_shards(documents: Iterable[tuple[str, str]], shard_chars: int) -> Iterator[tuple[str, list[str]]]:
    """Yield (split, texts of a shard), train before val, each time `shard_chars` characters of train are reached."""
    texts, train_chars = {split: [] for split in SPLITS}, 0
    for split, text in documents:
        texts[split].append(text)
        train_chars += len(text) if split == "train" else 0
        if train_chars >= shard_chars:
            yield from ((split, texts[split]) for split in SPLITS if texts[split])
            texts, train_chars = {split: [] for split in SPLITS}, 0
    yield from ((split, texts[split]) for split in SPLITS if texts[split])


class _ShardInWork(NamedTuple):
    """A shard between its texts and its files."""

    split: str
    name: str
    bytes: int
    text_sha256: str
    earlier: Shard | None
    """The shard of an earlier run that has the same texts, if any."""
    chunks: list[Future]
    """Token arrays of CHUNK documents each, which threads make. Empty where there is an earlier shard."""


def _write_groups(
    groups: Iterable[tuple[str, list[str]]],
    tokenizer: Tokenizer,
    directory: Path,
    manifest: Manifest,
    finished: dict[str, Shard],
) -> Iterator[tuple[Shard, bool]]:
    """Make a shard of each group of texts, add it to the manifest, and yield what `write_shards` yields.

    `finished` has the shards of an earlier run by name. The texts of the next shard are read, or downloaded, while
    those of this one are tokenized.
    """
    numbers = {split: count() for split in SPLITS}
    in_work: deque[_ShardInWork] = deque()
    with ThreadPoolExecutor() as pool:  # tiktoken releases the interpreter lock, so that it uses all cores
        try:
            for split, texts in groups:
                name = f"{split}_{next(numbers[split]):05d}"
                in_work.append(_begin_shard(pool, tokenizer, split, name, texts, finished.get(name)))
                while len(in_work) > len(SPLITS):
                    yield _finish_shard(in_work.popleft(), directory, manifest, finished)
            while in_work:
                yield _finish_shard(in_work.popleft(), directory, manifest, finished)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin_shard(
    pool: ThreadPoolExecutor, tokenizer: Tokenizer, split: str, name: str, texts: list[str], earlier: Shard | None
) -> _ShardInWork:
    """Start to tokenize texts, unless they are those of the earlier shard of this name."""
    encoded = [text.encode() for text in texts]
    text_sha256 = _hash_texts(encoded)
    if earlier is not None and earlier.text_sha256 != text_sha256:
        earlier = None
    chunks = [] if earlier else [texts[at : at + CHUNK] for at in range(0, len(texts), CHUNK)]
    futures = [pool.submit(list, map(tokenizer.encode_to_numpy, chunk)) for chunk in chunks]
    return _ShardInWork(split, name, sum(map(len, encoded)), text_sha256, earlier, futures)


def _finish_shard(
    work: _ShardInWork, directory: Path, manifest: Manifest, finished: dict[str, Shard]
) -> tuple[Shard, bool]:
    """Write a shard, unless there is an earlier one, and the manifest; return it, and whether it is an earlier one."""
    shard = work.earlier or _write_shard(work, directory)
    finished.pop(work.name, None)
    manifest.shards.append(shard)
    # Finished shards that are still ahead stay in the manifest, or a second interruption would lose them.
    replace(manifest, shards=[*manifest.shards, *finished.values()]).save(directory)
    return shard, shard is work.earlier


def _hash_texts(texts: list[bytes]) -> str:
    """Return one hash of a list of texts and of where each ends."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.hexdigest()


def _write_shard(work: _ShardInWork, directory: Path) -> Shard:
    tokens = [document for chunk in work.chunks for document in chunk.result()]
    offsets = np.zeros(len(tokens) + 1, dtype=np.uint64)
    np.cumsum([len(document) for document in tokens], out=offsets[1:])
    content = {"bin": np.concatenate(tokens).tobytes(), "idx": offsets.tobytes()}
    for suffix, data in content.items():
        with atomic_write(directory / f"{work.name}.{suffix}") as file:
            file.write(data)
    hashes = {f"{suffix}_sha256": hashlib.sha256(data).hexdigest() for suffix, data in content.items()}
    return Shard(work.split, work.name, len(tokens), int(offsets[-1]), work.bytes, work.text_sha256, **hashes)


def _read_array(directory: Path, shard: Shard, suffix: str) -> np.ndarray:
    """Read one of a shard's two files. Raises ValueError if it does not match the manifest."""
    path = _check_size(directory, shard, suffix)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != getattr(shard, f"{suffix}_sha256"):
        raise _damaged(f"{path} does not match the hash in its manifest")
    return np.frombuffer(data, DTYPES[suffix])


def _check_size(directory: Path, shard: Shard, suffix: str) -> Path:
    """Return the path of one of a shard's two files. Raises ValueError if its size is not that of the manifest."""
    size = DTYPES[suffix].itemsize * (shard.tokens if suffix == "bin" else shard.documents + 1)
    path = directory / f"{shard.name}.{suffix}"
    if not path.exists():
        raise _damaged(f"{path} is missing")
    if path.stat().st_size != size:
        raise _damaged(f"{path} has {path.stat().st_size} bytes, its manifest says {size}")
    return path


def _is_intact(directory: Path, shard: Shard) -> bool:
    try:
        for suffix in DTYPES:
            _read_array(directory, shard, suffix)
    except ValueError:
        return False
    return True


def _damaged(problem: str) -> ValueError:
    return ValueError(f"{problem}; run scripts.data_prep again to repair it")
