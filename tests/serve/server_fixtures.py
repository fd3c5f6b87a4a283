"""Fixtures of the server's tests: runs, and a server for all tests of a module."""

import time

import pytest
import torch
from conftest import untrained_run
from servers import CONTEXT, serving

from gkachat.inference.chat import ChatSession
from gkachat.inference.engine import Batch
from gkachat.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A home with an untrained run of each attention: `softmax` continues text, `gka` and `gka_conv` are tuned."""
    home = tmp_path_factory.mktemp("served")
    tokenizer = train_tokenizer(["import os\ndef f(x = 1):\n <b>turn</b> 0 1 2 3 é 漢\n" * 9], 300)
    torch.manual_seed(0)
    for name, tuned in (("softmax", False), ("gka", True), ("gka_conv", True)):
        untrained_run(home, name, tokenizer, tuned=tuned, attention=name, sequence_len=CONTEXT)
    untrained_run(home, "long", tokenizer, sequence_len=8192)
    return home


@pytest.fixture(scope="session")
def sessions(home):
    return {name: ChatSession.from_run(home / "runs" / name, device="cpu") for name in ("softmax", "gka", "gka_conv")}


@pytest.fixture(scope="session")
def server(sessions):
    with serving(sessions, rows=4) as server:
        yield server


@pytest.fixture
def slow(monkeypatch):
    """Make every decode step take 30 ms, so that answers of this test are long."""
    step = Batch.step

    def slow_step(batch):
        time.sleep(0.03)
        return step(batch)

    monkeypatch.setattr(Batch, "step", slow_step)
