"""Which kernel runs where, and the reason that is given."""

import sys
import types

import pytest
import torch

from gkachat.attention.kernels import choose, decode, reference
from gkachat.attention.kernels.choose import KernelSpec, choose_decode_kernel, choose_kernel
from gkachat.config import GKAConfig, GPTConfig
from gkachat.model.gpt import GPT
from gkachat.model.stats import activation_bytes, model_stats

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def pretend(monkeypatch):
    """Have a GPU of a capability, with these packages and no others installed."""

    def setting(*packages, capability=(9, 0)):
        monkeypatch.delenv("TRITON_INTERPRET")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        properties = types.SimpleNamespace(multi_processor_count=78)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in packages else None)
        for name in packages:
            if name.startswith("flash"):
                monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(flash_attn_func=f"function of {name}"))
        flex = types.SimpleNamespace(attend=None)
        monkeypatch.setattr(choose, "FlexAttention", lambda window, sequence_len, device: flex)

    return setting


@pytest.mark.parametrize(
    ("device", "dtype", "window", "packages", "capability", "name"),
    [
        (CPU, torch.float32, None, (), None, "sdpa"),
        (CPU, torch.float32, 512, (), None, "window_cpu"),
        (CPU, torch.float32, 2048, (), None, "sdpa"),
        (CUDA, torch.bfloat16, None, (), (9, 0), "sdpa"),
        (CUDA, torch.bfloat16, 512, (), (9, 0), "flex"),
        (CUDA, torch.bfloat16, 512, ("flash_attn", "flash_attn_interface"), (9, 0), "flash-attention-3"),
        (CUDA, torch.bfloat16, 512, ("flash_attn", "flash_attn_interface"), (8, 0), "flash-attention-2"),
        (CUDA, torch.bfloat16, None, ("flash_attn",), (9, 0), "flash-attention-2"),
        (CUDA, torch.bfloat16, None, ("flash_attn",), (7, 5), "sdpa"),
        (CUDA, torch.float32, 512, ("flash_attn",), (9, 0), "flex"),
    ],
)
def test_the_softmax_kernel_follows_from_device_dtype_window_and_packages(
    device, dtype, window, packages, capability, name, pretend
):
    pretend(*packages, capability=capability)
    kernel = choose_kernel(KernelSpec(128, 2048, window), device, dtype)
    assert kernel.name == name and kernel.reason
    both_ways = choose_kernel(KernelSpec(128, 2048, window, causal=False), device, dtype)
    assert both_ways.name == (name if name.startswith("flash") else "sdpa")
    assert both_ways.attend.keywords["causal"] is False
    if name.startswith("flash"):
        package = "flash_attn_interface" if name.endswith("3") else "flash_attn"
        assert kernel.attend.keywords["flash_attn_func"] == f"function of {package}"


@pytest.mark.parametrize(
    ("device", "dtype", "options", "packages", "name", "why"),
    [
        (CUDA, torch.bfloat16, {}, ("triton",), "triton", "keys and values"),
        (CUDA, torch.float32, {"include_self": False}, ("triton",), "triton", "keys and values"),
        (CUDA, torch.bfloat16, {}, (), "sdpa", "not installed; it computes all T x T"),
        (CUDA, torch.float64, {}, ("triton",), "sdpa", "dtype is torch.float64; it computes all"),
        (CPU, torch.float32, {}, ("triton",), "sdpa", "the device is cpu"),
        (CUDA, torch.bfloat16, {"unit_norm": True}, ("triton",), "softmax flex", "no key bias"),
        (CUDA, torch.bfloat16, {"unit_norm": True, "include_self": False}, ("triton",), "triton", "keys and values"),
        (CPU, torch.float32, {"unit_norm": True}, (), "softmax window_cpu", "no key bias"),
        (CPU, torch.float32, {"unit_norm": True, "backend": "reference"}, (), "reference", "asked for"),
    ],
)
def test_the_gaussian_kernel_follows_from_device_dtype_and_features(
    device, dtype, options, packages, name, why, pretend
):
    pretend(*packages)
    kernel = choose_kernel(KernelSpec(128, 2048, 512, gaussian=True, **options), device, dtype)
    assert kernel.name == name and why in kernel.reason
    assert "T x T" not in kernel.reason or device == CUDA


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "packages", "why"),
    [
        (CUDA, torch.bfloat16, 128, ("triton",), None),
        (CUDA, torch.float32, 24, ("triton",), None),
        (CUDA, torch.bfloat16, 128, (), "triton is not installed"),
        (CUDA, torch.float64, 512, ("triton",), "the dtype is torch.float64; heads have 512 channels, more than 256"),
        (CPU, torch.float32, 128, ("triton",), "the device is cpu"),
    ],
)
def test_decoding_has_a_kernel_of_its_own_on_a_gpu(device, dtype, head_dim, packages, why, pretend):
    pretend(*packages)
    kernel = choose_decode_kernel(head_dim, device, dtype)
    if why is None:
        assert kernel.name == "triton" and kernel.attend.keywords == {"multiprocessors": 78}
    else:
        assert kernel.name == "torch" and kernel.reason == f"no triton kernel: {why}"
        assert kernel.attend is decode.attend


def test_scores_of_a_layers_own_run_on_the_reference_kernels(cauchy):
    attn = GPT(GPTConfig(depth=1, attention="cauchy", vocab_size=64)).blocks[0].attn
    assert attn.kernel.name == attn.decode_kernel.name == "reference"
    assert attn.kernel.reason == "the layer defines its own scores"
    assert attn.decode_kernel.attend.func is reference.attend_cached


def test_asking_for_triton_where_it_cannot_run_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="given 'triton', which cannot run here: the device is cpu"):
        GPT(GPTConfig(depth=2, attention="gka", gka=GKAConfig(backend="triton")))


def test_a_model_for_triton_is_counted_on_any_machine(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    shape = {"depth": 2, "attention": "gka", "vocab_size": 64, "sequence_len": 32}
    plain, config = GPTConfig(**shape), GPTConfig(**shape, gka=GKAConfig(backend="triton"))
    assert model_stats(config) == model_stats(plain)
    assert activation_bytes(config, 1) == activation_bytes(plain, 1)


def test_kernels_follow_the_weights_to_another_device():
    with torch.device("meta"):
        model = GPT(GPTConfig(depth=2, window_pattern="SL", vocab_size=64))
    assert next(iter(model.kernels())).startswith("sdpa (torch's kernel on meta)")
    kernels = model.to_empty(device="cpu").kernels()
    assert [(name.split()[0], layers) for name, layers in kernels.items()] == [("window_cpu", [0]), ("sdpa", [1])]
