"""Build the null GPU against the CUDA wheels that an environment has: python build.py PYTHON OUT

PYTHON is the interpreter of an environment with torch's CUDA build. OUT gets libcuda.so.1, which is the driver, the
runtime, cuBLAS, cuDNN and NCCL at once. The C files here define the functions whose answer matters; all others that the
wheels' libraries export, or that cuda.h declares, are generated: they do nothing and return success.
"""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = ("runtime.c", "driver.c", "libraries.c", "nccl.c")
LIBRARIES = {  # in site-packages: prefix of the functions that stand in for the library's
    "nvidia/cu13/lib/libcudart.so.13": ("cuda", "__cuda"),
    "nvidia/cu13/lib/libcublas.so.13": ("cublas",),
    "nvidia/cu13/lib/libcublasLt.so.13": ("cublasLt",),
    "nvidia/cudnn/lib/libcudnn.so.9": ("cudnn",),
    "nvidia/nccl/lib/libnccl.so.2": ("nccl",),
}
INCLUDE = ("nvidia/cu13/include", "nvidia/cudnn/include", "nvidia/nccl/include")
WITHOUT = ("-D__CUDA_FP16_H__", "-D__CUDA_BF16_H__")  # headers of number types, which need more wheels
COMPILER_INCLUDE = "triton/backends/nvidia/include"  # has the crt/ folder, which is otherwise in the wheel of nvcc


def exported_functions(nm_output: str) -> set[str]:
    """Return the functions in the output of `nm -D --defined-only`, without their versions."""
    lines = (line.split() for line in nm_output.splitlines())
    return {words[2].split("@")[0] for words in lines if len(words) == 3 and words[1] in "TWi"}


def driver_functions(cuda_h: str) -> set[str]:
    """Return the functions that cuda.h declares, and their second versions, which programs ask for by name."""
    names = set(re.findall(r"CUDAAPI\s+(cu[A-Z]\w*)\s*\(", cuda_h))
    return names | {f"{name}_v2" for name in names if not re.search(r"_v\d$", name)}


def stubs(wanted: set[str], defined: set[str]) -> str:
    """Return C functions that do nothing, for the wanted names that are not defined elsewhere."""
    return "".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(wanted - defined))


def nm(path: Path, *options: str) -> str:
    return subprocess.run(["nm", *options, path], capture_output=True, text=True, check=True).stdout


def build(packages: Path, out: Path) -> Path:
    """Build the library in `out` from the wheels in site-packages, and return its path.

    Raises FileNotFoundError where a wheel is missing, CalledProcessError where gcc fails.
    """
    wanted = driver_functions((packages / INCLUDE[0] / "cuda.h").read_text())
    for library, prefixes in LIBRARIES.items():
        if not (packages / library).exists():
            raise FileNotFoundError(f"{packages / library}: not there; install torch's CUDA 13 build from PyPI")
        wanted |= {
            f for f in exported_functions(nm(packages / library, "-D", "--defined-only")) if f.startswith(prefixes)
        }
    out.mkdir(parents=True, exist_ok=True)
    compile = ["gcc", "-std=gnu11", "-O1", "-Wall", "-Wno-deprecated-declarations", "-fPIC", "-c", *WITHOUT]
    include = [f"-I{packages / folder}" for folder in (*INCLUDE, COMPILER_INCLUDE)]
    objects, defined = [], set()
    for source in SOURCES:
        objects.append(out / Path(source).with_suffix(".o"))
        subprocess.run([*compile, *include, HERE / source, "-o", objects[-1]], check=True)
        defined |= exported_functions(nm(objects[-1], "--defined-only"))
    (out / "stubs.c").write_text(stubs(wanted, defined))
    objects.append(out / "stubs.o")
    subprocess.run([*compile, "-w", "-fno-builtin", out / "stubs.c", "-o", objects[-1]], check=True)
    library = out / "libcuda.so.1"
    link = ["gcc", "-shared", f"-Wl,-soname,{library.name}", *objects, "-o", library, "-ldl", "-lpthread", "-lrt"]
    subprocess.run(link, check=True)
    linked = out / "libcuda.so"  # the name that linkers look for
    linked.unlink(missing_ok=True)
    linked.symlink_to(library.name)
    return library


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    show = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = subprocess.run([sys.argv[1], "-c", show], capture_output=True, text=True, check=True).stdout.strip()
    try:
        print(build(Path(packages), Path(sys.argv[2]).resolve()))
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
