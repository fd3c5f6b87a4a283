"""Compile the fused kernels of loss and features for sm_90 without a GPU, and print what each uses, as JSON lines.

python tests/fused_resources.py loss        (or features; not under TRITON_INTERPRET)
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def resources(kernel, types: dict[str, str], constants: dict, warps: int, stages: int = 3) -> dict:
    """Return registers, bytes of spills and of shared memory. A type that ends in /16 is a multiple of 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name].removesuffix("/16") for name in names}
    aligned = [(i,) for i, name in enumerate(names) if name not in constants and types[name].endswith("/16")]
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()},
        {index: [["tt.divisibility", 16]] for index in aligned},
    )  # fmt: skip
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        command = [CUOBJDUMP, "--dump-resource-usage", cubin.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, local, registers = (int(re.search(rf"{what}:(\d+)", said)[1]) for what in ("STACK", "LOCAL", "REG"))
    return {
        "kernel": kernel.fn.__name__, **types, **constants, "warps": warps, "registers": registers,
        "spilled": stack + local, "shared": compiled.metadata.shared,
    }  # fmt: skip


def loss() -> list[tuple]:
    """Return each case of the loss kernel, as `resources` takes it: the dtypes, with gradients and without."""
    from gkachat.model.loss_triton import BLOCK, WARPS, loss_kernel

    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        types = {"LOGITS": f"*{dtype}/16", "TARGETS": "*i64", "LOSSES": "*fp32", "stride": "i32/16", "V": "i32"}
        for gradients in (True, False):
            found.append((loss_kernel, types, {"BLOCK": BLOCK, "GRADIENTS": gradients}, WARPS))
    return found


def features() -> list[tuple]:
    """Return each case of the kernels of convolved features: the dtypes and the widths of tiles."""
    from gkachat.attention import features_triton as module

    found = []
    for dtype in ("bf16", "fp32"):
        for D in (64, 128, 256):
            (rows, columns), (chunks, width) = module.forward_tile(D), module.backward_tile(D)
            backward = {"D": D, "BD": width, "CHUNKS": chunks, "CHUNK": module.CHUNK}
            for kernel, constants in (
                (module.forward_kernel, {"BT": rows, "BD": columns}),
                (module.backward_kernel, backward),
            ):
                types = {}
                for name in kernel.arg_names:
                    if name.startswith("stride") or name == "D":
                        types[name] = "i32/16"
                    elif (name.isupper() and len(name) > 1) or name in "XQKV":
                        single = name in ("WQ", "WK", "WV", "GAIN", "SUM", "BIAS", "DW", "DGAIN")
                        types[name] = f"*{'fp32' if single else dtype}/16"
                    else:
                        types[name] = "i32"
                found.append((kernel, types, constants, 4))
    return found


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(lambda case: resources(*case), {"loss": loss, "features": features}[sys.argv[1]]()):
            print(json.dumps(row))
