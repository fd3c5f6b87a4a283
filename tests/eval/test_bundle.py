"""CORE bundles: directory and zip read alike, and damage is named with file and line."""

import json
import re
import shutil
import zipfile

import pytest
from test_core import SMALL, choice, write_bundle

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


ONE_TASK = {
    "a broken line": (replaced(MC, '2:", "choices"', '2:" "choices"'), r"mc\.jsonl, line 3 cannot be read: Expecting"),
    "a missing key": (replaced(MC, '"gold": 1', '"silver": 1'), r"mc\.jsonl, line 2: no 'gold'"),
    "an answer that is none of the choices": (replaced(MC, '"gold": 2', '"gold": 3'), r"mc\.jsonl, line 3.*gold is"),
    "a number for a text": (replaced(MC, '"Question 0:"', "7"), r"mc\.jsonl, line 1.*: query is not a text"),
    "a list for a row": (replaced(MC, "{", "[{"), r"mc\.jsonl, line 1 "),
    "deep nesting": (replaced(MC, "{", "[" * 100_000), r"mc\.jsonl, line 1 "),
    "choices in no list": (replaced(MC, '["import os 0", "import os", "no"]', '"no"'), "line 1.*: choices is not a"),
    "nothing to continue": (replaced("eval_data/lm.jsonl", "3 or so", " "), r"lm\.jsonl, line 4.*: nothing is to"),
    "too few rows": (replaced("core.yaml", "[3]", "[12]"), r"mc\.jsonl: given 12 rows"),
    "an unknown kind": (replaced("core.yaml", "multiple_choice", "guessing"), "icl_task_type is not one of"),
    "no baseline": (replaced("eval_meta_data.csv", "mc,", "m,"), "from 0 to below 100"),
    "a file elsewhere": (replaced("core.yaml", "mc.jsonl", "../../secret.jsonl"), "lies outside the bundle"),
}
DAMAGES = {
    "broken YAML": (replaced("core.yaml", "-", "{"), r"core\.yaml cannot be read"),
    "deep YAML": (replaced("core.yaml", "icl_tasks:", "x: " + "[" * 3_000), r"core\.yaml cannot be read"),
    "a tag that runs code": (
        replaced("core.yaml", "label: mc", "label: !!python/object/apply:os.getcwd []"), r"core\.yaml cannot be read",
    ),
    "a baseline of nothing": (replaced("eval_meta_data.csv", "mc,25", "mc,"), r"eval_meta_data\.csv cannot be read"),
    "no core.yaml": (lambda directory: (directory / "core.yaml").unlink(), r"core\.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_TASK)
def test_a_task_that_is_damaged_is_named_and_the_others_are_read(name, small):
    damage, words = ONE_TASK[name]
    (small.parent / "secret.jsonl").write_text(json.dumps(choice(0)))
    damage(small)
    tasks, [reason] = bundles.read_bundle(small)
    assert {task.label for task in tasks} < SMALL.keys() and len(tasks) == 2
    assert re.search(words, reason) and len(reason) < 1000


def test_a_bundle_of_which_no_task_can_be_scored_is_an_error_with_the_reasons(small):
    replaced("core.yaml", "label: mc", "label: nc")(small)
    for name in ("lm", "schema"):
        (small / "eval_data" / f"{name}.jsonl").unlink()
    with pytest.raises(ValueError, match=r"bundle: nc: eval_meta_data\.csv: expected a Random baseline"):
        bundles.read_bundle(small)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_bundle_is_an_error_that_says_where(name, small):
    damage, words = DAMAGES[name]
    damage(small)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        bundles.read_bundle(small)
    assert len(str(caught.value)) < 1000


def test_a_link_out_of_the_bundle_is_not_followed(small):
    shutil.move(small / MC, small.parent / "mc.jsonl")
    (small / MC).symlink_to(small.parent / "mc.jsonl")
    [reason] = bundles.read_bundle(small)[1]
    assert "lies outside" in reason


def test_a_zip_bomb_is_not_unpacked(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bundles, "MAX_BYTES", 2**16)
    (small / "eval_data" / "lm.jsonl").write_bytes(b" " * 2**24)
    [reason] = bundles.read_bundle(zip_bundle(small, tmp_path / "b.zip"))[1]
    assert "lm.jsonl has more than 65,536 bytes" in reason


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


def test_the_bundle_is_downloaded_once_and_a_failure_names_the_way_around(monkeypatch, tmp_path):
    monkeypatch.setenv("GKACHAT_HOME", str(tmp_path))

    def fail(*args):
        raise OSError("cannot download it")

    monkeypatch.setattr(bundles, "download", fail)
    with pytest.raises(OSError, match="cannot download it; --bundle PATH reads"):
        bundles.fetch_bundle()
    path = tmp_path / "core" / "eval_bundle.zip"
    path.parent.mkdir()
    path.touch()
    assert bundles.fetch_bundle() == path
