"""The machine at hand: which device and dtype to use, what the device can do, and how results name it."""

import glob
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

# Dense bfloat16 FLOP/s without sparsity, from the vendors' data sheets, by a part of the device's name.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "MI300X": 1307e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}

# Oldest NVIDIA driver for each major version of CUDA (CUDA release notes, "minor version compatibility").
OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}


def peak_flops(device_name: str) -> float | None:
    """Return the peak bfloat16 FLOP/s of a known device, or None."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def pick_device(name: str) -> torch.device:
    """Return the device that `name` (a torch device, or auto) stands for, checked and selected.

    auto is cuda (an NVIDIA GPU, or an AMD GPU with a ROCm build of torch), else mps (an Apple GPU), else the CPU; that
    with a warning on a machine whose GPUs torch cannot use. Under torchrun, cuda is the GPU of this process's local
    rank. It is selected before anything is allocated, so that no process takes memory on another's GPU.
    Raises ValueError for a device that cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "mps" and os.environ.get("WORLD_SIZE", "1") != "1":  # no collectives there
            name = "cpu"
        if name == "cpu" and (problem := unusable_gpus()):
            print(f"warning: {problem}; going on with the CPU", file=sys.stderr)
    try:
        device = torch.device(name)
        if device.type == "cuda":
            if device.index is None:
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, AttributeError) as error:  # the last where torch is built without CUDA
        raise ValueError(f"run.device: given {name!r}, which cannot be used: {str(error).splitlines()[0]}") from None
    return device


def no_triton(device: torch.device) -> str | None:
    """Return why this package's Triton kernels do not run on a device, or None where they do."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    return None if is_nvidia(device) else "the device is an AMD GPU, for which the kernels are not made"


def is_nvidia(device: torch.device) -> bool:
    """Return whether a device is an NVIDIA GPU. torch's builds for ROCm call AMD GPUs cuda too."""
    return device.type == "cuda" and torch.version.hip is None


def widest_float(device: torch.device) -> torch.dtype:
    """Return the dtype for sums on a device: float64, or float32 on Apple GPUs, which have nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all work that was given to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def count_gpus() -> int:
    """Return the number of GPUs that torch runs one process on each. CUDA_VISIBLE_DEVICES limits it.

    Raises ValueError where there are GPUs that torch cannot use: a driver too old, or a torch without CUDA.
    """
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    if problem := unusable_gpus():
        raise ValueError(f"{problem}, or set CUDA_VISIBLE_DEVICES=-1 to use the CPU")
    return 0


def unusable_gpus() -> str | None:
    """Return what keeps torch from the NVIDIA GPUs of this machine and what to do, or None where there are none.

    Call it where `torch.cuda.is_available()` is False. GPUs that CUDA_VISIBLE_DEVICES hides all do not count.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return None
    names, driver = [], "unknown"
    if glob.glob("/dev/nvidia[0-9]*") or shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
        try:
            lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
            driver, names = lines[0].split(", ")[0], [line.split(", ")[-1] for line in lines]
        except (OSError, subprocess.SubprocessError, IndexError):  # no driver, or one that does not work
            names = [Path(path).name for path in glob.glob("/dev/nvidia[0-9]*")]
    if not names:
        return None
    there = f"torch {torch.__version__} cannot use the {len(names)} GPUs here ({names[0]}, driver {driver})"
    if torch.version.cuda is None:
        return f"{there}: it was built without CUDA; install a wheel with CUDA (pytorch.org/get-started)"
    oldest, major = OLDEST_DRIVER.get(torch.version.cuda.split(".")[0], 0), driver.split(".")[0]
    if major.isdigit() and int(major) < oldest:
        return (
            f"{there}: it was built for CUDA {torch.version.cuda}, which needs driver {oldest} or newer; update the "
            "driver, or install a wheel of this torch for an older CUDA into .venv (pytorch.org/get-started)"
        )
    if visible is not None:
        return f"{there}: CUDA_VISIBLE_DEVICES={visible} names none of them; correct it"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"{there}: {str(error).splitlines()[0]}"
    return None


def check_installed(package: str, extra: str, what: str = "") -> None:
    """Raise ValueError unless a package that one of gkachat's extras brings is installed. `what` needs it."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{what}{package} is not installed: {how_to_install(extra)}")


def how_to_install(extra: str) -> str:
    """Return the command that installs one of gkachat's extras, with the directory where it works."""
    root = Path(__file__).parents[1]
    where = "" if root == Path.cwd() else f" in {root}"
    return f"pip install -e '.[{extra}]'{where}"


def check_compiler() -> None:
    """Raise ValueError unless Triton can compile its launcher, for which it looks for the same things.

    They are a C compiler and Python's C headers (triton/runtime/build.py).
    """
    compiler = os.environ.get("CC")
    found = shutil.which(compiler) if compiler else shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include", _header_scheme())) / "Python.h"
    missing = []
    if not found:
        missing.append(f"a C compiler (CC={compiler} is not there)" if compiler else "a C compiler (gcc or clang)")
    if not header.exists():
        missing.append(f"Python's headers ({header})")
    if missing:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ValueError(
            f"GPU kernels cannot be compiled without {' and '.join(missing)}: "
            f"apt-get install build-essential python{version}-dev, or the like"
        )


def _header_scheme() -> str:
    """Return the install scheme whose headers Triton includes. Debian's own has others."""
    scheme = sysconfig.get_default_scheme()
    return "posix_prefix" if scheme == "posix_local" else scheme


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of activations that `name` (a torch dtype, or auto) stands for on this device.

    auto is bfloat16 on CUDA GPUs and CPUs that multiply it in hardware, and float32 elsewhere.
    """
    if name == "auto":
        fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else cpu_multiplies_bfloat16()
        name = "bfloat16" if fast and device.type in ("cuda", "cpu") else "float32"
    return getattr(torch, name)


def cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions that multiply bfloat16: AVX512-BF16, AMX, or BF16 of ARM."""
    return any(cpu_has(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def multiplies_faster_from_the_left() -> bool:
    """Return whether this CPU multiplies bfloat16 faster with the smaller of two matrices on the left.

    It does with AVX512-BF16 alone. With AMX it reorders all of a right matrix. Other CPUs were not measured.
    """
    return cpu_has("avx512_bf16") and not cpu_has("amx_bf16")


def cpu_has(name: str) -> bool:
    """Return whether this CPU has instructions of a name that `torch.cpu.get_capabilities` uses.

    False with a torch that cannot tell (`get_capabilities` came after 2.11).
    """
    return getattr(torch.cpu, "get_capabilities", dict)().get(name, False)


def device_name(device: torch.device) -> str:
    """Return the GPU's name, "mps", or "cpu" and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "mps"
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'' if threads == 1 else 's'}"


def several(n: int, device: str) -> str:
    """Return the name of a device that n processes have one of each."""
    return device if n == 1 else f"{n} x {device}"


def physical_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far, by the device's allocator on cuda and by this process on a CPU; on mps, those
    that the driver holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
