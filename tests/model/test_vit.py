"""Image models: their shape and accounts, their data, and that the trainer trains, saves and resumes them."""

import dataclasses
import shutil

import pytest
import torch
from conftest import call
from hypothesis import given, settings
from hypothesis import strategies as st

from gkachat.checkpoint import load_model, load_optimizer, open_checkpoint, step_dir
from gkachat.config import ConfigError, GKAConfig
from gkachat.config_file import load_config
from gkachat.data.images import Batches, Images, load_images
from gkachat.model.vit import ViT, load_vit, model_stats
from gkachat.train.distributed import World
from gkachat.train.metrics import read_metrics
from gkachat.train.schedule import lr_multiplier
from gkachat.train.vision import VisionTrainer, resolve
from gkachat.vision_config import VisionConfig as Config
from gkachat.vision_config import ViTConfig

ATTENTIONS = pytest.mark.parametrize("attention", ["softmax", "gka"])
SHAPE = {"depth": 2, "n_embd": 32, "head_dim": 16, "image_size": 8, "patch_size": 2, "colours": 1, "classes": 10}
TINY = ["--model.depth=2", "--model.n_embd=32", "--train.epochs=0.5", "--train.eval_every=6", "--train.warmup_steps=3"]


def config(*options):
    return load_config("configs/vision_digits.toml", [*TINY, *options], Config)


def lively(**shape):
    """A model whose blocks do something from the start."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(**{**SHAPE, **shape}))
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight") or name == "head.weight":
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def trainer(*options, **flags):
    made = config(*options)
    return VisionTrainer(made, load_images(made), report=lambda line: None, **flags)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GKACHAT_HOME", str(tmp_path))
    return tmp_path


@ATTENTIONS
def test_every_patch_changes_every_token(attention):
    model, images = lively(attention=attention).double(), torch.randn(1, 1, 8, 8, dtype=torch.float64)
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
    model = lively(attention=attention)
    images = torch.randn(3, 1, 8, 8)
    # The four rows of patches upside down: squares stay what they are.
    moved = images.view(3, 1, 4, 2, 8).flip(2).reshape(3, 1, 8, 8)
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


def test_flops_are_a_third_forward_as_torch_counts_them():
    from torch.utils.flop_counter import FlopCounterMode

    model = ViT(ViTConfig(**SHAPE))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(model.example_batch(1)[0])
    T, C, depth = 17, 32, 2
    attention = 4 * C * T * T * depth  # which torch does not count on a CPU
    class_token = 2 * C * 4  # goes through no patch matrix, but is counted as if it did
    expected = 3 * (counter.get_total_flops() + attention + class_token)
    assert model_stats(model.config).flops_per_token * T == pytest.approx(expected, abs=T)


def test_stochastic_depth_leaves_out_whole_blocks_in_training_only():
    model, images = lively(drop_path=0.5), torch.randn(64, 1, 8, 8)
    with torch.no_grad():
        whole = model.eval()(images)
        assert torch.equal(whole, model(images))
        one, other = (model.train()(images) for _ in range(2))
        assert not torch.equal(one, other)
        model.blocks[1] = model.blocks[0]  # the first is never left out
        model.config = dataclasses.replace(model.config, drop_path=0.0)
        assert torch.equal(model(images), model.eval()(images))


@pytest.mark.parametrize(
    ("change", "named"),
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
def test_shapes_that_cannot_be_are_named(change, named):
    with pytest.raises(ConfigError, match=named):
        ViTConfig(**{**SHAPE, **change})


def test_images_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"images: given \[3, 8, 8\], expected 1 x 8 squared each"):
        ViT(ViTConfig(**SHAPE))(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model.classes=12"], "model.classes: given 12, expected 10"),
        (["--model.image_size=16"], "model.image_size: given 16, expected 8"),
        (["--model.colours=3"], "model.colours: given 3, expected 1"),
    ],
)
def test_data_that_do_not_fit_the_model_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        load_images(config(*options))


def test_digits_are_split_once_and_for_all():
    images = load_images(config("--run.seed=5"))
    assert (len(images.train), len(images.val)) == (1437, 360)
    whole = {image.numpy().tobytes() for split in (images.train, images.val) for image, _ in split.rows}
    assert len(whole) > 1790  # hardly any digit is there twice
    image, _ = images.val[0, 0]
    assert image.shape == (1, 8, 8) and image.dtype == torch.float32 and -1 <= image.min() < image.max() <= 1


@settings(deadline=None, max_examples=10)
@given(step=st.integers(0, 60), seed=st.integers(0, 100), size=st.sampled_from([1, 2, 4]))
def test_batches_are_a_function_of_seed_and_step_and_processes_share_them(step, seed, size):
    made = config(f"--run.seed={seed}", "--data.shift=0")
    images = load_images(made)
    straight = Batches(images, made, 64)
    for at in range(max(0, step - 1), step):
        straight.get(at)
    (whole, classes), n = straight.get(step)
    assert n == 64 and classes.dtype == torch.long
    shares = [Batches(images, made, 64 // size, World(rank, size)).get(step) for rank in range(size)]
    assert torch.equal(torch.cat([batch[0] for batch, _ in shares]), whole)
    assert all(n == 64 for _, n in shares)


def test_an_epoch_has_each_image_once_and_shifts_it_anew():
    made = config("--data.shift=1")
    images = load_images(made)
    plan = Batches(images, made, 64)._planned(0)
    indices = [index for _ in range(22) for index, _ in next(plan)]
    assert len(set(indices)) == 22 * 64
    (a, _), (b, _), (again, _) = (images.train[7, seed] for seed in (1, 2, 1))
    assert torch.equal(a, again) and not torch.equal(a, b)
    assert 0 < (images.train.rows[7][0] + 1).sum() - (a + 1).sum() + 16 <= 32  # what is moved out is all that is lost


def test_targets_that_are_shares_weigh_as_much_in_two_processes():
    made = config()
    images = load_images(made)
    blended = Images(images.train, images.val, lambda x, y: (x, torch.nn.functional.one_hot(y, 10).float()))
    (_, targets), n = Batches(blended, made, 32, World(0, 2)).get(0)
    assert targets.shape == (32, 10) and n == 2 * targets.numel()


def test_a_batch_that_cannot_be_shared_or_filled_is_named():
    for n_images, size in ((1437, 3), (63, 1)):
        with pytest.raises(ConfigError, match=r"train\.batch_images: given 64, expected a multiple of"):
            resolve(config(), n_images, size)


def test_the_learning_rate_falls_along_half_a_cosine():
    made = resolve(config("--train.epochs=40", "--train.warmup_steps=1"), 1437)
    steps = made.train.total_tokens // made.train.total_batch_size
    assert steps == 40 * 22
    quarter, half, end = (lr_multiplier(round(steps * share) - 1, made) for share in (0.25, 0.5, 1))
    assert (quarter, half, end) == pytest.approx((0.5 + 0.5**1.5, 0.5, 0), abs=0.01)


@ATTENTIONS
def test_a_run_learns_and_leaves_the_averaged_weights(attention, home):
    options = ["--train.epochs=2", "--train.batch_images=16", "--train.ema_decay=0.5", "--train.eval_every=0"]
    run = trainer(f"--model.attention={attention}", *options)
    assert run.run()
    first, last = [record for record in read_metrics(run.run_dir) if record["kind"] == "eval"]
    assert first["val_top1"] < 0.25 and 0.2 < last["val_top1"] < last["val_top5"]
    assert last["val_loss"] < first["val_loss"] - 0.1
    with pytest.raises(ValueError, match="given an image model, which has no tokenizer, expected a language model"):
        load_model(run.run_dir)
    model, meta = load_vit(run.run_dir)
    for name, averaged in run.averaged.state_dict().items():
        assert torch.equal(model.state_dict()[name], averaged)
        assert not torch.equal(run.model.state_dict()[name], averaged)
    images = load_images(run.config)
    right = [int(model(image[None]).argmax()) == label for image, label in (images.val[i, 0] for i in range(360))]
    assert sum(right) / 360 == pytest.approx(last["val_top1"])
    assert meta["tokenizer_sha256"] == ""


def test_a_resumed_run_goes_on_to_the_bit(home):
    options = ["--model.attention=gka", "--model.drop_path=0.2", "--run.keep_last=9"]
    whole, parted = (trainer(*options, f"--run.name={name}") for name in ("whole", "parted"))
    for run in (whole, parted):
        run.run()
    shutil.rmtree(step_dir(parted.run_dir, 11))  # as if it had been killed after step 6
    again = trainer(*options, "--run.name=parted", resume=True)
    assert again.step == 6
    again.run()
    (a, meta), (b, other) = (open_checkpoint(run.run_dir) for run in (whole, again))
    assert a.name == b.name == "step_000011" and meta["sha256"] == other["sha256"]
    remembered = dict(load_optimizer(b, 1))
    assert torch.equal(remembered["positions/trained"], again.model.positions)


def test_a_run_that_exists_is_not_trained_over(home):
    trainer().run()
    with pytest.raises(FileExistsError, match="run 'digits_softmax' exists"):
        trainer()
    with pytest.raises(ValueError, match=r"train\.label_smoothing: given 0\.0, the run has 0\.1"):
        trainer("--train.label_smoothing=0.0", resume=True)


def test_the_scripts_train_and_report(tmp_path):
    result = call("vision_train", "configs/vision_digits.toml", *TINY, "--model.attention=gka", home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "val top1" in result.stdout and "1,437 images of train" in result.stdout
    out = tmp_path / "table"
    result = call("vision_report", "digits_gka", "--out", out, home=tmp_path)
    assert result.returncode == 0, result.stderr
    params = model_stats(ViTConfig(attention="gka", **SHAPE)).params["total"]
    assert out.with_suffix(".md").read_text().splitlines()[4].startswith(f"| gka | {params:,} | 1.000 |")
    result = call("verify_run", "digits_gka", home=tmp_path)
    assert result.returncode == 0 and "no problems" in result.stdout
    result = call("chat_cli", "-p", "x", home=tmp_path)
    assert result.returncode == 1 and "no run with a checkpoint" in result.stderr  # an image model does not talk


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of red, green and blue ones."""
    import numpy as np
    from PIL import Image

    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    home, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, n in (("train", 16), ("validation", 4)):
        for channel, name in enumerate(("red", "green", "blue")):
            (home / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 60, (40, 52, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(home / split / name / f"{i}.png")
    return home


def photographic(photographs, *options):
    small = ["--model.image_size=32", "--model.n_embd=64", "--model.depth=2", "--model.classes=3", "--data.workers=0"]
    small += ["--train.batch_images=16", "--train.epochs=8", "--train.warmup_steps=3", "--train.ema_decay=0.5"]
    return load_config("configs/vision_imagenet.toml", [f"--data.dataset={photographs}", *small, *options], Config)


def test_photographs_are_augmented_blended_and_learned(photographs, home):
    made = photographic(photographs)
    images = load_images(made)
    (batch, shares), n = Batches(images, made, 16).get(3)
    assert batch.shape == (16, 3, 32, 32) and shares.shape == (16, 3) and n == 48
    torch.testing.assert_close(shares.sum(1), torch.ones(16))
    assert ((shares > 0).sum(1) == 2).any()
    (again, _), _ = Batches(images, photographic(photographs, "--data.workers=1"), 16).get(3)
    assert torch.equal(batch, again)
    run = VisionTrainer(made, images, report=lambda line: None)
    run.run()
    assert [r for r in read_metrics(run.run_dir) if r["kind"] == "eval"][-1]["val_top1"] > 0.8


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--data.dataset=/no/such/folder"], "data.dataset: cannot load 'train' of '/no/such/folder'"),
        (["--data.val_split=test"], "data.dataset: cannot load 'test'"),
        (["--model.classes=4"], "model.classes: given 4, expected 3"),
    ],
)
def test_datasets_that_cannot_be_had_are_named(photographs, options, named):
    with pytest.raises(ValueError, match=named):
        load_images(photographic(photographs, *options))
