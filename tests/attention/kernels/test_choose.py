"""Which kernel runs where, and the reason that is given."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import live_model

from gkachat.attention.kernels import choose, decode, flash, flex, reference
from gkachat.attention.kernels.choose import KernelSpec, choose_decode_kernel, choose_kernel
from gkachat.config import GKAConfig, GPTConfig
from gkachat.machine import multiplies_faster_from_the_left
from gkachat.model.gpt import GPT
from gkachat.model.stats import activation_bytes, model_stats

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def pretend(monkeypatch):
    """Have a GPU of a capability, with these packages and no others installed."""

    def on_the_hub(name, version):
        assert (name, version) == ("kernels-community/flash-attn3", 1)
        return types.SimpleNamespace(flash_attn_func="function of kernels")

    def setting(*packages, capability=(9, 0), get_kernel=on_the_hub, trace=lambda function, device: None):
        monkeypatch.delenv("TRITON_INTERPRET")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        properties = types.SimpleNamespace(multi_processor_count=78)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in packages else None)
        monkeypatch.setattr(choose, "HAS_TRITON", "triton" in packages)
        for name in packages:
            if name.startswith("flash"):
                monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(flash_attn_func=f"function of {name}"))
        monkeypatch.setitem(sys.modules, "kernels", types.SimpleNamespace(get_kernel=get_kernel))
        monkeypatch.setattr(flash, "_trace", trace)
        flash.find.cache_clear()
        made = types.SimpleNamespace(attend=None)
        monkeypatch.setattr(flex, "FlexAttention", lambda window, sequence_len, device: made)

    yield setting
    flash.find.cache_clear()


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
        (CUDA, torch.bfloat16, 512, ("flash_attn", "kernels"), (9, 0), "flash-attention-3"),
        (CUDA, torch.bfloat16, 512, ("flash_attn", "kernels"), (8, 0), "flash-attention-2"),
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
        package = next(p for p in (*packages[1:], packages[0]) if name.endswith("2") is (p == "flash_attn"))
        assert kernel.attend.keywords["flash_attn_func"] == f"function of {package}"


def raising(error):
    def function(*args, **options):
        raise error

    return function


NO_BUILD = FileNotFoundError("no build for this torch\nand a second line")


@pytest.mark.parametrize(
    ("packages", "fault", "name", "why"),
    [
        (("flash_attn", "kernels"), {"get_kernel": raising(NO_BUILD)}, "flash-attention-2", "no build for this torch"),
        (("kernels",), {"get_kernel": raising(NO_BUILD)}, "flex", "no build for this torch"),
        (("kernels",), {"get_kernel": raising(TimeoutError())}, "flex", "TimeoutError"),
        (("kernels",), {"trace": raising(ModuleNotFoundError("no flash_attn_config"))}, "flex", "no flash_attn_config"),
        (("flash_attn",), {"trace": raising(RuntimeError("a pybind function"))}, "flex", "a pybind function"),
    ],
)  # fmt: skip
def test_a_flash_attention_that_cannot_be_used_gives_way_with_the_reason(packages, fault, name, why, pretend):
    pretend(*packages, **fault)
    kernel = choose_kernel(KernelSpec(128, 2048, 512), CUDA, torch.bfloat16)
    assert kernel.name == name and kernel.reason.endswith(f": {why}")
    source = "kernels-community/flash-attn3 from the Hugging Face hub" if "kernels" in packages else "flash_attn"
    assert f"cannot be used, {'' if 'kernels' in packages else 'the package '}{source}: " in kernel.reason


def stand_in(q, k, v, softmax_scale, causal, window_size):
    """flash_attn_func through torch's kernel, with its mask in float."""
    distance = torch.arange(q.size(1))[:, None] - torch.arange(q.size(1))[None, :]
    seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] == -1))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=softmax_scale).transpose(1, 2), None


@pytest.mark.parametrize("package", ["flash_attn_interface", "kernels"])
def test_a_model_with_flash_attention_is_one_graph(package, pretend, monkeypatch):
    """Forward and backward, with the function bound when the kernel was chosen."""
    trace = flash._trace
    module = types.SimpleNamespace(flash_attn_func=stand_in)
    pretend(package, get_kernel=lambda name, version: module, trace=lambda function, device: trace(function, CPU))
    monkeypatch.setitem(sys.modules, package, module if package != "kernels" else sys.modules[package])
    kernels = [choose_kernel(KernelSpec(16, 64, window), CUDA, torch.bfloat16) for window in (32, None)]
    monkeypatch.undo()  # as if nothing were installed: an import in traced code would fail
    model, idx = live_model(sequence_len=64), torch.arange(128).view(2, 64) % 64
    expected = model(idx, idx)
    for block, kernel in zip(model.blocks, kernels, strict=True):
        assert kernel.name == "flash-attention-3"
        block.attn.kernel, block.attn.window = kernel, kernel.attend.keywords["window"]
    torch._dynamo.reset()
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(idx, idx)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert loss.item() == pytest.approx(model(idx, idx).item(), rel=1e-6)
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)  # its windows are 64 wide


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
        assert kernel.attend.func is decode.attend
        assert kernel.attend.keywords == {"queries_first": multiplies_faster_from_the_left()}


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
