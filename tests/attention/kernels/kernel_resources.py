"""Compile the Triton kernels for sm_90 without a GPU, and print what each candidate uses, one JSON object per line.

python tests/attention/kernels/kernel_resources.py        (not under TRITON_INTERPRET)
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

from gkachat.attention.kernels import decode_triton, gaussian_triton

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FLOAT32 = {
    "SIGMA", "LSE", "BIAS", "DOT_LSE", "DELTA", "DSIGMA", "MASK", "NORMS", "COS", "SIN", "MEAN",
}  # other pointers have the dtype of x  # fmt: skip
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# Integers that need not be multiples of 16.
ANY_INTEGER = {"T", "H", "S", "window", "n_blocks", "stride_mb", "stride_nb", "stride_nh", "first_split", "n_splits"}


def cases() -> list[tuple]:
    """Return each (kernel, dtype, constants, warps, stages)."""
    found = []
    for include_self, causal in ((True, True), (False, True), (True, False)):
        mask = {"INCLUDE_SELF": include_self, "CAUSAL": causal}
        for (dtype, D), candidates in gaussian_triton.FORWARD.items():
            for BM, BN, *options in candidates:
                for separate_f in (False, True):
                    constants = {"D": D, "BM": BM, "BN": BN, "SEPARATE_F": separate_f, **mask}
                    found.append((gaussian_triton.forward_kernel, DTYPES[dtype], constants, *options))
        for dtype, D, separate_f in gaussian_triton.BACKWARD:
            for BM, BN, *options in gaussian_triton.backward_candidates(dtype, D, separate_f, causal):
                constants = {"D": D, "BM": BM, "BN": BN, "SEPARATE_F": separate_f, **mask}
                found.append((gaussian_triton.backward_kernel, DTYPES[dtype], constants, *options))
    nothing = {"COS": None, "SIN": None}
    for dtype in ("bf16", "fp32"):
        for D in (64, 128, 256):
            half, tile = decode_triton.tile_shape(D)
            gka = {"D": D, "HALF": half, "BN": tile, "SHARED_KV": True, "SCALE": 1.0, "stride_ns": 1}
            softmax = {**gka, **nothing, "NORMS": None, "SIGMA": None, "SHARED_KV": False, "SCALE": D**-0.5}
            for constants in (gka, {**gka, **nothing}, softmax):
                found.append((decode_triton.split_kernel, dtype, constants, 4, 3))
            constants = {"D": D, "HALF": half, "BN": decode_triton.SPLITS}
            found.append((decode_triton.combine_kernel, dtype, constants, 4, 3))
    return found


def resources(kernel, dtype: str, constants: dict, warps: int, stages: int) -> dict:
    """Return registers, bytes of spills and bytes of shared memory."""
    names = list(inspect.signature(kernel.fn).parameters)
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.isupper() and name not in ANY_INTEGER:
            signature[name] = "*fp32" if name in FLOAT32 else f"*{dtype}"
        else:
            signature[name] = "i32"
        # At run time, pointers and strides are multiples of 16.
        if name not in ANY_INTEGER and signature[name] != "constexpr":
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
