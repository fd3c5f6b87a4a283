"""Files of rows: which of them a path, directory or glob names, and how each kind is read.

    paths = find_files(config.files, (".txt", ".jsonl"), "data.files")
    for text in read_files(paths, "text", check): ...

A file is plain or compressed (.gz, .bz2, .xz, .zst). Upper and lower case in suffixes do not matter.
"""

import fnmatch
import glob
import importlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from gkachat.text import CONVERT, decode, expand, lines, list_some, parse_json

PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "pyarrow"}
"""Suffixes of compressed files, and the modules that read them. Some Pythons are built without lzma."""

T = TypeVar("T")
Rows = Iterator[tuple[str, Any]]
"""("path, line 3", row) for each row of a file. A row is a dict, if the file is as it should be."""

MAX_BAD_FILES = 10  # that are looked for before they are reported


def read_files(paths: Sequence[Path], column: str, check: Callable[[Any, str], T]) -> Iterator[T]:
    """Yield `check(row, where)` for each row of files. Rows of parquet have one column, all others have all fields.

    After a bad file nothing is yielded any more: the files after it are only read to report all that are bad together.
    Raises ValueError that names them, with the line or row.
    """
    problems: list[str] = []
    for path in paths:
        try:
            for where, row in READERS[kind_of(path)](path, column):
                checked = check(row, where)
                if not problems:
                    yield checked
        except (OSError, ValueError) as error:
            problems.append(str(error))
        if len(problems) == MAX_BAD_FILES:
            break
    if problems:
        raise ValueError(list_some(problems))


def find_files(patterns: Sequence[str], suffixes: Sequence[str], option: str) -> list[Path]:
    """Return the files that patterns name, in the order of the patterns, those of each sorted.

    A pattern is a file, a directory (all files below it that have one of the suffixes) or a glob. `**` enters each
    directory once, however many links lead to it.

    Raises FileNotFoundError or ValueError that lists all patterns that match nothing and all files that cannot be read.
    """
    found, problems, missing = [], [], False
    expected = f"expected one of {', '.join(suffixes)}, also compressed as {', '.join(PACKED)}"
    for pattern in patterns:
        path = expand(pattern)
        if os.path.isdir(path):
            below = sorted(_below(path, ("**", "*"), set(), problems), key=str)
            matches = [path for path in below if kind_of(path) in suffixes and _is_file(path)]
            nothing = f"no file below {pattern!r} has a suffix that is read; {expected}"
        else:
            parts = (*path.parts, "*") if path.name == "**" else path.parts
            # A file's own name comes first, because it may have brackets.
            names = [path] if os.path.isfile(path) else sorted(_below(Path(), parts, set(), problems), key=str)
            matches = list(filter(_is_file, names))
            nothing = f"nothing matches {pattern!r}"
            if names and not matches:
                nothing = f"{pattern!r} matches directories alone; name one, or give {os.path.join(pattern, '**')!r}"
        if not matches:
            missing = True
            problems.append(f"{option}: {nothing}")
        for path in matches:
            if not os.path.exists(path):
                problems.append(f"{path}: a link that leads nowhere")
            elif kind_of(path) not in suffixes:
                problems.append(f"{path}: given {path.suffix or 'no suffix'}, {expected}")
            elif path.stat().st_size == 0:
                problems.append(f"{path}: the file is empty")
        found += matches
    if problems:
        raise (FileNotFoundError if missing else ValueError)(list_some(problems))
    return found


def _below(directory: Path, parts: Sequence[str], entered: set, problems: list[str]) -> Iterator[Path]:
    """Yield the paths below a directory that match the parts of a glob. Directories that cannot be read are problems.

    Links are followed, and names that start with a dot passed over, as in `glob.glob`. A loop of links ends.
    """
    if not parts:
        yield directory
        return
    head, *rest = parts
    if not glob.has_magic(head):
        if os.path.lexists(directory / head):
            yield from _below(directory / head, rest, entered, problems)
        return
    if not os.path.isdir(directory):
        return
    if head == "**":
        key = os.path.realpath(directory), len(parts)
        if key in entered:
            return
        entered.add(key)
        yield from _below(directory, rest, entered, problems)
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        if (problem := f"{directory}: {error.strerror}") not in problems:
            problems.append(problem)
        return
    for name in names:
        if name.startswith(".") and not head.startswith("."):
            continue
        if head == "**" and os.path.isdir(directory / name):
            yield from _below(directory / name, parts, entered, problems)
        elif fnmatch.fnmatchcase(name, head) and head != "**":
            yield from _below(directory / name, rest, entered, problems)


def _is_file(path: Path) -> bool:
    return os.path.isfile(path) or not os.path.exists(path)  # a link that leads nowhere is reported


def kind_of(path: Path) -> str:
    """Return the suffix of a file in lower case, without that of its compression."""
    packed = path.suffix.lower() in PACKED
    return (path.with_suffix("") if packed else path).suffix.lower()


def read_text(path: Path) -> str:
    """Return a text file, compressed or not, as it stands. Raises ValueError that names a file which is no text."""
    with _open(path) as file:
        data = file.read()
    try:
        return decode(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_jsonl(path: Path) -> Rows:
    """Yield each line that is not blank. Raises ValueError that names a bad line."""
    with _open(path) as file:
        for number, line in enumerate(lines(file), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if isinstance(row, list):
                raise ValueError(f"{where}: given a list, expected an object on each line (jq -c '.[]' makes them)")
            yield where, row


def read_parquet(path: Path, column: str) -> Rows:
    """Yield one column's value of each row as {column: value}. Raises ValueError that names a bad file or row."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        if path.suffix.lower() in PACKED:
            raise OSError("unpack it first: parquet is compressed itself")
        file = pyarrow.parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:  # as in a line of .jsonl, the names are what is there instead
            yield str(path), dict.fromkeys(file.schema_arrow.names)
            return
        for batch in file.iter_batches(columns=[column]):
            for value in batch.column(0):
                number += 1
                yield f"{path}, row {number}", {column: value.as_py()}
    except UnicodeDecodeError:
        raise ValueError(f"{path}, row {number}: not UTF-8") from None
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not readable as parquet ({str(error).splitlines()[0]})") from None


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".txt": lambda path, column: iter([(str(path), {column: read_text(path)})]),
    ".jsonl": lambda path, column: read_jsonl(path),
    ".ndjson": lambda path, column: read_jsonl(path),
    ".json": lambda path, column: read_jsonl(path),
    ".parquet": read_parquet,
}


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file, compressed or not, for reading. Raises ValueError that names it where that fails."""
    try:
        with _unpacked(path) as file:
            yield file
    except UnicodeDecodeError as error:  # of UTF-16 or UTF-32
        raise ValueError(f"{path}: not {error.encoding.upper()}; {CONVERT.format('ENCODING')}") from None
    except ValueError:
        raise
    except Exception as error:  # each way of packing has its own
        raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _unpacked(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".zst":  # in the standard library from Python 3.14 on
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    module = importlib.import_module(PACKED.get(suffix, "io"))
    return module.open(path, "rb")
