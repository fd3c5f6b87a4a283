"""Download of a file that arrives whole or not at all."""

import http.client
import os
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from gkachat.files import WriteError, flush, naming, sha256

CHUNK = 2**20
RETRIED = {None, 408, 416, 425, 429, 500, 502, 503, 504}  # HTTP codes; None: an error below HTTP


def download(
    url: str,
    path: Path,
    digest: str,
    *,
    timeout: float = 30.0,
    attempts: int = 6,
    wait: float = 1.0,
    report: Callable[[str], None] = print,
) -> None:
    """Download a file to `path` if its SHA-256 is `digest`. Each attempt continues where the last one broke off.

    Args:
        timeout: seconds of silence that end an attempt.
        wait: seconds before the second attempt; they double with each further one.

    Raises OSError that names the URL and what was wrong with the last attempt.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    for attempt in range(1, attempts + 1):
        try:
            _fetch_rest(url, partial, timeout)
            if (found := sha256(partial)) != digest:
                partial.unlink()
                raise OSError(f"its SHA-256 is {found}, expected {digest}")
            flush(partial)
            os.replace(partial, path)
            return
        except WriteError:  # no other attempt would succeed
            raise
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", None)
            if code == 416:  # the partial file is as long as the whole or longer, so it is another file's
                partial.unlink(missing_ok=True)
            if attempt == attempts or code not in RETRIED:
                raise OSError(f"cannot download {url}: {error}, attempt {attempt} of {attempts}") from None
            report(f"{url}: {error}; trying again in {wait:.0f} s")
            time.sleep(wait)
            wait *= 2


def _fetch_rest(url: str, partial: Path, timeout: float) -> None:
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        # A server that ignores the range sends the whole file, with status 200.
        continues = (response.headers["Content-Range"] or "").startswith(f"bytes {start}-")
        with naming(partial):
            file = open(partial, "ab" if continues else "wb", buffering=0)  # noqa: SIM115 (closed below)
        with file:
            while chunk := response.read(CHUNK):
                with naming(partial):
                    file.write(chunk)
        if response.length:
            raise ConnectionError(f"the connection ended {response.length:,} bytes early")
