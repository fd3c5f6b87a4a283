"""Compiles the fused kernels for sm_90 without a GPU and prints, a JSON object a line, what each candidate takes of it.

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

from gkachat.attention import triton_decode as decoding
from gkachat.attention import triton_gka as kernels

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FLOAT32 = {
    "SIGMA", "LSE", "HEIGHT", "LEVEL", "DELTA", "DSIGMA", "MASK", "NORMS", "COS", "SIN", "SCALE", "MEAN", "WEIGHT",
}  # the other pointers have the dtype of x  # fmt: skip
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
NUMBERS = {"T", "H", "K", "window", "n_shares", "mask_b", "norm_b", "norm_h", "first", "n_splits"}  # of any value


def cases() -> list[tuple]:
    """(kernel, dtype, its constants, warps, stages)"""
    found = []
    for include_self, causal in ((True, True), (False, True), (True, False)):
        for (dtype, D), candidates in kernels.FORWARD.items():
            for rows, columns, *options in candidates:
                for two in (False, True):
                    constants = {"D": D, "BM": rows, "BN": columns, "SELF": include_self, "TWO": two, "CAUSAL": causal}
                    found.append((kernels.forward_kernel, DTYPES[dtype], constants, *options))
        for dtype, D, two in kernels.BACKWARD:
            for rows, columns, *options in kernels.backward_candidates(dtype, D, two, causal):
                constants = {"D": D, "BM": rows, "BN": columns, "SELF": include_self, "TWO": two, "CAUSAL": causal}
                found.append((kernels.backward_kernel, DTYPES[dtype], constants, *options))
    nothing = {"COS": None, "SIN": None}
    for dtype in ("bf16", "fp32"):
        for D in (64, 128, 256):
            half, tile = decoding.shape(D)
            gka = {"D": D, "HALF": half, "BN": tile, "ONE": True, "PER_HEAD": True, "norm_k": 1}
            softmax = {**gka, **nothing, "NORMS": None, "ONE": False, "PER_HEAD": False}
            for constants in (gka, {**gka, **nothing}, softmax):
                found.append((decoding.split_kernel, dtype, constants, 4, 3))
            constants = {"D": D, "HALF": half, "BN": decoding.SPLITS}
            found.append((decoding.combine_kernel, dtype, constants, 4, 3))
    return found


def resources(kernel, dtype: str, constants: dict, warps: int, stages: int) -> dict:
    """Registers, bytes of spills, bytes of shared memory."""
    names = list(inspect.signature(kernel.fn).parameters)
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "SCALE" and not constants["PER_HEAD"]:
            signature[name] = "fp32"
        elif name.isupper() and name not in NUMBERS:
            signature[name] = "*fp32" if name in FLOAT32 else f"*{dtype}"
        else:
            signature[name] = "i32"
        # As at run time: pointers and strides are multiples of 16.
        if name not in NUMBERS and signature[name] not in ("constexpr", "fp32"):
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
        "kernel": kernel.fn.__name__, "dtype": dtype, **constants, "warps": warps, "stages": stages,
        "registers": registers, "spilled": stack + local, "shared": compiled.metadata.shared,
    }  # fmt: skip


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(lambda case: resources(*case), cases()):
            print(json.dumps(row), flush=True)
