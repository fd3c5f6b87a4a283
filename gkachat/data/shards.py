"""Tokenized corpora on disk.

tokens/<dataset>/
    manifest.json              the shards, their hashes and the tokenizer's; "complete" once all are written
    train_00000.bin            uint16 tokens, document after document
    train_00000.idx            uint64 offsets: document i is bin[idx[i] : idx[i + 1]]
    val_00000.bin, ...

A shard is made of the next `shard_chars` characters of its split, so an interrupted run that starts over meets the same
boundaries: it reads the texts again, and tokenizes only the shards that are not in the manifest yet.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from gkachat.config_file import build
from gkachat.files import atomic_write, sha256, write_text
from gkachat.tokenizer import Tokenizer

SPLITS = ("train", "val")
MANIFEST = "manifest.json"


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
        tree = json.loads(path.read_text())
        return Manifest(**tree | {"shards": [build(Shard, shard) for shard in tree["shards"]]})
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
        finished = {shard.name: shard for shard in before.shards if _problem(directory, shard) is None}
        if before.complete and len(finished) == len(before.shards) and not reread:
            for shard in before.shards:
                progress(shard, True)
            return before

    pending: dict[str, list[str]] = {split: [] for split in SPLITS}
    characters = dict.fromkeys(SPLITS, 0)

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
        pending[split], characters[split] = [], 0

    with ThreadPoolExecutor(threads) as pool:  # tiktoken lets go of the interpreter lock
        for split, text in documents:
            pending[split].append(text)
            characters[split] += len(text)
            if characters[split] >= shard_chars:
                flush(split, pool)
        for split in SPLITS:
            flush(split, pool)
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


def _problem(directory: Path, shard: Shard) -> str | None:
    """What is wrong with a shard's files, or None."""
    sizes = {"bin": 2 * shard.tokens, "idx": 8 * (shard.documents + 1)}
    for suffix, size in sizes.items():
        path = directory / f"{shard.name}.{suffix}"
        if not path.exists():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, its manifest says {size}"
        if sha256(path) != getattr(shard, f"{suffix}_sha256"):
            return f"{path} does not match the hash in its manifest"
    return None


@dataclass(frozen=True)
class Split:
    """One split of a corpus, memory-mapped. Document i is shards[shard_of[i]][start[i] : start[i] + length[i]]."""

    shards: list[np.ndarray]
    shard_of: np.ndarray
    start: np.ndarray
    length: np.ndarray


def open_split(directory: Path, split: str, tokenizer_sha256: str) -> Split:
    """Check a corpus against its manifest and the tokenizer, then map one split of it.

    Raises FileNotFoundError or ValueError that says what to run.
    """
    manifest = read_manifest(directory)
    remedy = "run scripts.data_prep again"
    if not manifest.complete:
        raise ValueError(f"{directory} is not complete; {remedy} to finish it")
    if manifest.tokenizer_sha256 != tokenizer_sha256:
        raise ValueError(f"{directory} was made with another tokenizer than the one in use; {remedy}")
    records = [shard for shard in manifest.shards if shard.split == split]
    with ThreadPoolExecutor() as pool:
        for problem in pool.map(lambda shard: _problem(directory, shard), records):
            if problem is not None:
                raise ValueError(f"{problem}; {remedy} to mend it")
    offsets = [np.fromfile(directory / f"{shard.name}.idx", dtype=np.uint64).astype(np.int64) for shard in records]
    return Split(
        shards=[np.memmap(directory / f"{shard.name}.bin", dtype=np.uint16, mode="r") for shard in records],
        shard_of=np.repeat(np.arange(len(records)), [shard.documents for shard in records]),
        start=np.concatenate([o[:-1] for o in offsets]),
        length=np.concatenate([np.diff(o) for o in offsets]),
    )
