"""Image models: their data, and that the trainer trains, saves and resumes them."""

import shutil

import pytest
import torch
from conftest import make_trainer, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from gkachat.checkpoint import load_model, load_optimizer, load_vision_model, open_checkpoint, step_dir
from gkachat.checks import ConfigError
from gkachat.config_file import load_config
from gkachat.data.images import Batches, Images, load_images
from gkachat.model.vit import model_stats
from gkachat.train.metrics import read_metrics
from gkachat.train.schedule import lr_multiplier
from gkachat.train.vision import resolve
from gkachat.vision_config import VisionConfig
from scripts import verify_run, vision_report

TINY = ["--model.depth=2", "--model.n_embd=32", "--train.epochs=0.5", "--train.eval_every=6", "--train.warmup_steps=3"]
TINY += ["--run.dtype=float32"]  # auto depends on the CPU


def config(*options):
    return load_config("configs/vision_digits.toml", [*TINY, *options], VisionConfig)


def trainer(*options):
    return make_trainer("configs/vision_digits.toml", *TINY, *options, script="vision_train")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GKACHAT_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("field", "wrong", "right"), [("classes", 12, 10), ("image_size", 16, 8), ("colours", 3, 1)])
def test_data_that_do_not_fit_the_model_are_refused(field, wrong, right):
    with pytest.raises(ValueError, match=f"model.{field}: given {wrong}, expected {right}"):
        load_images(config(f"--model.{field}={wrong}"))


def test_digits_are_split_in_the_same_way_whatever_the_seed():
    images, others = (load_images(config(f"--run.seed={seed}")) for seed in (1, 5))
    assert (len(images.train), len(images.val)) == (1437, 360)
    assert torch.equal(images.val[7, 0][0], others.val[7, 0][0])
    whole = {image.numpy().tobytes() for split in (images.train, images.val) for image, _ in split.rows}
    assert len(whole) > 1790  # hardly any digit is there twice
    image, _ = images.val[0, 0]
    assert image.shape == (1, 8, 8) and image.dtype == torch.float32 and -1 <= image.min() < image.max() <= 1


@settings(deadline=None, max_examples=10)
@given(step=st.integers(0, 60), seed=st.integers(0, 100), size=st.sampled_from([1, 2, 4]))
def test_batches_are_a_function_of_seed_and_step_and_ranks_share_them(step, seed, size):
    made = config(f"--run.seed={seed}", "--data.shift=0")
    images = load_images(made)
    straight = Batches(images, made, 64)
    for at in range(max(0, step - 1), step):
        straight.get(at)
    (whole, classes), n = straight.get(step)
    assert n == 64 and classes.dtype == torch.long
    shares = [Batches(images, made, 64 // size, rank, size).get(step) for rank in range(size)]
    assert torch.equal(torch.cat([batch[0] for batch, _ in shares]), whole)
    assert all(n == 64 for _, n in shares)


def test_an_epoch_has_each_image_once_and_shifts_it_anew():
    made = config("--data.shift=1")
    images = load_images(made)
    plan = Batches(images, made, 64)._plan(0)
    indices = [index for _ in range(22) for index, _ in next(plan)]
    assert len(set(indices)) == 22 * 64
    (a, _), (b, _), (again, _) = (images.train[7, seed] for seed in (1, 2, 1))
    assert torch.equal(a, again) and not torch.equal(a, b)
    assert 0 < (images.train.rows[7][0] + 1).sum() - (a + 1).sum() + 16 <= 32  # only pixels moved out are lost


def test_targets_that_are_shares_count_on_every_rank():
    made = config()
    images = load_images(made)
    blended = Images(images.train, images.val, lambda x, y: (x, torch.nn.functional.one_hot(y, 10).float()))
    (_, targets), n = Batches(blended, made, 32, rank=0, world_size=2).get(0)
    assert targets.shape == (32, 10) and n == 2 * targets.numel()


def test_a_batch_that_cannot_be_shared_or_filled_is_refused():
    for n_images, size in ((1437, 3), (63, 1)):
        with pytest.raises(ConfigError, match=r"train\.batch_images: given 64, expected a multiple of"):
            resolve(config(), n_images, size)


def test_a_batch_in_tokens_is_refused_as_images_set_it():
    with pytest.raises(
        ConfigError, match=r"train\.total_batch_size: given 64, expected none: train\.batch_images sets it"
    ):
        resolve(config("--train.total_batch_size=64"), 1437)
    done = resolve(config(), 1437)
    assert resolve(done, 1437) == done


def test_the_learning_rate_falls_along_half_a_cosine():
    made = resolve(config("--train.epochs=40", "--train.warmup_steps=1"), 1437)
    steps = made.train.total_tokens // made.train.total_batch_size
    assert steps == 40 * 22
    quarter, half, end = (lr_multiplier(round(steps * share) - 1, made) for share in (0.25, 0.5, 1))
    assert (quarter, half, end) == pytest.approx((0.5 + 0.5**1.5, 0.5, 0), abs=0.01)


@pytest.mark.parametrize("attention", ["softmax", "gka"])
def test_a_run_learns_and_leaves_the_averaged_weights(attention, home):
    options = ["--train.epochs=2", "--train.batch_images=16", "--train.ema_decay=0.5", "--train.eval_every=0"]
    made = trainer(f"--model.attention={attention}", *options)
    made.fit(made.run)
    first, last = [record for record in read_metrics(made.run.directory) if record["kind"] == "eval"]
    assert first["val_top1"] < 0.25 and 0.2 < last["val_top1"] < last["val_top5"]
    assert last["val_loss"] < first["val_loss"] - 0.1
    with pytest.raises(ValueError, match="given an image model, which has no tokenizer, expected a language model"):
        load_model(made.run.directory)
    model, meta = load_vision_model(made.run.directory)
    for name, averaged in made.eval_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], averaged)
        assert not torch.equal(made.model.state_dict()[name], averaged)
    images = load_images(made.config)
    pixels, labels = zip(*(images.val[i, 0] for i in range(360)), strict=True)
    right = model(torch.stack(pixels)).argmax(dim=-1) == torch.tensor(labels)
    assert right.float().mean().item() == pytest.approx(last["val_top1"])
    assert meta["tokenizer_sha256"] == ""


def test_a_resumed_run_continues_to_the_bit(home):
    options = ["--model.attention=gka", "--model.drop_path=0.2", "--run.keep_last=9"]
    options += ["--train.ema_decay=0.5", "--run.name=whole"]
    whole = trainer(*options)
    whole.fit(whole.run)
    shutil.copytree(whole.run.directory, home / "runs" / "parted")
    shutil.rmtree(step_dir(home / "runs" / "parted", 11))  # as if it had been killed after step 6
    again = trainer(*options, "--run.name=parted", "--resume")
    again.fit(again.run)
    (a, meta), (b, other) = (open_checkpoint(made.run.directory) for made in (whole, again))
    assert a.name == b.name == "step_000011" and meta["sha256"] == other["sha256"]
    state = dict(load_optimizer(b, 1))
    assert torch.equal(state["positions/trained"], again.model.positions)


def test_the_scripts_train_refuse_report_and_verify(home, monkeypatch, capsys):
    made = trainer("--model.attention=gka")
    made.fit(made.run)
    out = capsys.readouterr().out
    assert "val top1" in out and "1,437 images of train" in out
    with pytest.raises(FileExistsError, match="run 'digits_gka' exists"):
        trainer("--model.attention=gka")
    with pytest.raises(ValueError, match=r"train\.label_smoothing: given 0\.0, the run has 0\.1"):
        trainer("--model.attention=gka", "--train.label_smoothing=0.0", "--resume")
    table = home / "table"
    monkeypatch.setattr("sys.argv", ["vision_report", "digits_gka", "--out", str(table)])
    vision_report.main()
    params = model_stats(made.config.model).params["total"]
    assert table.with_suffix(".md").read_text().splitlines()[4].startswith(f"| gka | {params:,} | 1.000 |")
    assert verify_run.main("digits_gka") == 0 and "no problems" in capsys.readouterr().out
    result = run_script("chat_cli", "-p", "x", home=home)
    assert result.returncode == 1 and "no run with a checkpoint" in result.stderr  # an image model does not chat


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of red, green and blue photographs."""
    import numpy as np
    from PIL import Image

    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, n in (("train", 16), ("validation", 4)):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 60, (40, 52, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def photographic(photographs, *options):
    small = ["--model.image_size=32", "--model.n_embd=64", "--model.depth=2", "--model.classes=3", "--data.workers=0"]
    small += ["--train.batch_images=16", "--train.epochs=8", "--train.warmup_steps=3", "--train.ema_decay=0.5"]
    return ["configs/vision_imagenet.toml", f"--data.dataset={photographs}", *small, *options]


def test_photographs_are_augmented_blended_and_learned(photographs, home):
    path, *options = photographic(photographs)
    made = load_config(path, options, VisionConfig)
    (batch, shares), n = Batches(load_images(made), made, 16).get(3)
    assert batch.shape == (16, 3, 32, 32) and shares.shape == (16, 3) and n == 48
    torch.testing.assert_close(shares.sum(1), torch.ones(16))
    assert ((shares > 0).sum(1) == 2).any()
    with_a_worker = load_config(path, [*options, "--data.workers=1"], VisionConfig)
    (again, _), _ = Batches(load_images(made), with_a_worker, 16).get(3)
    assert torch.equal(batch, again)
    run = make_trainer(path, *options, script="vision_train")
    run.fit(run.run)
    assert [r for r in read_metrics(run.run.directory) if r["kind"] == "eval"][-1]["val_top1"] > 0.8


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.dataset=/no/such/folder", "data.dataset: cannot load 'train' of '/no/such/folder'"),
        ("--data.val_split=test", "data.dataset: cannot load 'test'"),
        ("--model.classes=4", "model.classes: given 4, expected 3"),
    ],
)
def test_datasets_that_cannot_be_loaded_are_named(photographs, option, message):
    path, *options = photographic(photographs, option)
    with pytest.raises(ValueError, match=message):
        load_images(load_config(path, options, VisionConfig))
