"""Devices, dtypes and how results name them."""

import os
import subprocess
import sysconfig
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script, untrained_run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gkachat.eval.bpb
import gkachat.inference.decoder
import gkachat.train.vision
from gkachat import machine
from gkachat.attention.features import choose_features, rope_table
from gkachat.attention.kernels import flash
from gkachat.attention.kernels.choose import KernelSpec, choose_decode_kernel, choose_kernel
from gkachat.config import Config, GPTConfig, RunConfig
from gkachat.eval.bpb import bpb_sums
from gkachat.inference.decoder import Decoder
from gkachat.inference.sampling import Sampling
from gkachat.machine import (
    check_compiler,
    commit,
    count_gpus,
    peak_flops,
    peak_memory,
    physical_memory,
    pick_device,
    pick_dtype,
)
from gkachat.model.gpt import GPT
from gkachat.model.loss import choose_head_loss
from gkachat.model.stats import state_bytes
from gkachat.model.vit import ViT
from gkachat.tokenizer import Tokenizer
from gkachat.train.distributed import init_process_group
from gkachat.train.setup import build_model
from gkachat.train.vision import ImageTask
from gkachat.vision_config import ViTConfig


def test_a_device_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"run\.device: given 'warp'"):
        pick_device("warp")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"run\.device: given 'cuda', which cannot be used"):
            pick_device("cuda")


def test_each_rank_selects_its_own_gpu_before_it_allocates(monkeypatch):
    calls = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", device)))
    monkeypatch.setattr(torch, "empty", lambda size, device: calls.append(("empty", device)))
    assert pick_device("cuda") == torch.device("cuda", 3)
    assert calls == [("set_device", torch.device("cuda", 3)), ("empty", torch.device("cuda", 3))]


class Selected(Exception):
    """Raised in place of selecting a GPU."""


# The arguments with which a script comes to its device.
RUN = "runs/tiny"
DEVICES = {
    "attention_maps": [RUN, "--prompt", "a", "--device", "cuda"],
    "base_eval": [RUN, "--device", "cuda"],
    "base_train": ["configs/laptop.toml", "--run.device", "cuda"],
    "bench_attention": ["--device", "cuda"],
    "bench_decode": ["--device", "cuda"],
    "bench_serve": [RUN, "--device", "cuda"],
    "bench_step": ["--device", "cuda"],
    "chat_cli": [RUN, "--device", "cuda"],
    "chat_eval": [RUN, "--device", "cuda"],
    "chat_sft": [RUN, "--run.device", "cuda"],
    "estimate": ["configs/laptop.toml", "--run.device", "cuda"],
    "lm_eval": [RUN, "--tasks", "arc_easy", "--device", "cuda"],
    "serve": [RUN, "--device", "cuda"],
    "vision_train": ["configs/vision_digits.toml", "--run.device", "cuda"],
}


@pytest.mark.parametrize("script", DEVICES)
def test_no_script_touches_a_gpu_before_it_selects_that_of_its_rank(script, corpus_home, tmp_path, monkeypatch):
    """This torch has no CUDA, so that touching a GPU earlier is another error."""

    def set_device(device):
        raise Selected(device)

    run_dir = untrained_run(tmp_path, "tiny", Tokenizer.load(corpus_home / "tokenizer" / "python-source-v512"))
    options = (run_dir / "config.toml").read_text()
    (run_dir / "config.toml").write_text(options.replace("vocab_size = 32768", "vocab_size = 512"))  # the tokenizer's
    (tmp_path / "tokenizer").symlink_to(corpus_home / "tokenizer")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    args = [tmp_path / arg if arg == RUN else arg for arg in DEVICES[script]]
    with pytest.raises(Selected) as selected:
        run_script(script, *args, home=tmp_path)
    assert selected.value.args == (torch.device("cuda", 1),)


def test_every_script_with_a_device_is_among_them():
    named = {path.stem for path in (ROOT / "scripts").glob("*.py") if "device" in path.read_text()}
    no_gpu = {"cli", "compare", "cost", "preflight", "recall", "sweep", "vision_report", "verify_run"}
    assert named - no_gpu - {"gpu_check"} <= DEVICES.keys()  # gpu_check's steps are processes of one GPU


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """Makes a machine with an nvidia-smi that lists so many GPUs, and a torch for CUDA 13 that cannot use them."""

    def make(number, driver="535.104.05"):
        path = tmp_path / "nvidia-smi"
        path.write_text("#!/bin/sh\n" + f"echo '{driver}, NVIDIA H100 80GB HBM3'\n" * number)
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    return make


def test_a_driver_too_old_is_an_error_that_says_what_to_do_and_never_a_run_on_the_cpu(gpus, monkeypatch, capsys):
    gpus(8)
    message = r"8 GPUs here \(NVIDIA H100 80GB HBM3, driver 535\.104\.05\): it was built for CUDA 13\.0, which needs"
    with pytest.raises(ValueError, match=message + r" driver 580 or newer; update the driver, or install"):
        count_gpus()
    assert pick_device("auto") == torch.device("cpu")
    assert capsys.readouterr().err.startswith("warning: torch ")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=r"8 GPUs here .* built without CUDA; install a wheel with CUDA"):
        count_gpus()


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_do_not_count_and_are_no_error(gpus, monkeypatch, capsys, hidden):
    gpus(8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert count_gpus() == 0 and pick_device("auto") == torch.device("cpu")
    assert capsys.readouterr().err == ""


def test_visible_devices_that_name_no_gpu_are_an_error(gpus, monkeypatch):
    gpus(2, driver="580.65.06")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-none")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=GPU-none names none of them"):
        count_gpus()


def test_gpus_are_those_that_torch_counts(monkeypatch):
    assert count_gpus() == torch.cuda.device_count()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert count_gpus() == 3


@pytest.mark.parametrize(("compile", "kernel"), [(None, "sdpa"), (True, "sdpa"), (False, "triton"), (False, "flex")])
def test_gpu_kernels_without_a_compiler_are_refused_before_training(monkeypatch, tmp_path, compile, kernel):
    device = torch.device("cuda")
    model = SimpleNamespace(kernels=lambda: {f"{kernel} (the reason)": [0]})
    config = Config(run=RunConfig(dtype="float32", compile=compile))
    (tmp_path / "gcc").touch(0o755)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda *args: str(tmp_path))
    with pytest.raises(ValueError, match=r"headers \(.*Python\.h\): apt-get install build-essential python3\.\d+-dev"):
        build_model(lambda *args: model, config, device)
    (tmp_path / "Python.h").touch()
    assert build_model(lambda *args: model, config, device) is model
    (tmp_path / "gcc").unlink()
    with pytest.raises(ValueError, match=r"a C compiler \(gcc or clang\): apt-get install"):
        build_model(lambda *args: model, config, device)
    monkeypatch.setenv("CC", "icx")
    with pytest.raises(ValueError, match=r"a C compiler \(CC=icx is not there\)"):
        check_compiler()


def test_kernels_of_torch_alone_need_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    model = SimpleNamespace(kernels=lambda: {"sdpa (the reason)": [0]})
    config = Config(run=RunConfig(dtype="float32", compile=False))
    assert build_model(lambda *args: model, config, torch.device("cuda")) is model


@pytest.mark.parametrize(
    ("capabilities", "expected", "from_the_left"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32, False),
        ({"avx512_bf16": True}, torch.bfloat16, True),
        ({"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16, False),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16, False),
        ({"neon": True, "bf16": True}, torch.bfloat16, False),
        (None, torch.float32, False),  # a torch without get_capabilities
    ],
)
def test_what_a_cpu_has_decides_how_it_multiplies_bfloat16(monkeypatch, capabilities, expected, from_the_left):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    if capabilities is not None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu) == expected and machine.multiplies_faster_from_the_left() == from_the_left
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16 and pick_dtype("float32", cpu) == torch.float32


def test_peaks_are_known_by_the_vendors_names():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("cpu, 2 threads") is None


def test_the_commit_is_the_one_checked_out(tmp_path, monkeypatch):
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert head.startswith(commit().removesuffix("-dirty"))
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    assert commit() == "unknown"


def test_peak_memory_is_plausible():
    assert 50 * 2**20 < peak_memory(torch.device("cpu")) < 2**40


def test_auto_is_an_apple_gpu_where_there_is_no_cuda(monkeypatch):
    """Nothing here has run on an Apple GPU: the test has its name alone."""
    mps = torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    assert pick_device("auto") == mps and count_gpus() == 0  # one process, without torchrun
    assert pick_dtype("auto", mps) == torch.float32 == machine.widest_float(mps)
    assert machine.device_name(mps) == "mps" and peak_flops("mps") is None
    softmax = choose_kernel(KernelSpec(64, 256, window=64), mps, torch.float32)
    gka = choose_kernel(KernelSpec(64, 256, window=64, gaussian=True), mps, torch.float32)
    assert softmax.name == gka.name == "sdpa" and "computes all T x T scores" in gka.reason
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert pick_device("auto") == torch.device("cpu")
    for variable in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(variable, "0")
    with pytest.raises(ValueError, match=r"run\.device: mps has no collectives"):
        init_process_group("mps", 60)


def test_an_amd_gpu_runs_on_kernels_of_torch(monkeypatch):
    """torch calls it cuda, and its capability, (9, 4), looks like a Hopper's."""
    cuda, half = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI300X")
    monkeypatch.delenv("TRITON_INTERPRET")
    flash.find.cache_clear()
    chosen = [
        choose_kernel(KernelSpec(64, 256), cuda, half),
        choose_kernel(KernelSpec(64, 256, gaussian=True), cuda, half),
        choose_decode_kernel(64, cuda, half),
        choose_features(64, cuda, half),
        choose_head_loss(cuda, half),
    ]
    flash.find.cache_clear()
    assert [kernel.name for kernel in chosen] == ["sdpa", "sdpa", "torch", "torch", "torch"]
    assert all("AMD" in kernel.reason for kernel in chosen)
    assert peak_flops(machine.device_name(cuda)) == 1307e12
    config = Config(run=RunConfig(dtype="float32", compile=False, fp8=True))
    with pytest.raises(ValueError, match=r"AMD Instinct MI300X has no fp8 arithmetic that this package can use"):
        build_model(lambda *args: SimpleNamespace(kernels=dict), config, cuda)


class Float64OnDevice(TorchDispatchMode):
    """Refuses what an Apple GPU cannot hold, on the meta device, which stands in for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.is_meta and t.dtype == torch.float64:
                raise TypeError(f"{function} makes a float64 tensor")
        return result


def test_a_device_without_float64_trains_evaluates_and_decodes(monkeypatch):
    for module in (gkachat.eval.bpb, gkachat.inference.decoder, gkachat.train.vision):
        monkeypatch.setattr(module, "widest_float", lambda device: machine.widest_float(torch.device("mps")))
    monkeypatch.setattr(torch.Tensor, "item", lambda t: 1.0)  # meta tensors have no values
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: [[1.0, 0.0]] * 2)
    with torch.device("meta"):
        model, idx = (
            GPT(GPTConfig(depth=2, vocab_size=64, sequence_len=200, n_embd=32, head_dim=16)),
            torch.ones(2, 200),
        )
    with pytest.raises(TypeError, match="makes a float64 tensor"), Float64OnDevice():
        model.wte.weight.double()
    with Float64OnDevice():
        model.cos, model.sin = rope_table(200, 16, "meta")
        model(idx.long(), idx.long()).backward()
        bpb_sums(model, [(idx.long(), idx.long())], torch.ones(64, dtype=torch.long))
        decoder = Decoder(model, model.make_cache(2, 64, block=16), 64)
        for row, sampling in enumerate((Sampling(top_p=0.9, logprobs=True), Sampling(temperature=0))):
            decoder.set_row(row, sampling, [1])
        decoder.step([1, 2], [0.25, 0.5])
        images = torch.ones(2, 1, 8, 8), torch.ones(2, dtype=torch.long)
        with torch.device("meta"):
            vit = ViT(ViTConfig(2, "gka", 32, 16, 8, 2, 1, 10))
        task = SimpleNamespace(batches=SimpleNamespace(val=lambda rows: [images]), metrics=())
        monkeypatch.setattr(torch.Tensor, "tolist", lambda t: [])
        ImageTask.evaluate(task, 0, vit, 2, lambda: True)


def test_a_model_that_the_machine_cannot_hold_is_refused_before_it_is_built(monkeypatch):
    config = Config(model=GPTConfig(depth=2, vocab_size=64))
    monkeypatch.setattr("gkachat.train.setup.physical_memory", lambda: state_bytes(config.model) - 1)
    with pytest.raises(ValueError, match=r"depth 2 takes 0\.0 GiB .* this machine has 0\.0 GiB: give a smaller"):
        build_model(lambda *args: pytest.fail("built"), config, torch.device("cpu"))
    assert physical_memory() > 2**28
