"""The vision transformer: what it sees, its size, and its options."""

import dataclasses

import pytest
import torch

from gkachat.checks import ConfigError
from gkachat.config import GKAConfig
from gkachat.model.vit import ViT, model_stats
from gkachat.vision_config import ViTConfig

ATTENTIONS = pytest.mark.parametrize("attention", ["softmax", "gka"])
SHAPE = {"depth": 2, "n_embd": 32, "head_dim": 16, "image_size": 8, "patch_size": 2, "colours": 1, "classes": 10}


def random_model(**shape):
    """A model whose zero-initialised weights are random, so that its blocks do something."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(**{**SHAPE, **shape}))
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight") or name == "head.weight":
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@ATTENTIONS
def test_every_patch_changes_every_token(attention):
    model, images = random_model(attention=attention).double(), torch.randn(1, 1, 8, 8, dtype=torch.float64)
    model.prepare(torch.float64)
    seen = []
    model.blocks[0].register_forward_hook(lambda block, inputs, output: seen.append(output))
    for pixel in (None, 0, 7):
        changed = images.clone()
        if pixel is not None:
            changed[0, 0, pixel, pixel] += 1
        model(changed)
    for after in seen[1:]:
        assert (after - seen[0]).abs().amax(-1).min() > 0


@ATTENTIONS
def test_patches_are_squares_and_their_order_matters_only_through_positions(attention):
    model = random_model(attention=attention)
    images = torch.randn(3, 1, 8, 8)
    moved = images.view(3, 1, 4, 2, 8).flip(2).reshape(3, 1, 8, 8)  # the four rows of patches upside down
    assert not torch.allclose(model(images), model(moved), atol=1e-3)
    with torch.no_grad():
        model.positions.copy_(model.positions[:1].expand_as(model.positions))
    torch.testing.assert_close(model(images), model(moved), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n_embd", "millions"), [(192, 5.7), (384, 22.0)])
def test_softmax_models_have_the_published_sizes_and_gka_three_matrices_fewer(n_embd, millions):
    # DeiT, table 1: 5.7 and 22 million, with biases and norms that ours lack.
    softmax, gka = (model_stats(ViTConfig(attention=name, n_embd=n_embd)) for name in ("softmax", "gka"))
    assert softmax.params["total"] == pytest.approx(1e6 * millions, rel=0.01)
    assert softmax.params["total"] - gka.params["total"] == 12 * (3 * n_embd**2 - n_embd // 64)
    assert sum(n for name, n in gka.params.items() if name != "total") == gka.params["total"]


def test_flops_are_three_times_those_of_a_forward():
    from torch.utils.flop_counter import FlopCounterMode

    model = ViT(ViTConfig(**SHAPE))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(model.example_batch(1)[0])
    T, C, depth = 17, 32, 2
    attention = 4 * C * T * T * depth  # torch does not count it on a CPU
    class_token = 2 * C * 4  # passes no patch matrix, but is counted as if it did
    expected = 3 * (counter.get_total_flops() + attention + class_token)
    assert model_stats(model.config).flops_per_token * T == pytest.approx(expected, abs=T)


def test_stochastic_depth_leaves_out_whole_blocks_in_training_only():
    model, images = random_model(drop_path=0.5), torch.randn(64, 1, 8, 8)
    with torch.no_grad():
        whole = model.eval()(images)
        assert torch.equal(whole, model(images))
        one, other = (model.train()(images) for _ in range(2))
        assert not torch.equal(one, other)
        model.blocks[1] = model.blocks[0]  # the first is never left out
        model.config = dataclasses.replace(model.config, drop_path=0.0)
        assert torch.equal(model(images), model.eval()(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 9}, "image_size: given 9, expected a multiple of patch_size 2"),
        ({"patch_size": 0}, "patch_size: given 0"),
        ({"n_embd": 40}, "n_embd: given 40, expected a multiple of head_dim 16"),
        ({"classes": 1}, "classes: given 1"),
        ({"colours": 2}, "colours: given 2"),
        ({"drop_path": 1.0}, "drop_path: given 1.0"),
        ({"gka": GKAConfig(rope=True)}, "gka.rope: given True, expected false"),
    ],
)
def test_invalid_shapes_are_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        ViTConfig(**{**SHAPE, **change})


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"images: given \[3, 8, 8\], expected 1 x 8 squared each"):
        ViT(ViTConfig(**SHAPE))(torch.zeros(2, 3, 8, 8))
