"""Sources of text, and which of their documents are kept.

    corpus = Corpus(config.data)
    for split, text in corpus: ...    # "train" or "val", document by document, in a fixed order
    corpus.counts                     # how many documents were kept, and how many were dropped for which reason

A document is in train or in val by a hash of its text alone, so that neither order nor other documents matter.
"""

import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gkachat.config import DataConfig


class Corpus:
    """Kept documents of a source, each with its split. Every iteration reads the source from its start."""

    def __init__(self, config: DataConfig):
        self.config = config
        self.counts: dict[str, int] = {}

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Yield (split, text). Raises FileNotFoundError for missing files, ValueError for unreadable or empty ones."""
        config, seen, n_chars = self.config, set(), 0
        self.counts = counts = {"kept": 0, "near_empty": 0, "duplicate": 0, "not_utf8": 0}
        for text in SOURCES[config.source](config, counts):
            if len(text.strip()) < config.min_chars:
                counts["near_empty"] += 1
                continue
            try:
                digest = hash_64(text.encode())
            except UnicodeEncodeError:  # JSON can spell half a surrogate pair
                counts["not_utf8"] += 1
                continue
            # At 10 million documents, the chance that any two of them collide is one in 400,000.
            if digest in seen:
                counts["duplicate"] += 1
                continue
            seen.add(digest)
            counts["kept"] += 1
            n_chars += len(text)
            yield ("val" if in_val(digest, config.val_fraction) else "train"), text
            if config.max_chars is not None and n_chars >= config.max_chars:
                return
        if not counts["kept"]:
            raise ValueError(f"data.source {config.source} ({config.name}): no document was kept; dropped: {counts}")


def hash_64(data: bytes) -> int:
    """Return a 64-bit hash that is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def in_val(digest: int, val_fraction: float) -> bool:
    """Return whether an item with this `hash_64` belongs to val."""
    return digest < val_fraction * 2**64


def read_jsonl(path: str | Path) -> Iterator[tuple[str, object]]:
    """Yield ("path, line n", value) for each line that is not blank. Raises ValueError that names a bad line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 at byte {error.start} of the line") from None
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error}); is the file truncated?") from None


def stream_dataset(
    name: str, subset: str | None, split: str, revision: str | None = None, shuffle_seed: int | None = None
) -> Iterator[dict]:
    """Stream the rows of a Hugging Face dataset; with a seed, shuffled within a buffer of 10,000 rows.

    Raises ValueError that names the dataset if it cannot be opened or breaks off.
    """
    import datasets

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
    for root in [stdlib, Path(paths["purelib"])] if config.site_packages else [stdlib]:
        for path in sorted(root.rglob("*.py")):
            if root == stdlib and {"site-packages", "dist-packages"} & set(path.parts):
                continue
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                counts["not_utf8"] += 1


def _files(config: DataConfig, counts: dict[str, int]) -> Iterator[str]:
    """Yield the documents of data.files: patterns in the given order, the files of each pattern sorted."""
    for pattern in config.files:
        path = Path(pattern).expanduser()
        matches = [path] if path.is_file() else sorted(glob.glob(str(path), recursive=True))  # names may have brackets
        paths = [match for match in map(Path, matches) if match.is_file()]
        if not paths:
            raise FileNotFoundError(f"data.files: nothing matches {pattern!r}")
        for path in paths:
            if path.suffix not in READERS:
                raise ValueError(f"{path}: given {path.suffix or 'no suffix'}, expected one of {', '.join(READERS)}")
            if path.stat().st_size == 0:
                raise ValueError(f"{path}: the file is empty")
            yield from READERS[path.suffix](path, config.text_column)


def _huggingface(config: DataConfig, counts: dict[str, int]) -> Iterator[str]:
    for row in stream_dataset(config.dataset, config.subset or None, config.split, config.revision):
        yield _text_of(row, config.text_column, f"Hugging Face dataset {config.dataset!r}")


SOURCES = {"python-source": _python_source, "files": _files, "huggingface": _huggingface}


def _read_txt(path: Path, column: str) -> Iterator[str]:
    """Yield the whole file as one document."""
    try:
        yield path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert it or leave it out") from None


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    for where, row in read_jsonl(path):
        yield _text_of(row, column, where)


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise ValueError(f"{path}: no column {column!r} (data.text_column); there are {file.schema_arrow.names}")
        for batch in file.iter_batches(columns=[column]):
            for text in batch.column(0).to_pylist():
                yield _text_of({column: text}, column, str(path))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not readable as parquet ({str(error).splitlines()[0]})") from None


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _text_of(row: object, column: str, where: str) -> str:
    if not isinstance(row, dict) or column not in row:
        given = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: no text in {column!r} (data.text_column); given {given}")
    if not isinstance(row[column], str):
        raise ValueError(f"{where}: {column!r} holds {type(row[column]).__name__}, expected text")
    return row[column]
