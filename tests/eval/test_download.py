"""A server that does everything wrong, and a file that arrives all the same, or a clear error."""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gkachat.eval.download import download

CONTENT = bytes(range(256)) * 2000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.ranges, self.content = [], [], CONTENT
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/bundle.zip"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        server.ranges.append(asked)
        fault = server.faults.pop(0) if server.faults else ""
        if isinstance(fault, int):
            self.send_error(fault)
            return
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and fault != "ignores ranges" else 0
        if first >= len(server.content) and asked:
            self.send_error(416)
            return
        body = server.content[first:]
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(body) + (1000 if fault == "promises more" else 0)))
        self.end_headers()
        if fault in ("truncates", "stalls"):
            body = body[: len(body) // 2]
        self.wfile.write(b"x" * len(body) if fault == "sends something else" else body)
        self.wfile.flush()
        if fault == "stalls":
            time.sleep(3)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def fetch(server, path, **options):
    return download(server.url, path, DIGEST, timeout=0.5, wait=0.01, report=lambda line: None, **options)


FAULTS = ["truncates", "stalls", "promises more", "sends something else", "ignores ranges", 500, 503, 429, 408]


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_is_survived(server, tmp_path, fault):
    server.faults = [fault]
    assert fetch(server, tmp_path / "bundle.zip").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.zip"]


def test_a_broken_attempt_is_gone_on_with(server, tmp_path):
    server.faults = ["truncates", "stalls", 503, "truncates"]
    assert fetch(server, tmp_path / "bundle.zip").read_bytes() == CONTENT
    starts = [int(r.removeprefix("bytes=").removesuffix("-")) for r in server.ranges[1:]]
    assert starts == sorted(starts) and starts[0] == len(CONTENT) // 2 and len(starts) == 4


def test_a_server_that_knows_no_ranges_is_read_from_the_start(server, tmp_path):
    server.faults = ["truncates", "ignores ranges"]
    assert fetch(server, tmp_path / "bundle.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("code", [403, 404, 401])
def test_a_refusal_is_not_asked_again(server, tmp_path, code):
    server.faults = [code] * 9
    with pytest.raises(OSError, match=rf"cannot download http.*bundle\.zip: HTTP Error {code}.*attempt 1 of 6"):
        fetch(server, tmp_path / "bundle.zip")
    assert len(server.ranges) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["sends something else", 500])
def test_what_never_works_is_given_up_and_what_stood_there_stays(server, tmp_path, fault):
    path = tmp_path / "bundle.zip"
    path.write_bytes(b"an older one")
    server.faults = [fault] * 9
    with pytest.raises(OSError, match=r"cannot download .*attempt 3 of 3"):
        fetch(server, path, attempts=3)
    assert path.read_bytes() == b"an older one" and len(server.ranges) == 3


def test_what_is_there_is_not_fetched(server, tmp_path):
    path = tmp_path / "bundle.zip"
    path.write_bytes(CONTENT)
    assert fetch(server, path) == path and not server.ranges


def test_leftovers_of_another_file_do_not_stay_in_the_way(server, tmp_path):
    (tmp_path / ".bundle.zip.part").write_bytes(b"y" * (len(CONTENT) + 5))
    assert fetch(server, tmp_path / "bundle.zip").read_bytes() == CONTENT


def test_nobody_there_is_an_error_that_names_the_address(tmp_path):
    with pytest.raises(OSError, match=r"cannot download http://127\.0\.0\.1:9/x: .*attempt 2 of 2"):
        download("http://127.0.0.1:9/x", tmp_path / "x", DIGEST, attempts=2, wait=0.01, report=lambda line: None)
