"""Files from the web that arrive whole or not at all."""

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from gkachat.files import flush, sha256

CHUNK = 2**20
WORTH_ANOTHER_TRY = {408, 425, 429, 500, 502, 503, 504}  # HTTP's codes for "not now"


def download(
    url: str,
    path: Path,
    digest: str,
    *,
    timeout: float = 30.0,
    attempts: int = 6,
    wait: float = 1.0,
    report: Callable[[str], None] = print,
) -> Path:
    """Have at `path` the file of that SHA-256, from there if it is there already.

    Goes on where an attempt broke off, waits twice as long after each, and puts the file in place once it is whole.

    Args:
        timeout: seconds of silence after which an attempt is given up.
        wait: seconds before the second attempt.

    Raises OSError that names the URL and what was wrong with the last attempt.
    """
    if path.exists() and sha256(path) == digest:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    for attempt in range(1, attempts + 1):
        try:
            _fetch(url, partial, timeout)
            if (got := sha256(partial)) != digest:
                partial.unlink()
                raise ValueError(f"SHA-256 is {got}, expected {digest}")
            flush(partial)
            os.replace(partial, path)
            return path
        except (OSError, http.client.HTTPException, ValueError) as error:
            code = getattr(error, "code", None)
            if code == 416:  # nothing left to fetch: what is there is too long, or of another file
                partial.unlink(missing_ok=True)
            if attempt == attempts or not (code is None or code == 416 or code in WORTH_ANOTHER_TRY):
                raise OSError(f"cannot download {url}: {error}, attempt {attempt} of {attempts}") from None
            report(f"{url}: {error}; again in {wait:.0f} s")
            time.sleep(wait)
            wait *= 2


def _fetch(url: str, partial: Path, timeout: float) -> None:
    """Append what is missing of a file."""
    there = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        goes_on = response.status == 206 and (response.headers["Content-Range"] or "").startswith(f"bytes {there}-")
        length, got = response.headers["Content-Length"], 0
        with open(partial, "ab" if goes_on else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                got += len(chunk)
        if length is not None and got < int(length):
            raise ConnectionError(f"it ended after {got:,} of {int(length):,} bytes")
