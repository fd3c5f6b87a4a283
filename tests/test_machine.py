"""Devices, dtypes and how results name them."""

import subprocess

import pytest
import torch

from gkachat import machine
from gkachat.machine import commit, peak_flops, peak_memory, pick_device, pick_dtype


def test_a_device_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"run\.device: given 'warp'"):
        pick_device("warp")


def test_each_rank_selects_its_own_gpu_before_it_allocates(monkeypatch):
    calls = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", device)))
    monkeypatch.setattr(torch, "empty", lambda size, device: calls.append(("empty", device)))
    assert pick_device("cuda") == torch.device("cuda", 3)
    assert calls == [("set_device", torch.device("cuda", 3)), ("empty", torch.device("cuda", 3))]


def test_a_cpu_computes_in_float32_unless_told_otherwise():
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu) == torch.float32 and pick_dtype("bfloat16", cpu) == torch.bfloat16


def test_peaks_are_known_by_the_vendors_names():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("cpu, 2 threads") is None


def test_the_commit_is_the_one_checked_out(tmp_path, monkeypatch):
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert head.startswith(commit().removesuffix("-dirty"))
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    assert commit() == "unknown"


def test_peak_memory_is_plausible():
    assert 50 * 2**20 < peak_memory(torch.device("cpu")) < 2**40
