"""MultiheadGKA against its definition in float64, and in the places of other attentions: torch's encoder and a DeiT."""

import copy
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, live_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from gkachat.attention import GaussianKernelAttention, MultiheadGKA
from gkachat.attention.features import rms_norm, rope_table
from gkachat.attention.kernels.choose import choose_kernel
from gkachat.config import GKAConfig
from gkachat.model.vit import ViT
from gkachat.vision_config import ViTConfig

B, T, C, H = 2, 7, 12, 3
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "dropin.md").read_text(), flags=re.DOTALL)
TIMM = ROOT / ".venv" / "timm"


def drawn(dtype=torch.float64, **options):
    """A layer with drawn bandwidths, and its input."""
    torch.manual_seed(0)
    layer = MultiheadGKA(C, H, **options).to(dtype)
    nn.init.uniform_(layer.log_sigma, 0, 1)
    return layer, torch.randn(B, T, C, dtype=dtype, requires_grad=True)


def definition(layer, x, bias):
    """Return the output and weights (B, H, T, T) of the formula, token by token; bias (B, T) is added to the scores."""
    shape, options = layer.config, layer.config.gka
    q, k, v = (x, x, x) if layer.c_qkv is None else (x @ layer.c_qkv.weight.T).split(C, dim=-1)
    q, k, v = (t.view(B, T, H, C // H) for t in (q, k, v))
    if options.normalize:
        q, k, v = rms_norm(q), rms_norm(k), rms_norm(v) if layer.c_qkv is None else v
    if options.rope:
        cos, sin = (table[:, None].double() for table in rope_table(T, C // H))
        turn = lambda t, a, b: torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)  # noqa: E731
        q, k = (turn(t, *t.chunk(2, dim=-1)) for t in (q, k))
    y, weights = 0 * (q + k + v + layer.sigma[:, None]), torch.zeros(B, H, T, T, dtype=x.dtype)
    for b in range(B):
        for i in range(T):
            near = [j for j in range(T) if shape.limit is None or abs(i - j) < shape.limit]
            seen = [j for j in near if (j <= i or not shape.causal) and bias[b, j] > -torch.inf]
            if seen:
                distances = (q[b, i] - k[b, seen]).square().sum(-1)
                scores = -distances / (2 * layer.sigma**2) + bias[b, seen, None]
                w = scores.softmax(dim=0)
                y[b, i] = (w[..., None] * v[b, seen]).sum(0)
                weights[b][:, i, seen] = w.T
    return y.flatten(2) @ layer.c_proj.weight.T, weights


@settings(deadline=None, max_examples=40)
@given(
    ignored=st.lists(st.booleans(), min_size=B * T, max_size=B * T),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 3]),
    rope=st.booleans(),
    normalize=st.booleans(),
    qkv=st.booleans(),
    kind=st.sampled_from(["none", "bool", "float", "bias"]),
)
@example(ignored=[True] * 14, causal=False, window=None, rope=False, normalize=False, qkv=False, kind="bool")
@example(ignored=[True] * 3 + [False] * 11, causal=True, window=3, rope=True, normalize=True, qkv=True, kind="float")
def test_outputs_weights_and_gradients_are_those_of_the_definition(ignored, kind, **options):
    layer, x = drawn(**options)
    ignored = torch.tensor(ignored).view(B, T)
    bias = torch.zeros(B, T, dtype=x.dtype)
    if kind != "none":
        bias[ignored] = -0.7 if kind == "bias" else -torch.inf
    mask = {"none": None, "bool": ignored}.get(kind, bias)
    y, weights = layer(x, x, x, key_padding_mask=mask, average_attn_weights=False)
    expected, expected_weights = definition(layer, x, bias)
    # float32's rotation changes norms by 1e-8, which a kernel for features of one norm does not see.
    atol = 1e-6 if options["rope"] and options["normalize"] else 1e-10
    torch.testing.assert_close(y, expected, rtol=0, atol=atol)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=atol)
    assert (y[(expected_weights == 0).all(dim=-1).all(dim=1)] == 0).all()
    dy, of = torch.randn_like(y), [x, *layer.parameters()]
    for got, exact in zip(*(torch.autograd.grad(t, of, dy) for t in (y, expected)), strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=10 * atol)
    assert torch.equal(layer(x, key_padding_mask=mask), y)
    assert torch.equal(layer(x, x, x, mask)[1], weights.mean(dim=1)) and layer(x, x, x, mask, False)[1] is None


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"rope": True, "causal": True}])
def test_autocast_rounds_operands_alone(options):
    """2^-9 each. Features with a common offset have biases of some 100, which bfloat16 rounds by 0.25."""
    torch.manual_seed(0)
    layer = MultiheadGKA(128, 2, **options)
    nn.init.constant_(layer.log_sigma, 0.7)
    x = torch.randn(B, 50, 128)
    for t in range(1, 50):  # neighbours resemble each other, since otherwise every token sees itself alone
        x[:, t] = 0.8 * x[:, t - 1] + 0.6 * x[:, t]
    x = (1.5 * x + 4).bfloat16()
    for mask in (None, torch.arange(B * 50).view(B, 50) % 5 == 2):
        exact = copy.deepcopy(layer).double()(x.double(), key_padding_mask=mask)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x.float(), key_padding_mask=mask)
        assert y.dtype == torch.bfloat16 and (y.double() - exact).norm() < 5e-3 * exact.norm()


def test_it_is_the_layer_of_the_gpt_and_of_the_vit():
    x, rope = torch.randn(B, T, 32), rope_table(T, 16)
    gpt = live_model("gka", gka=GKAConfig(rope=True)).blocks[0].attn
    assert type(gpt) is GaussianKernelAttention and gpt.window == 129
    ours = MultiheadGKA(32, 2, causal=True, window=129, rope=True)
    ours.load_state_dict(gpt.state_dict())
    assert torch.equal(ours(x), gpt(x, None, rope))
    vit = ViT(ViTConfig(2, "gka", 32, 16, 8, 2, 1, 10)).blocks[0].attn
    nn.init.normal_(vit.c_proj.weight)
    ours = MultiheadGKA(32, 2)
    ours.load_state_dict(vit.state_dict())
    assert torch.equal(ours(x), vit(x, None, None))
    for layer in (ours, MultiheadGKA(32, 2, qkv=True)):
        grouped = [p for group in layer.parameter_groups().values() for p in group]
        assert {*map(id, grouped)} == {*map(id, layer.parameters())}


@pytest.mark.parametrize("swap_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_a_torch_encoder_takes_it_before_and_after_it_is_built(swap_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(C, 4, 24, batch_first=True)
    layer.self_attn = MultiheadGKA(C, 4) if swap_first else layer.self_attn
    encoder = nn.TransformerEncoder(layer, 2)
    for layer in encoder.layers:
        layer.self_attn = layer.self_attn if swap_first else MultiheadGKA(C, 4)
    x, padding = torch.randn(B, T, C), torch.arange(T).expand(B, T) >= torch.tensor([[T], [4]])
    encoder(x, src_key_padding_mask=padding).sum().backward()
    assert all(layer.self_attn.log_sigma.grad.abs().sum() > 0 for layer in encoder.eval().layers)
    y = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():  # where torch would run its fused encoder, on nested tensors
        assert torch.equal(encoder(x, src_key_padding_mask=padding), y)
        alone, short = encoder(x[1:, :4]), y[1:, :4]
    torch.testing.assert_close(alone, short, rtol=1e-4, atol=1e-5)


def test_a_causal_layer_of_an_encoder_takes_the_causal_mask():
    layer, x = nn.TransformerEncoderLayer(C, H, 24, dropout=0, batch_first=True), torch.randn(B, T, C)
    layer.self_attn = MultiheadGKA(C, H, causal=True)
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    assert torch.equal(layer(x, src_mask=mask, is_causal=True), layer(x))
    torch.testing.assert_close(layer(x)[:, :3], layer(x[:, :3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiler_sees_one_graph(autocast):
    layer, x = drawn(torch.float32, rope=True)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if autocast else {"rtol": 1e-5, "atol": 1e-5}  # of rounding alone
        for mask in (None, torch.arange(T).expand(B, T) > 4):
            torch.testing.assert_close(compiled(x, x, x, mask, False)[0], layer(x, key_padding_mask=mask), **tolerance)


def test_padding_and_unequal_keys_leave_the_fused_kernel_out():
    pytest.importorskip("triton")
    layer, projected = MultiheadGKA(128, 2), MultiheadGKA(128, 2, qkv=True)
    cuda = torch.device("cuda"), torch.bfloat16
    assert choose_kernel(layer.kernel_spec, *cuda).name == "triton" and layer.padded_kernel.name == "sdpa"
    assert "queries and keys differ" in choose_kernel(projected.kernel_spec, *cuda).reason


X = torch.zeros(B, T, C)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MultiheadGKA(12, 5), "embed_dim: given 12, expected a multiple of num_heads, given 5"),
        (lambda: MultiheadGKA(12, 0), "num_heads, given 0"),
        (lambda: MultiheadGKA(9, 3, rope=True), "rope: given True for heads of 3 channels, expected an even number"),
        (lambda: MultiheadGKA(12, 3, window=0), "window: given 0, expected a whole number of 1 or more"),
        (lambda: MultiheadGKA(12, 3, window=1.5), "window: given 1.5, expected a whole number of 1 or more"),
        (lambda: MultiheadGKA(12, 3)(torch.ones(1, 2, 12, dtype=torch.long)), "query: given torch.int64"),
        (lambda: drawn()[0](X[0]), r"query: given shape \(7, 12\), expected \(B, T, 12\), batch first"),
        (lambda: drawn()[0](X, X + 1, X + 1), "key and value: expected the query itself"),
        (lambda: drawn()[0](X, X), "key and value: expected the query itself"),
        (lambda: drawn()[0](X, key_padding_mask=torch.zeros(T, B, dtype=torch.bool)), r"given shape \(7, 2\)"),
        (
            lambda: drawn()[0](X, key_padding_mask=torch.ones(B, T, dtype=torch.long)),
            "given torch.int64, expected bool",
        ),
        (lambda: drawn()[0](X, attn_mask=torch.zeros(T, T)), "attn_mask: not supported; build the layer with causal"),
        (lambda: drawn()[0](X, is_causal=True), "is_causal: given True for a layer that sees the whole text"),
    ],
)
def test_wrong_shapes_and_masks_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_encoder_of_the_page_runs():
    found = {}
    exec(EXAMPLES[1], found)
    assert found["y"].shape == (2, 3, 64) and found["y"].isfinite().all()


def test_the_deit_of_the_page_learns_the_digits():
    """tests/run.sh installs timm apart: torchvision's build for CUDA, beside a torch without it, breaks other packages.

    That build's operators are then missing. A DeiT uses none, but torchvision wants two of them when it is imported.
    """
    program = f"""if True:
        import sys, torch
        try:
            import torchvision
        except RuntimeError:
            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except ImportError:
            sys.exit("no timm")
        try:
            import timm
        except ImportError as error:
            sys.exit("no timm")
        torch.set_num_threads(1)
        found = {{}}
        exec({EXAMPLES[0]!r}, found)
        print(type(found["model"].blocks[1].attn).__name__, found["accuracy"])"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{TIMM}"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    if "no timm" in result.stderr:
        pytest.skip("timm is not installed; tests/run.sh installs it where there is a network")
    assert result.returncode == 0, result.stderr
    name, accuracy = result.stdout.split()
    assert name == "MultiheadGKA" and float(accuracy) > 0.4  # 0.66 here; 0.1 before the first step


def test_shapes_are_computed_on_the_meta_device():
    """Tools that count a model's memory run it there, where torch has no autocast."""
    with torch.device("meta"):
        assert MultiheadGKA(12, 3)(torch.zeros(2, 5, 12)).shape == (2, 5, 12)
