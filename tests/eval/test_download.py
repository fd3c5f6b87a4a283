"""Downloads from a server that fails arrive whole and are continued, or end with a clear error."""

import hashlib
import http.server
import threading

import pytest

from gkachat.eval.download import download

CONTENT = bytes(range(256)) * 2000
HALF = len(CONTENT) // 2


@pytest.fixture
def server():
    """A server that fails as its list `faults` says, once each, then sends CONTENT. It records the `ranges` asked."""
    released = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            fault, asked = server.faults.pop(0) if server.faults else "", self.headers["Range"]
            server.ranges.append(asked)
            start = int(asked[len("bytes=") : -1]) if asked and fault != "ignores ranges" else 0
            if isinstance(fault, int) or start >= len(CONTENT):
                self.send_error(fault or 416)
                return
            body = CONTENT[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if fault in ("breaks off", "stalls"):
                body = body[: len(body) // 2]
            self.wfile.write(body[::-1] if fault == "sends something else" else body)
            if fault == "stalls":
                self.wfile.flush()
                released.wait(60)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.faults, server.ranges = [], []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    released.set()
    server.shutdown()
    server.server_close()


def fetch(server, path):
    url, digest = f"http://127.0.0.1:{server.server_port}/bundle.zip", hashlib.sha256(CONTENT).hexdigest()
    download(url, path, digest, timeout=0.5, attempts=4, wait=0.001, report=lambda line: None)


def test_a_full_disk_ends_it_at_once_and_names_the_file(server, tmp_path):
    (tmp_path / ".file.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write \S+/\.file\.part: No space left on device"):
        fetch(server, tmp_path / "file")
    assert len(server.ranges) == 1


@pytest.mark.parametrize("fault", ["breaks off", "stalls", "sends something else", 408, 429, 500, 503])
def test_a_fault_is_survived_and_the_file_is_whole(server, tmp_path, fault):
    server.faults = [fault]
    fetch(server, tmp_path / "bundle.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.zip"]
    assert (tmp_path / "bundle.zip").read_bytes() == CONTENT and len(server.ranges) == 2


def test_an_attempt_continues_where_the_last_one_broke_off(server, tmp_path):
    server.faults = ["breaks off", 503, "breaks off"]
    fetch(server, tmp_path / "bundle.zip")
    assert server.ranges == [None, f"bytes={HALF}-", f"bytes={HALF}-", f"bytes={HALF + HALF // 2}-"]
    assert (tmp_path / "bundle.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("faults", [["breaks off", "ignores ranges"], []])
def test_a_partial_file_that_cannot_be_continued_is_replaced(server, tmp_path, faults):
    server.faults = faults
    if not faults:
        (tmp_path / ".bundle.zip.part").write_bytes(b"y" * (len(CONTENT) + 5))  # of another file
    fetch(server, tmp_path / "bundle.zip")
    assert (tmp_path / "bundle.zip").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (404, "HTTP Error 404.*attempt 1 of 4"),  # not tried again
        (500, "HTTP Error 500.*attempt 4 of 4"),
        ("sends something else", "its SHA-256 is .*, expected .*attempt 4 of 4"),
    ],
)
def test_a_download_that_never_works_leaves_nothing_and_is_a_clear_error(server, tmp_path, fault, words):
    server.faults = [fault] * 9
    with pytest.raises(OSError, match=rf"cannot download http://127.*bundle\.zip: {words}"):
        fetch(server, tmp_path / "bundle.zip")
    assert not list(tmp_path.iterdir())
