"""Locks of files and directories. Tests of checkpoints and shards cover atomic writes."""

import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from filelock import FileLock

from gkachat.files import lock


def test_a_lock_is_held_until_its_context_is_left_and_a_second_one_says_why_it_fails(tmp_path):
    target = tmp_path / "runs" / "mine"  # neither exists
    with lock(target, busy="mine is in use") as held:
        assert held and [path.name for path in target.parent.iterdir()] == [".mine.lock"]
        with pytest.raises(FileExistsError, match="mine is in use"):
            lock(target, busy="mine is in use")
        lock(target.with_name("yours"), busy="")
    lock(target, busy="mine is in use")


def test_the_end_of_a_process_releases_its_lock(tmp_path):
    code = "import sys, pathlib, gkachat.files as f; l = f.lock(pathlib.Path(sys.argv[1]), busy=''); input('held')"
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.read(4) == b"held"
        with pytest.raises(FileExistsError):
            lock(tmp_path / "x", busy="")
        other.kill()
    assert lock(tmp_path / "x", busy="")


def test_who_waits_prints_so_once_and_goes_on_when_the_lock_is_free(tmp_path, capsys):
    order = []

    def second():
        with lock(tmp_path / "x", busy="waiting for x", wait=True) as held:
            order.append(bool(held))

    with lock(tmp_path / "x", busy=""):
        thread = threading.Thread(target=second)
        thread.start()
        told = ""
        while "waiting for x" not in told:
            told += capsys.readouterr().out
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", True] and told + capsys.readouterr().out == "waiting for x\n"


@pytest.mark.parametrize("error", [NotImplementedError, OSError(38, "Function not implemented")])
def test_on_a_file_system_without_locks_everyone_goes_on(error, tmp_path, monkeypatch):
    def acquire(self, **options):
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    for wait in (False, True):
        with lock(tmp_path / "x", busy="", wait=wait) as held:
            assert held is None
