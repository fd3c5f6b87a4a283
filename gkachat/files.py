"""Files that survive a crash: written under a temporary name, flushed to disk, then renamed into place; and locks."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

from gkachat.text import parse_json

MAX_JSON_BYTES = 2**24


class WriteError(OSError):
    """A file could not be written, as on a full disk. The message names it."""


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing so that it ends up with all of the new content, or keeps the old.

    Raises WriteError that names the file when the disk is full or not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with suppress(OSError):  # the new content is in place; some file systems cannot flush directories
            flush(path.parent)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}; its old content is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an OSError of writing, as on a full disk, into a WriteError that names the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or f"{error} (is the disk full?)"  # NumPy gives no reason
        raise WriteError(f"cannot write {path}: {reason}") from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def sha256(path: Path) -> str:
    """Return the hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Force a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, **types: type) -> dict[str, Any]:
    """Read a JSON object that has at least the fields named in `types`, each of its type.

    Raises ValueError for anything else, however hostile the file is.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"{size:,} bytes, expected {MAX_JSON_BYTES:,} at most")
        tree = parse_json(path.read_bytes())
        if not isinstance(tree, dict):
            raise ValueError("expected an object")
        for name, type_ in types.items():
            if not isinstance(tree.get(name), type_):
                raise ValueError(f"expected {name} to be a {type_.__name__}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    return tree


def lock(target: Path, *, busy: str, wait: bool = False) -> AbstractContextManager[Any]:
    """Lock a file or directory, which need not exist, by a file `.NAME.lock` beside it. Leaving the context unlocks it.

    The end of the process unlocks it too. If another process holds the lock, raises FileExistsError with the text
    `busy`; with `wait`, prints the text and waits. On a file system without locks nothing is locked, and the context
    gives None where it gives the lock otherwise.
    """
    from filelock import FileLock, Timeout  # imported here because benchmarks import this module without the package

    target.parent.mkdir(parents=True, exist_ok=True)
    file_lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        try:
            return file_lock.acquire(blocking=False)
        except Timeout:
            if wait:
                print(busy, flush=True)
                return file_lock.acquire()
    except (NotImplementedError, OSError):
        return nullcontext()
    raise FileExistsError(busy)


def free_disk(path: Path) -> tuple[int, Path]:
    """Return the free bytes of the disk that `path` is on, or will be, and the nearest directory that exists."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    return shutil.disk_usage(existing).free, existing
