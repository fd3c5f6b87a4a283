"""Devices, dtypes and how results name them."""

import platform
import subprocess
import sys

import pytest
import torch

from gkachat import machine
from gkachat.machine import commit, peak_flops, peak_memory, pick_device, pick_dtype


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"run\.device: given 'warp'"):
        pick_device("warp")


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


def test_memory_in_use_is_plausible():
    assert 50 * 2**20 < peak_memory(torch.device("cpu")) < 2**40


STEPS = """
import resource, torch
{ready}
x, w = torch.randn(2048, 192), torch.randn(192, 4096, requires_grad=True)
for step in range(12):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    (x @ w).relu().square().mean().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_steps_on_a_cpu_work_in_memory_that_is_there():
    def faults(ready):
        command = [sys.executable, "-c", STEPS.format(ready=ready)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("from gkachat.machine import pick_device; pick_device('cpu')") < faults("") / 3
