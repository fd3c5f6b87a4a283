"""The null GPU: which functions are generated, and that the library is whole where there are CUDA wheels."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import steps

import build


def test_functions_are_those_that_a_library_exports_without_their_versions():
    table = "0001 T cudaMalloc@@libcudart.so.13\n0002 t local\n0003 D data\n     U needed\n0004 W weak\n0005 i indirect"
    assert build.exported_functions(table) == {"cudaMalloc", "weak", "indirect"}


def test_driver_functions_have_second_versions():
    header = "CUresult CUDAAPI cuInit(unsigned int Flags);\nCUresult CUDAAPI cuMemFree_v2(CUdeviceptr p);"
    assert build.driver_functions(header) == {"cuInit", "cuInit_v2", "cuMemFree_v2"}


def test_a_step_that_echoes_shows_its_output_and_keeps_it(tmp_path, capsys):
    step = steps.run_step(tmp_path, "data_prep", ["echo", "train_00000 5 tokens"], {}, tmp_path, echo=True)
    assert step.code == 0 and capsys.readouterr().out == step.output == "train_00000 5 tokens\n"


def test_nothing_is_generated_twice():
    assert build.stubs({"a", "b", "c"}, defined={"b"}) == "long a(void) { return 0; }\nlong c(void) { return 0; }\n"


@pytest.mark.parametrize(
    ("command", "label"),
    [
        ("-m scripts.cost --config configs/d20.toml", "cost"),
        ("-m scripts.base_train configs/d20.toml --resume --model.attention gka --run.name a", "base_train a"),
        ("-m torch.distributed.run --standalone -m scripts.base_eval a --eval core", "base_eval a core"),
        ("-m scripts.chat_eval a_chat --tasks addition counting", "chat_eval a_chat"),
    ],
)
def test_a_step_is_named_by_its_script_and_its_run(command, label):
    assert steps.label_of(command.split()) == label


def test_the_library_has_every_function_that_torch_needs(tmp_path):
    torch = Path(importlib.util.find_spec("torch").origin).parent
    if not (torch.parent / "nvidia/cu13/lib/libcudart.so.13").exists():
        pytest.skip("needs torch's CUDA build, and its wheels; this one has none")
    library = build.build(torch.parent, tmp_path)
    defined = build.exported_functions(build.nm(library, "-D", "--defined-only"))
    for part in ("libtorch_cuda.so", "libc10_cuda.so"):
        undefined = (line.split()[-1].split("@")[0] for line in build.nm(torch / "lib" / part, "-D", "-u").splitlines())
        assert {name for name in undefined if name.startswith(("cuda", "cublas", "cudnn", "nccl"))} <= defined
    show = "import torch; print(torch.cuda.device_count(), torch.zeros(3, device='cuda').sum().item())"
    env = {"LD_PRELOAD": str(library), "NULL_GPUS": "2"}
    result = subprocess.run([sys.executable, "-c", show], env=env, capture_output=True, text=True)
    assert result.stdout == "2 0.0\n", result.stderr
