"""Compile the Triton kernels for sm_90 without a GPU, and print what each candidate uses, one JSON object per line.

python tests/attention/kernels/kernel_resources.py        (not under TRITON_INTERPRET)
python tests/attention/kernels/kernel_resources.py --table        (a Markdown table of GKA's kernels)
PYTHONPATH=.:.venv/triton-3.6 python tests/attention/kernels/kernel_resources.py        (with another Triton)

`registers`, `spilled` (bytes) and `serialised` (whether wgmma products wait for each other: message C7515) come from
ptxas, `shared` (bytes) from Triton. `products`, `waits` and `loads` count the wgmma instructions, the waits for them
and the TMA loads of the PTX; `loop` counts the machine instructions of the loop over tiles. `narrow` lists 32-bit
products of two run-time numbers, which offsets must not contain.
Results are kept in Triton's cache, so that only the first run takes minutes.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from gkachat.attention.kernels import choose, decode_triton, gaussian_triton
from gkachat.benchmark import table

TARGET = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FLOAT32 = {
    "SIGMA", "LSE", "BIAS", "DOT_LSE", "DELTA", "DF_SUM", "DS_SUM", "DSIGMA", "MASK", "NORMS", "BIASES", "COS", "SIN",
    "MEAN", "KEY_TAPS", "VALUE_TAPS",
}  # other pointers have the dtype of x  # fmt: skip
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# Integers that need not be multiples of 16.
ANY_INTEGER = {"T", "H", "S", "window", "stride_mb", "stride_nb", "stride_nh", "first_split", "n_splits"}


def cases() -> list[tuple]:
    """Return each (kernel, dtype, constants, warps, stages). With rope, only the usual mask."""
    found, plain = [], {"INCLUDE_SELF": True, "CAUSAL": True}
    for mask in (plain, {"INCLUDE_SELF": False, "CAUSAL": True}, {"INCLUDE_SELF": True, "CAUSAL": False}):
        for separate_f in (False, True) if mask is plain else (False,):
            for (dtype, D), candidates in gaussian_triton.FORWARD.items():
                for BM, BN, *options in candidates:
                    constants = {"D": D, "BM": BM, "BN": BN, "SEPARATE_F": separate_f, **mask}
                    found.append((gaussian_triton.forward_kernel, DTYPES[dtype], constants, *options))
                for BM, BN, *options in gaussian_triton.BACKWARD[dtype, D, separate_f]:
                    constants = {"D": D, "BM": BM, "BN": BN, "SEPARATE_F": separate_f, **mask}
                    constants |= {} if separate_f else {"DX": None}
                    found.append((gaussian_triton.backward_kernel, DTYPES[dtype], constants, *options))
    for dtype in DTYPES.values():
        for D in choose.TRITON_HEAD_DIMS:
            for kernel in (
                gaussian_triton.bias_kernel, gaussian_triton.backward_rows_kernel, gaussian_triton.backward_sum_kernel,
            ):  # fmt: skip
                found.append((kernel, dtype, {"D": D, "BLOCK": gaussian_triton.ROWS}, 4, 3))
    nothing, of_taps = {"COS": None, "SIN": None}, ("BIASES", "KEY_TAPS", "VALUE_TAPS")
    for dtype in ("bf16", "fp32"):
        for D in (64, 128, 256):
            half, tile = decode_triton.tile_shape(D)
            gka = {"D": D, "HALF": half, "BN": tile, "SHARED_KV": True, "SCALE": 1.0, "stride_ns": 1, "N_TAPS": 1}
            gka |= dict.fromkeys(of_taps)
            softmax = {**gka, **nothing, "NORMS": None, "SIGMA": None, "SHARED_KV": False, "SCALE": D**-0.5}
            taps = {
                **gka,
                **nothing,
                "BN": decode_triton.tile_shape(D, 4)[1],
                "NORMS": None,
                "SIGMA": None,
                "N_TAPS": 4,
            }
            for name in of_taps:
                del taps[name]
            for constants in (gka, {**gka, **nothing}, softmax, taps):
                found.append((decode_triton.split_kernel, dtype, constants, 4, 3))
            constants = {"D": D, "HALF": half, "BN": decode_triton.SPLITS}
            found.append((decode_triton.combine_kernel, dtype, constants, 4, 3))
    return found


def resources(kernel, dtype: str, constants: dict, warps: int, stages: int) -> dict:
    """Return the figures that the module's docstring names, for one candidate."""
    names = list(inspect.signature(kernel.fn).parameters)
    descriptors = gaussian_triton.DESCRIPTORS.get(kernel, {})
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in descriptors:
            signature[name] = f"tensordesc<{dtype}[1,{constants[descriptors[name]]},1,{constants['D']}]>"
        elif name.isupper() and name not in ANY_INTEGER | {"T_PAD"}:
            signature[name] = "*fp32" if name in FLOAT32 else f"*{dtype}"
        else:
            signature[name] = "i32"
        # At run time, pointers, strides and T_PAD are multiples of 16.
        if name not in ANY_INTEGER and signature[name].startswith(("*", "i32")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    compiled = triton.compile(source, target=TARGET, options={"num_warps": warps, "num_stages": stages})
    cache = get_cache_manager(compiled.hash)
    kept = cache.get_file("figures.json")
    figures = json.loads(Path(kept).read_text()) if kept else inspect_code(compiled)
    if not kept:
        cache.put(json.dumps(figures), "figures.json", binary=False)
    return {
        "kernel": kernel.fn.__name__, "dtype": dtype, **constants, "warps": warps, "stages": stages, **figures,
        "shared": compiled.metadata.shared, "triton": triton.__version__,
    }  # fmt: skip


def inspect_code(compiled) -> dict:
    """Return what ptxas says of a compiled kernel, and counts of its instructions."""
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as directory:
        source, cubin = (Path(directory) / f"kernel.{suffix}" for suffix in ("ptx", "cubin"))
        source.write_text(ptx)
        ptxas = subprocess.run(
            [TOOLS / "ptxas", "-v", "-lineinfo", "--gpu-name=sm_90a", source, "-o", cubin],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"Used (\d+) registers", ptxas)[1]),
        "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill)", ptxas)),
        "serialised": "C7515" in ptxas,
        "products": ptx.count("wgmma.mma_async"),
        "waits": ptx.count("wgmma.wait_group"),
        "loads": ptx.count("cp.async.bulk.tensor"),
        "loop": loop_length(sass),
        "narrow": narrow_products(compiled.asm["ttir"]),
    }


def narrow_products(ttir: str) -> list[tuple[str, str]]:
    """Return the operands of 32-bit integer products in which neither is a constant."""
    constants = set(re.findall(r"(%\S+) = arith.constant", ttir))
    products = re.findall(r"arith\.muli (%\S+), (%\S+) : (?:tensor<[\dx]*)?i32", ttir)
    return [pair for pair in products if constants.isdisjoint(pair)]


def loop_length(sass: str) -> int | None:
    """Return the number of instructions of the longest loop with products, in machine code as cuobjdump prints it."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    # Behind the main program stand waits that jump back into it.
    end = next((at for at, text in code if re.match(r"EXIT", text)), 0)
    lengths = [0]
    for at, text in code:
        target = re.search(r"BRA.* 0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at < end:
            body = [line for place, line in code if int(target[1], 16) <= place <= at]
            lengths += [len(body)] if any("MMA" in line for line in body) else []
    return max(lengths) or None


COLUMNS = {
    "kernel": "{kernel}", "dtype": "{dtype}", "D": "{D}", "F is X": "{f_is_x}", "mask": "{mask}",
    "rows x columns": "{BM} x {BN}", "warps": "{warps}", "stages": "{stages}", "registers": "{registers}",
    "spilled": "{spilled}", "C7515": "{serialised}", "shared KiB": "{shared_kib:.0f}", "wgmma": "{products}",
    "waits": "{waits}", "TMA": "{loads}", "loop": "{loop}",
}  # fmt: skip


def markdown(rows: list[dict]) -> str:
    """Return a table of the kernels that multiply tiles."""
    rows = [row for row in rows if "BM" in row]
    for row in rows:
        mask = [] if row["CAUSAL"] else ["both sides"]
        mask += [] if row["INCLUDE_SELF"] else ["without self"]
        row |= {"mask": ", ".join(mask) or "causal", "f_is_x": "no" if row["SEPARATE_F"] else "yes"}
        row |= {"kernel": row["kernel"].split("_")[0], "shared_kib": row["shared"] / 1024}
        row["serialised"] = "yes" if row["serialised"] else "no"
    return table(rows, COLUMNS)


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda case: resources(*case), cases())
        if "--table" in sys.argv:
            print(markdown(list(found)))
        else:
            for row in found:
                print(json.dumps(row), flush=True)
