"""Sources of text, and which of their documents are kept.

    corpus = Corpus(config.data)
    for split, text in corpus: ...    # "train" or "val", document by document, in a fixed order
    corpus.counts                     # how many documents were kept, and how many were dropped for which reason

A document is in train or in val by a hash of its text alone, so that neither order nor other documents matter. Only
where this would leave a split empty, the last document is cut in two.
"""

import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from gkachat.checks import ConfigError
from gkachat.config import DataConfig
from gkachat.data.readers import READERS, find_files, read_files
from gkachat.text import is_text, list_some


def source_options(config: DataConfig) -> dict[str, object]:
    """Return the options that shards depend on, as their manifest has them. `loader` only makes rows of them."""
    options = dataclasses.asdict(config) | {"files": list(config.files)}
    del options["loader"]
    return options


def file_stamp(config: DataConfig) -> dict[str, object]:
    """Return number and fingerprint (paths, sizes and times) of data.files; nothing for other sources."""
    if config.source != "files":
        return {}
    stats = [(str(path), path.stat()) for path in find_files(config.files, tuple(READERS), "data.files")]
    stamp = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return {"number": len(stamp), "sha256": hashlib.sha256(repr(stamp).encode()).hexdigest()}


class Corpus:
    """Kept documents of a source, each with its split. Every iteration reads the source from its start.

    Neither split is empty. Where the hashes put all documents into one split, as they do with a single document, the
    last document is cut at a line end: its beginning is train, and its end is val. The part that the other split lacked
    has its share of all characters, or the whole document where that is not more. `cut` says that this was done.
    """

    def __init__(self, config: DataConfig):
        """Raises ConfigError for an option that belongs to another source, and would be ignored."""
        own = {"site_packages": "python-source", "files": "files", "subset": "huggingface"}
        if wrong := [name for name, source in own.items() if getattr(config, name) and config.source != source]:
            raise ConfigError(
                [f"data.{name}: given {getattr(config, name)!r}, expected --data.source {own[name]}" for name in wrong]
            )
        self.config = config
        self.counts: dict[str, int] = {}
        self.cut = False

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Yield (split, text). Raises FileNotFoundError for missing files, ValueError for unreadable or empty ones."""
        splits, n_documents, n_chars, self.cut = set(), 0, 0, False
        last: tuple[str, str] | None = None
        for split, text in self.documents():
            if last is not None:
                yield last
            last = split, text
            splits.add(split)
            n_documents, n_chars = n_documents + 1, n_chars + len(text)
        if last is None:
            config = self.config
            dropped = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in self.counts.items() if n) or "none"
            raise ValueError(f"data.source {config.source} ({config.name}): no document was kept; dropped: {dropped}")
        if len(splits) == 2:
            yield last
            return
        self.cut = True
        (split, text), fraction = last, self.config.val_fraction
        lacking = max(1, round((fraction if split == "train" else 1 - fraction) * n_chars))
        lacking = min(lacking, len(text) - (n_documents == 1))
        at = len(text) - lacking if split == "train" else lacking
        at = _nearest_line_end(text, at)
        yield from ((split, part) for split, part in (("train", text[:at]), ("val", text[at:])) if part)

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yield (split by hash, text) of each document that is kept, and count the others."""
        config, seen, n_chars = self.config, set(), 0
        self.counts = counts = {"kept": 0, "near_empty": 0, "duplicate": 0, "not_utf8": 0, "null": 0}
        for text in SOURCES[config.source](config, counts):
            if text is None:
                counts["null"] += 1
                continue
            if len(text.strip()) < config.min_chars:
                counts["near_empty"] += 1
                continue
            if not is_text(text):
                counts["not_utf8"] += 1
                continue
            # At 10 million documents, the chance that any two of them collide is one in 400,000.
            digest = hash_64(text.encode())
            if digest in seen:
                counts["duplicate"] += 1
                continue
            seen.add(digest)
            counts["kept"] += 1
            n_chars += len(text)
            yield ("val" if in_val(digest, config.val_fraction) else "train"), text
            if config.max_chars is not None and n_chars >= config.max_chars:
                return


def _nearest_line_end(text: str, at: int) -> int:
    """Return the line end nearest to a position, or the position where there is none halfway to the text's ends."""
    reach = min(at, len(text) - at) // 2
    before, after = text.rfind("\n", at - reach, at) + 1, text.find("\n", at, at + reach) + 1
    return min((end for end in (before, after) if end), key=lambda end: abs(end - at), default=at)


def hash_64(data: bytes) -> int:
    """Return a 64-bit hash that is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def in_val(digest: int, val_fraction: float) -> bool:
    """Return whether an item with this `hash_64` belongs to val."""
    return digest < val_fraction * 2**64


def stream_dataset(
    name: str, subset: str | None, split: str, revision: str | None = None, shuffle_seed: int | None = None
) -> Iterator[dict]:
    """Stream the rows of a Hugging Face dataset; with a seed, shuffled within a buffer of 10,000 rows.

    Raises ValueError that names the dataset if it cannot be opened or breaks off.
    """
    import datasets

    name = os.path.expanduser(name)  # it may be a local directory
    try:
        rows = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
        yield from rows if shuffle_seed is None else rows.shuffle(seed=shuffle_seed, buffer_size=10_000)
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        which = f"split {split!r}" + (f", revision {revision!r}" if revision else "")
        raise ValueError(f"cannot read Hugging Face dataset {name!r} ({which}): {reason}") from error


def _python_source(config: DataConfig, counts: dict[str, int]) -> Iterator[str]:
    """Yield the .py files of this interpreter's standard library. Some of its test files are deliberately not UTF-8."""
    paths = sysconfig.get_paths()
    stdlib = Path(paths["stdlib"])
    problems: list[str] = []
    for root in [stdlib, Path(paths["purelib"])] if config.site_packages else [stdlib]:
        walk = os.walk(root, onerror=lambda error: problems.append(f"{error.filename}: {error.strerror}"))
        for path in sorted(Path(folder, name) for folder, _, names in walk for name in names if name.endswith(".py")):
            if root == stdlib and {"site-packages", "dist-packages"} & set(path.parts):
                continue
            try:
                text = path.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError:
                counts["not_utf8"] += 1
            except OSError as error:
                problems.append(f"{path}: {error.strerror}")
            else:
                if not problems:
                    yield text
    if problems:
        raise ValueError(list_some(problems))


def _files(config: DataConfig, counts: dict[str, int]) -> Iterator[str | None]:
    """Return the documents of data.files."""
    column = config.text_column
    paths = find_files(config.files, tuple(READERS), "data.files")
    return read_files(paths, column, partial(_text_of, column))


def _huggingface(config: DataConfig, counts: dict[str, int]) -> Iterator[str | None]:
    rows = stream_dataset(config.dataset, config.subset or None, config.split, config.revision)
    for number, row in enumerate(rows, 1):
        yield _text_of(config.text_column, row, f"Hugging Face dataset {config.dataset!r}, row {number}")


SOURCES = {"python-source": _python_source, "files": _files, "huggingface": _huggingface}


def _text_of(column: str, row: object, where: str) -> str | None:
    """Return the text of a row, or None where it is null."""
    if not isinstance(row, dict) or column not in row:
        given = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: no text in {column!r} (data.text_column); given {given}")
    if not isinstance(row[column], str | None):
        raise ValueError(f"{where}: {column!r} holds {type(row[column]).__name__}, expected text")
    return row[column]
