"""Which kernel is chosen, that all of them compute the same, and what they keep for the backward."""

import dataclasses
import sys
import types

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from gkachat.attention import cache, fused
from gkachat.attention.backends import decode_backend, gka_backend, softmax_backend
from gkachat.attention.features import apply_rope, rms_norm, rope_table
from gkachat.attention.operator import gaussian_kernel_attention, normalised_kernel_attention
from gkachat.config import GKAConfig
from gkachat.model.gpt import GPT, GPTConfig
from gkachat.model.stats import activation_bytes, model_stats

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
T, D, H = 150, 16, 3


def qkv(dtype=torch.float64, T=T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, T, H, D, generator=generator, dtype=dtype).requires_grad_() for _ in range(3))


def definition(q, k, v, window, scale, causal=True):
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    hidden = ~fused.visible(q.size(1), window, causal)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("window", [1, 5, 64, 65, 149, 150, 400, None])
def test_softmax_kernels_are_softmax_attention_over_the_window(window):
    q, k, v = qkv()
    expected = definition(q, k, v, window, 0.3)
    dy = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (q, k, v), dy)
    kernels = [fused.sdpa] if window is None else [fused.sdpa, fused.blocks]
    for kernel in kernels:
        y = kernel(q, k, v, window=window, scale=0.3)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        for a, b in zip(torch.autograd.grad(y, (q, k, v), dy), gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("window", [7, None])
def test_without_the_causal_mask_softmax_kernels_look_both_ways(window):
    q, k, v = qkv()
    backend = softmax_backend(CPU, q.dtype, D, window, T, causal=False)
    y, expected = backend.attend(q, k, v, window=window, scale=0.3), definition(q, k, v, window, 0.3, causal=False)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(t, (q, k, v), dy) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"include_self": False}])
def test_gka_of_a_layer_without_the_causal_mask_looks_both_ways(options):
    x, sigma = qkv()[0], torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    backend = gka_backend(CPU, x.dtype, D, None, T, GKAConfig(**options), causal=False)
    f = rms_norm(x) if options.pop("normalize", False) else x
    expected = gaussian_kernel_attention(f, sigma, causal=False, backend="reference", **options)
    y, dy = backend.attend(x, sigma, None), torch.randn_like(expected)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(t, (x, sigma), dy) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("T", [150, 256])
def test_flex_attention_sees_the_same_window(T, monkeypatch):
    # Compiled for a GPU it has a backward; on a CPU its plain form shows that the mask is the right one.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    q, k, v = (t.detach() for t in qkv(torch.float32, T))
    flex = fused.Flex(40, 256, CPU)
    assert flex.attend is flex_attention
    expected = definition(q, k, v, 40, 0.25)
    torch.testing.assert_close(flex(q, k, v, window=40, scale=0.25), expected, rtol=1e-5, atol=1e-5)
    assert set(flex.masks) == {256, T}


@pytest.mark.parametrize("module", ["flash_attn_interface", "flash_attn"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 7])
def test_flash_attention_is_called_with_its_own_idea_of_a_window(module, window, causal, monkeypatch):
    wanted = causal

    def flash_attn_func(q, k, v, softmax_scale, causal, window_size):
        """As the packages document it: perhaps causal, and -left <= j - i <= right where these are not -1."""
        assert causal is wanted
        left, right = window_size
        distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]
        seen = ((distance <= left) | (left == -1)) & ((-distance <= right) | (right == -1))
        seen &= (distance >= 0) | (not causal)
        scores = softmax_scale * torch.einsum("bihd,bjhd->bhij", q, k).masked_fill(~seen, -torch.inf)
        y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        return (y, None) if module == "flash_attn_interface" else y

    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(flash_attn_func=flash_attn_func))
    q, k, v = qkv()
    y = fused.flash(q, k, v, window=window, scale=0.3, module=module, causal=causal)
    torch.testing.assert_close(y, definition(q, k, v, window, 0.3, causal), rtol=0, atol=1e-12)


def pretend(monkeypatch, *, capability=(9, 0), installed=("triton",)):
    """A machine with a GPU and these packages."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    properties = types.SimpleNamespace(multi_processor_count=78)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(fused, "Flex", lambda window, sequence_len, device: f"flex {window}")


@pytest.mark.parametrize(
    ("device", "dtype", "window", "installed", "capability", "name"),
    [
        (CPU, torch.float32, None, (), None, "sdpa"),
        (CPU, torch.float32, 512, (), None, "blocks"),
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
    device, dtype, window, installed, capability, name, monkeypatch
):
    pretend(monkeypatch, capability=capability, installed=installed)
    backend = softmax_backend(device, dtype, 128, window, 2048)
    assert backend.name == name and backend.reason
    both_ways = softmax_backend(device, dtype, 128, window, 2048, causal=False)
    assert both_ways.name == (name if name.startswith("flash") else "sdpa")
    assert both_ways.attend.keywords["causal"] is False


@pytest.mark.parametrize(
    ("device", "dtype", "options", "installed", "name", "why"),
    [
        (CUDA, torch.bfloat16, {}, ("triton",), "triton", "keys and values"),
        (CUDA, torch.float32, {"include_self": False, "rope": True}, ("triton",), "triton", "keys and values"),
        (CUDA, torch.bfloat16, {}, (), "sdpa", "not installed; it computes all T x T"),
        (CUDA, torch.float64, {}, ("triton",), "sdpa", "dtype is torch.float64; it computes all"),
        (CPU, torch.float32, {}, ("triton",), "sdpa", "the device is cpu"),
        (CUDA, torch.bfloat16, {"normalize": True}, ("triton",), "softmax flex", "no key bias"),
        (CUDA, torch.bfloat16, {"normalize": True, "include_self": False}, ("triton",), "triton", "keys and values"),
        (CPU, torch.float32, {"normalize": True}, (), "softmax blocks", "no key bias"),
        (CPU, torch.float32, {"normalize": True, "backend": "reference"}, (), "reference", "asked for"),
    ],
)
def test_the_gka_kernel_does_too_and_says_why(device, dtype, options, installed, name, why, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    pretend(monkeypatch, installed=installed)
    backend = gka_backend(device, dtype, 128, 512, 2048, GKAConfig(**options))
    assert backend.name == name
    assert why in backend.reason
    assert "T x T" not in backend.reason or device == CUDA


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "installed", "why"),
    [
        (CUDA, torch.bfloat16, 128, ("triton",), None),
        (CUDA, torch.float32, 24, ("triton",), None),
        (CUDA, torch.bfloat16, 128, (), "triton is not installed"),
        (CUDA, torch.float64, 512, ("triton",), "the dtype is torch.float64; heads have 512 channels, more than 256"),
        (CPU, torch.float32, 128, ("triton",), "the device is cpu"),
    ],
)
def test_decoding_has_a_kernel_where_there_is_a_gpu(device, dtype, head_dim, installed, why, monkeypatch):
    pretend(monkeypatch, installed=installed)
    backend = decode_backend(device, dtype, head_dim)
    if why is None:
        assert backend.name == "triton" and backend.attend.keywords == {"multiprocessors": 78}
    else:
        assert backend.name == "torch" and backend.reason == f"no triton kernel: {why}"
        assert backend.attend is cache.attend


def test_asking_for_triton_where_it_cannot_run_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="given 'triton', which cannot run here: the device is cpu"):
        GPT(GPTConfig(depth=2, attention="gka", gka=GKAConfig(backend="triton")))


def test_a_model_for_triton_is_counted_anywhere(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    plain = GPTConfig(depth=2, attention="gka", vocab_size=64, sequence_len=32)
    config = dataclasses.replace(plain, gka=GKAConfig(backend="triton"))
    assert model_stats(config) == model_stats(plain)
    assert activation_bytes(config, 1) == activation_bytes(plain, 1)


def test_kernels_follow_the_weights(monkeypatch):
    with torch.device("meta"):
        model = GPT(GPTConfig(depth=2, window_pattern="SL", vocab_size=64))
    assert next(iter(model.backends())).startswith("sdpa (torch's kernel on meta)")
    assert [name.split()[0] for name in model.to_empty(device="cpu").backends()] == ["blocks", "sdpa"]
    assert list(model.backends().values()) == [[0], [1]]


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("window", [40, None])
def test_normalised_features_need_no_gradient_of_their_bias(rope, window):
    """The radial part that a stock kernel's backward leaves out is what the norm's backward takes away."""
    x, sigma = qkv()[0], torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    if rope:  # in float64 from the angle on, or a rotation would change norms by 1e-8
        cos, sin = rope_table(T, D)
        angles = torch.atan2(sin.double(), cos.double())
        rope = angles.cos(), angles.sin()
    else:
        rope = None
    attend = fused.sdpa if window is None else fused.blocks

    def gradients(y, of):
        return torch.autograd.grad(y, (of, sigma), torch.ones_like(y) * torch.linspace(-1, 1, D, dtype=y.dtype))

    y = normalised_kernel_attention(x, sigma, rope, attend=attend, window=window)
    expected = gaussian_kernel_attention(rms_norm(x), sigma, window=window, rope=rope, backend="reference")
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for a, b in zip(gradients(y, x), gradients(expected, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

    # Without the norm's backward they differ, along x alone.
    unit = rms_norm(x).detach().requires_grad_()
    q = unit if rope is None else apply_rope(unit, rope)
    stock = attend(q / sigma.square()[:, None], q, unit, window=window, scale=1.0)
    full = gaussian_kernel_attention(unit, sigma, window=window, rope=rope, backend="reference")
    missing = gradients(stock, unit)[0] - gradients(full, unit)[0]
    assert missing.abs().max() > 1e-3
    along = (missing * unit).sum(-1, keepdim=True) / D * unit
    torch.testing.assert_close(missing, along, rtol=0, atol=1e-10)


def saved_by(function):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function().sum()
    return {t.untyped_storage().data_ptr(): t for t in kept if t.numel() >= 2 * T * H * D}.values()


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"rope": True}, {"rope": True, "normalize": True}])
def test_no_float32_copy_of_an_activation_is_kept(options):
    x = qkv()[0].detach().bfloat16().requires_grad_()
    backend = gka_backend(CPU, torch.bfloat16, D, 40, T, GKAConfig(**options))
    sigma = torch.full((H,), 3.0, requires_grad=True)
    kept = saved_by(lambda: backend.attend(x, sigma, rope_table(T, D)))
    assert all(t.dtype == torch.bfloat16 for t in kept)
    if options.get("normalize"):  # unit features, the same over sigma^2, y; with rope also the rotated ones
        assert len(kept) == 3 + options.get("rope", False)


COMPILED = [
    ("softmax", {}),
    ("gka", {}),
    ("gka", {"rope": True, "include_self": False}),
    ("gka", {"normalize": True, "rope": True}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("attention", "options"), COMPILED)
def test_a_model_compiles_to_one_graph_without_breaks(attention, options, dtype):
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = GPTConfig(
        depth=2, attention=attention, vocab_size=64, sequence_len=160, n_embd=32, head_dim=16, window_pattern="SL",
        gka=GKAConfig(**options),
    )  # fmt: skip
    model = GPT(config, dtype)
    assert model.config.window(0) == 128
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.c_proj.weight, std=0.2)
        torch.nn.init.normal_(block.mlp.c_proj.weight, std=0.2)
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)  # gradients of a size that counts
    idx = torch.randint(64, (2, 160))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    loss = compiled(idx, idx.roll(-1, 1))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = model(idx, idx.roll(-1, 1))
    expected.backward()
    assert len(graphs) == 1
    torch.testing.assert_close(loss, expected)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2  # the same products, perhaps added up in another order
    for name, p in model.named_parameters():
        assert p.grad.any() and (gradients[name] - p.grad).norm() <= tolerance * p.grad.norm(), name


def test_the_fused_kernel_stays_in_the_graph_and_can_be_exported():
    pytest.importorskip("triton")

    class Layer(torch.nn.Module):
        def forward(self, x, sigma):
            return gaussian_kernel_attention(x, sigma, window=20, backend="triton")

    x, sigma = torch.randn(1, 40, 2, 64), torch.tensor([4.0, 8.0])
    expected = Layer()(x, sigma)
    torch.testing.assert_close(torch.compile(Layer(), backend="eager", fullgraph=True)(x, sigma), expected)
    exported = torch.export.export(Layer(), (x, sigma))
    assert any("gkachat.gka" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x, sigma), expected)
