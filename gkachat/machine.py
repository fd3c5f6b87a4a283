"""The machine at hand: which device and dtype to use, what it can do, and how results name it."""

import ctypes
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

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def peak_flops(device_name: str) -> float | None:
    """Peak of a known device, or None."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def pick_device(name: str) -> torch.device:
    """A device from run.device, made ready. Raises ValueError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"run.device: given {name!r}, which cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Large blocks that are freed stay with this process, for its next ones.

    glibc gives them back to the system, which hands out zeroed pages again, one fault each: 1 to 7 % of a laptop's
    training. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Activations' dtype from run.dtype; auto gives a CPU float32: most have no bfloat16 arithmetic."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
    return getattr(torch, name)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: of the device's allocator on cuda, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def commit() -> str:
    """Of the code that runs, marked when the working tree differs."""
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
    """As the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
