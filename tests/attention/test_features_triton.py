"""Convolved features in Triton, in its interpreter, against their definition in float64; and their code for a GPU."""

import pytest
import torch
from conftest import live_model

pytest.importorskip("triton")

from gkachat.attention import features_triton
from gkachat.attention.features import choose_features, convolved_features, rope_table

# Arithmetic is float32; q, k, v and dx are rounded to the dtype once, to 2^-9 of themselves in bfloat16 at most, and
# gradients of weights and gain are not rounded.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-3}


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    """The interpreter walks through a whole chunk, however few tokens there are."""
    monkeypatch.setattr(features_triton, "CHUNK", 4)


def inputs(B, S, T, H, D, dtype):
    """A strided x, split into heads, with weights, gain, and biases of keys up to 2,000."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, S, H * D + 16, generator=generator)[..., : H * D].to(dtype).view(B, S, H, D)
    weights = [torch.randn(4, H, D, generator=generator) for _ in range(3)]
    for w in weights[:2]:
        w[..., -3:] = 0
    return x, *weights, torch.rand(H, generator=generator) + 0.1, 2000 * torch.rand(B, T, H, 1, generator=generator)


@pytest.mark.parametrize(
    ("B", "S", "T", "H", "D"),
    [
        (1, 37, 37, 2, 64),  # several chunks of tokens, and several blocks of chunks
        (3, 2, 2, 1, 128),  # fewer tokens than taps
        (2, 4, 1, 2, 16),  # decoding: three tokens in front
        (1, 21, 18, 1, 10),  # a head that fills no tile
        (1, 5, 5, 1, 256),
    ],
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_features_and_gradients_are_those_of_the_definition(B, S, T, H, D, dtype):
    leaves = [t.requires_grad_() for t in inputs(B, S, T, H, D, dtype)]
    *out, bias = features_triton.convolved_features(leaves[0], leaves[1:4], *leaves[4:], T)
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    *exact, _ = convolved_features(exact_leaves[0], exact_leaves[1:4], *exact_leaves[4:], T)
    generator = torch.Generator().manual_seed(1)
    into = [torch.randn(B, H, T, D, generator=generator).to(dtype).transpose(1, 2) for _ in out]
    got = *out, *torch.autograd.grad(out, leaves, into)
    expected = *exact, *torch.autograd.grad(exact, exact_leaves, [t.double() for t in into])
    names = ("q", "k", "v", "dx", "dw_q", "dw_k", "dw_v", "dgain", "dbias")
    for name, a, b in zip(names, got, expected, strict=True):
        assert a.dtype == (torch.float32 if name.startswith(("dw", "dg", "db")) else dtype) and a.shape == b.shape
        if name in "qk":
            a, b = a[..., :-3], b[..., :-3]
        assert (a.double() - b).norm() <= TOLERANCE[dtype] * b.norm(), name
    # The norm is that of the rounded key. The sum, up to 2,000 in float32, is not exact to more than 1e-4.
    half_square = 0.5 * leaves[4][:, None] * out[1][..., :-3].double().square().sum(dim=-1, keepdim=True)
    torch.testing.assert_close(bias.double(), leaves[5] - half_square, rtol=1e-6, atol=2e-4)
    assert not bias.requires_grad and (out[0][..., -3:] == 1).all()
    assert torch.equal(out[1][..., -3:].float().sum(dim=-1, keepdim=True), bias)  # exact in three parts


def test_the_operators_are_registered_in_full():
    x, *others = inputs(1, 6, 5, 2, 16, torch.float32)
    args = (x.contiguous(), *others)
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    leaves = tuple(t.requires_grad_() for t in args)
    torch.library.opcheck(features_triton.features, (*leaves, 5), test_utils=tests)
    gradients = [torch.randn(1, 5, 2, 16) for _ in range(3)]
    args = tuple(t.detach() for t in args[:-1])
    torch.library.opcheck(features_triton.features_backward, (*gradients, *args), test_utils=tests[:2])


def test_a_compiled_layer_is_one_graph_with_equal_outputs_and_gradients():
    layer = live_model("gka_conv", depth=1).blocks[0].attn
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    idx, rope = torch.arange(18).view(2, 9), rope_table(9, 16)
    expected = layer(x, idx, rope)
    gradients = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    layer.features = layer.features._replace(compute=features_triton.convolved_features)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, idx, rope)
    torch.testing.assert_close(y, expected)
    got = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    for a, b in zip(got, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_choice_and_its_reason_are_in_the_lines_that_training_prints():
    assert choose_features(128, torch.device("cuda"), torch.bfloat16).name == "triton"
    assert "the dtype is torch.float16" in choose_features(128, torch.device("cuda"), torch.float16).reason
    assert "heads have 512 channels" in choose_features(512, torch.device("cuda"), torch.bfloat16).reason
    assert "layers 0, 1: features torch (no triton kernel: the device is cpu)" in live_model("gka_conv").kernel_lines()


def test_the_kernels_compile_for_a_gpu_without_spills(compiled_resources):
    rows = compiled_resources("tests/fused_resources.py", "features")
    assert len(rows) == 12 and [row for row in rows if row["spilled"]] == []
