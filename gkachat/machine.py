"""The machine at hand: which device and dtype to use, what the device can do, and how results name it."""

import os
import platform
import resource
import subprocess
from pathlib import Path

import torch

# Dense bfloat16 FLOP/s without sparsity, from the vendors' data sheets, by a part of the device's name.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(device_name: str) -> float | None:
    """Return the peak bfloat16 FLOP/s of a known device, or None."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def pick_device(name: str) -> torch.device:
    """Return the device that `name` (a torch device, or auto) stands for, checked and selected.

    Under torchrun, cuda is the GPU of this process's local rank. It is selected before anything is allocated, so that
    no process takes memory on another's GPU. Raises ValueError for a device that cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            if device.index is None:
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"run.device: given {name!r}, which cannot be used: {str(error).splitlines()[0]}") from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of activations that `name` (a torch dtype, or auto) stands for on this device.

    auto is bfloat16 on GPUs that compute in it, and float32 elsewhere: most CPUs have no bfloat16 arithmetic.
    """
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
    return getattr(torch, name)


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or "cpu" and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: by the device's allocator on cuda, by this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def commit() -> str:
    """Return the commit of the running code, with "-dirty" when the working tree differs, or "unknown"."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """Return the CPU's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
