"""CORE bundles: directory and zip read alike, damage is named with file and line, and downloads are checked."""

import hashlib
import http.server
import json
import shutil
import threading
import zipfile

import pytest
from test_core import SMALL, choice, write_bundle

from gkachat.config import home
from gkachat.eval import bundle as bundles

MC = "eval_data/mc.jsonl"


@pytest.fixture
def small(tmp_path):
    return write_bundle(tmp_path / "bundle", SMALL)


def zip_bundle(directory, path, folder=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in directory.rglob("*.*"):
            archive.write(file, folder + str(file.relative_to(directory)))
        archive.writestr("../../evil.txt", "x")
    return path


@pytest.mark.parametrize("folder", ["", "eval_bundle/"])
def test_a_zip_is_read_as_its_directory_is_and_not_unpacked(small, folder, tmp_path):
    path = zip_bundle(small, tmp_path / "b.zip", folder)
    assert bundles.read_bundle(path) == bundles.read_bundle(small)
    assert not list(tmp_path.parent.glob("evil*"))


def replaced(name, old, new):
    def damage(directory):
        text = (directory / name).read_text()
        assert old in text
        (directory / name).write_text(text.replace(old, new, 1))

    return damage


DAMAGES = {
    "a broken line": (replaced(MC, '"Question 2:", "choices"', '"Question 2:" "choices"'), r"mc\.jsonl, line 3: Exp"),
    "a missing key": (replaced(MC, '"gold": 1', '"silver": 1'), r"mc\.jsonl, line 2: no 'gold'"),
    "an answer that is none of the choices": (replaced(MC, '"gold": 2', '"gold": 3'), r"mc\.jsonl, line 3: gold is no"),
    "a number for a text": (replaced(MC, '"Question 0:"', "7"), r"mc\.jsonl, line 1: query is not a text"),
    "a list for a row": (replaced(MC, "{", "[{"), r"mc\.jsonl, line 1: "),
    "deep nesting": (replaced(MC, "{", "[" * 100_000), r"mc\.jsonl, line 1: "),
    "choices in no list": (replaced(MC, '["import os 0", "import os", "no"]', '"no"'), "line 1: choices is not a"),
    "nothing to continue": (replaced("eval_data/lm.jsonl", "3 or so", " "), r"lm\.jsonl, line 4: nothing is to"),
    "too few rows": (replaced("core.yaml", "[3]", "[12]"), r"mc\.jsonl: given 12 rows"),
    "broken YAML": (replaced("core.yaml", "-", "{"), r"core\.yaml cannot be read"),
    "deep YAML": (replaced("core.yaml", "icl_tasks:", "x: " + "[" * 20_000), r"core\.yaml cannot be read"),
    "a tag that runs code": (
        replaced("core.yaml", "label: mc", "label: !!python/object/apply:os.getcwd []"), r"core\.yaml cannot be read",
    ),
    "an unknown kind": (replaced("core.yaml", "multiple_choice", "guessing"), "icl_task_type is not one of"),
    "no baseline": (replaced("eval_meta_data.csv", "mc,", "m,"), "from 0 to below 100 for mc"),
    "a baseline of nothing": (replaced("eval_meta_data.csv", "mc,25", "mc,"), r"eval_meta_data\.csv cannot be read"),
    "a file elsewhere": (replaced("core.yaml", "mc.jsonl", "../../secret.jsonl"), "lies outside the bundle"),
    "no core.yaml": (lambda directory: (directory / "core.yaml").unlink(), r"core\.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_bundle_is_an_error_that_says_where(name, small):
    damage, words = DAMAGES[name]
    (small.parent / "secret.jsonl").write_text(json.dumps(choice(0)))
    damage(small)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        bundles.read_bundle(small)
    assert len(str(caught.value)) < 1000


def test_a_link_out_of_the_bundle_is_not_followed(small):
    shutil.move(small / MC, small.parent / "mc.jsonl")
    (small / MC).symlink_to(small.parent / "mc.jsonl")
    with pytest.raises(ValueError, match="lies outside"):
        bundles.read_bundle(small)


def test_a_zip_bomb_is_not_unpacked(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bundles, "MAX_BYTES", 2**16)
    (small / "eval_data" / "lm.jsonl").write_bytes(b" " * 2**24)
    with pytest.raises(ValueError, match=r"lm\.jsonl has more than 65,536 bytes"):
        bundles.read_bundle(zip_bundle(small, tmp_path / "b.zip"))


@pytest.mark.parametrize("damage", ["empty", "not a zip", "half zeros"])
def test_a_damaged_zip_is_named(small, tmp_path, damage):
    data = bytearray(zip_bundle(small, tmp_path / "b.zip").read_bytes())
    data[40:120] = bytes(80)
    content = {"empty": b"", "not a zip": b"PK\x03\x04 not a zip", "half zeros": data}[damage]
    (tmp_path / "b.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.zip"):
        bundles.read_bundle(tmp_path / "b.zip")


def test_a_cut_to_nothing_and_a_missing_bundle_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match="max_per_task: given 0"):
        bundles.read_bundle(small, 0)
    for name in ("nowhere", "nowhere.zip"):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            bundles.read_bundle(tmp_path / name)


CONTENT = bytes(range(256)) * 2000


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server that fails as its list `faults` says, once each, then gives CONTENT."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            fault = server.faults.pop(0) if server.faults else ""
            if isinstance(fault, int):
                self.send_error(fault)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:1000] if fault == "truncates" else CONTENT[::-1] if fault else CONTENT)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.faults = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GKACHAT_HOME", str(tmp_path))
    monkeypatch.setattr(bundles, "URL", f"http://127.0.0.1:{server.server_port}/eval_bundle.zip")
    monkeypatch.setattr(bundles, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(bundles, "WAIT", 0.001)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("fault", ["truncates", "sends something else", 500, 503, 429])
def test_a_download_survives_faults_and_is_kept(server, fault):
    server.faults = [fault, fault]
    path = bundles.fetch_bundle(report=lambda line: None)
    assert path.read_bytes() == CONTENT and path == home() / "core" / "eval_bundle.zip"
    assert list(path.parent.iterdir()) == [path]
    server.faults = [404] * 9
    assert bundles.fetch_bundle() == path  # without asking the server


@pytest.mark.parametrize(("fault", "words"), [("sends something else", "its SHA-256 is "), (404, "HTTP Error 404")])
def test_a_download_that_never_works_leaves_nothing_and_names_the_way_around(server, fault, words):
    server.faults = [fault] * 9
    with pytest.raises(OSError, match=rf"cannot download http://127.*{words}.*--bundle PATH"):
        bundles.fetch_bundle(report=lambda line: None)
    assert not (home() / "core" / "eval_bundle.zip").exists()
