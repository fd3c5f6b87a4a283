"""Where text comes from, and which of it is kept.

    corpus = Corpus(config.data)
    for split, text in corpus:     # "train" or "val", document by document, in a fixed order
    corpus.counts                  # kept, near-empty, duplicate, not UTF-8

A document is in train or in val by a hash of its text alone: neither order nor other documents matter.
"""

import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gkachat.config import DataConfig


class Corpus:
    """The kept documents of a source, each with the split it belongs to. Iterating anew starts over."""

    def __init__(self, config: DataConfig):
        self.config = config
        self.counts: dict[str, int] = {}

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Raises FileNotFoundError for missing files, ValueError for unreadable or empty ones."""
        config, seen, characters = self.config, set(), 0
        self.counts = counts = {"kept": 0, "near_empty": 0, "duplicate": 0, "not_utf8": 0}
        for text in SOURCES[config.source](config, counts):
            if len(text.strip()) < config.min_chars:
                counts["near_empty"] += 1
                continue
            try:
                encoded = text.encode()
            except UnicodeEncodeError:  # JSON can spell half a surrogate pair
                counts["not_utf8"] += 1
                continue
            # 64 bits: at 10 million documents, one chance in 400,000 that any two of them collide.
            digest = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest())
            if digest in seen:
                counts["duplicate"] += 1
                continue
            seen.add(digest)
            counts["kept"] += 1
            characters += len(text)
            yield ("val" if digest < config.val_fraction * 2**64 else "train"), text
            if config.max_chars is not None and characters >= config.max_chars:
                return
        if not counts["kept"]:
            raise ValueError(f"data.source {config.source} ({config.name}): no document was kept; dropped: {counts}")


def _python_source(config: DataConfig, counts: dict[str, int]) -> Iterator[str]:
    """The .py files of the running interpreter's standard library; a few of its tests are not UTF-8, on purpose."""
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"])] + ([Path(paths["purelib"])] if config.site_packages else [])
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if root == roots[0] and {"site-packages", "dist-packages"} & set(path.parts):
                continue
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                counts["not_utf8"] += 1


def _files(config: DataConfig, counts: dict[str, int]) -> Iterator[str]:
    for pattern in config.files:
        path = Path(pattern).expanduser()  # a name with brackets is a name first, a pattern second
        names = [path] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
        paths = [name for name in map(Path, names) if name.is_file()]
        if not paths:
            raise FileNotFoundError(f"data.files: nothing matches {pattern!r}")
        for path in paths:
            if path.suffix not in READERS:
                raise ValueError(f"{path}: given {path.suffix or 'no suffix'}, expected one of {', '.join(READERS)}")
            if path.stat().st_size == 0:
                raise ValueError(f"{path}: the file is empty")
            try:
                yield from READERS[path.suffix](path, config.text_column)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert it or leave it out") from None


def _read_txt(path: Path, column: str) -> Iterator[str]:
    """The whole file is one document."""
    yield path.read_bytes().decode()


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    """An object a line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 at byte {error.start} of the line") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); is the file truncated?") from None
            yield _text_of(row, column, f"{path}, line {number}")


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


def _huggingface(config: DataConfig, counts: dict[str, int]) -> Iterator[str]:
    """Rows of a dataset, streamed."""
    import datasets

    where = f"Hugging Face dataset {config.dataset!r} (revision {config.revision})"
    try:
        rows = datasets.load_dataset(
            config.dataset, config.subset or None, split=config.split, revision=config.revision, streaming=True
        )
        rows = iter(rows)
        while (row := next(rows, None)) is not None:
            yield _text_of(row, config.text_column, where)
    except _NoText:
        raise
    except Exception as error:  # the hub client raises a dozen unrelated types: no network, no such name, no such split
        raise ValueError(f"cannot read {where}, split {config.split!r}: {_first_line(error)}") from error


class _NoText(ValueError):
    pass


def _text_of(row: object, column: str, where: str) -> str:
    if not isinstance(row, dict) or column not in row:
        has = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise _NoText(f"{where}: no text in {column!r} (data.text_column); given {has}")
    if not isinstance(row[column], str):
        raise _NoText(f"{where}: {column!r} holds {type(row[column]).__name__}, expected text")
    return row[column]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


SOURCES = {"python-source": _python_source, "files": _files, "huggingface": _huggingface}
