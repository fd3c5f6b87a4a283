"""Files that survive a crash: written under a temporary name, flushed to disk, then renamed into place."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing so that it either gets all of the new content or keeps the old.

    Raises OSError naming the file when the disk is full or not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with suppress(OSError):  # the new content is in place; not every file system flushes directories
            flush(path.parent)
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror or error}; what stood there before is untouched"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have a file's content, or a directory's names, on disk and not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, **kinds: type) -> dict[str, Any]:
    """An object with at least these fields of these types. ValueError for anything else, however hostile."""
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise ValueError(f"{size:,} bytes, expected {LARGEST_JSON:,} at most")
        tree = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    for name, kind in kinds.items():
        if not isinstance(tree, dict) or not isinstance(tree.get(name), kind):
            raise ValueError(f"{path} cannot be read: expected {name} to be a {kind.__name__}")
    return tree


LARGEST_JSON = 2**24  # bytes


def lock(path: Path, what: str) -> TextIO:
    """Be the only one to hold this file until it is closed, or the process is gone, however it ends.

    Raises FileExistsError that names who holds it.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115 (held open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise FileExistsError(f"{what} is in use by {owner}; wait for it, stop it, or choose another name") from None
    except OSError:  # a file system without locks: nothing can be promised there
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file
