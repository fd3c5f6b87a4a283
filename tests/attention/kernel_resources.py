"""Compiles the fused kernel for sm_90 without a GPU and prints, a JSON object a line, what each candidate takes of it.

python tests/attention/kernel_resources.py        (not under TRITON_INTERPRET)
"""

import inspect
import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gkachat.attention import triton_gka as kernels

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FLOAT32 = {"NORM", "SIGMA", "LSE", "HEIGHT", "LEVEL", "DELTA", "DSIGMA"}  # the other pointers have the dtype of x


DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def cases() -> list[tuple]:
    forward = [
        (kernels.forward_kernel, DTYPES[dtype], D, two, candidate)
        for (dtype, D), candidates in kernels.FORWARD.items()
        for candidate in candidates
        for two in (False, True)
    ]
    backward = [
        (kernels.backward_kernel, DTYPES[dtype], D, two, candidate)
        for (dtype, D, two), candidates in kernels.BACKWARD.items()
        for candidate in candidates
    ]
    return [(*case[:4], include_self, case[4]) for case in forward + backward for include_self in (True, False)]


def resources(kernel, dtype: str, D: int, two: bool, include_self: bool, candidate: tuple) -> dict:
    """Registers, bytes of spills, bytes of shared memory."""
    rows, columns, warps, stages = candidate
    constants = {"D": D, "BM": rows, "BN": columns, "SELF": include_self, "TWO": two}
    names = list(inspect.signature(kernel.fn).parameters)
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.isupper() and name not in ("T", "H"):
            signature[name] = "*fp32" if name in FLOAT32 else f"*{dtype}"
        else:
            signature[name] = "i32"
        # As at run time: pointers and strides are multiples of 16.
        if name not in constants and name not in ("T", "H", "window", "n_shares"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    compiled = triton.compile(source, target=TARGET, options={"num_warps": warps, "num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        said = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    stack, local, registers = (int(re.search(rf"{what}:(\d+)", said)[1]) for what in ("STACK", "LOCAL", "REG"))
    return {
        "kernel": kernel.fn.__name__, "dtype": dtype, "D": D, "two": two, "self": include_self, "candidate": candidate,
        "registers": registers, "spilled": stack + local, "shared": compiled.metadata.shared,
    }  # fmt: skip


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(lambda case: resources(*case), cases()):
            print(json.dumps(row), flush=True)
