"""Images and the batches of a step: scikit-learn's digits, or any image classification dataset that `datasets` reads.

A batch and its augmentation are a function of the seed and the step, so that a resumed run sees the same images.
Photographs are augmented by torchvision as in DeiT (arXiv 2012.12877, table 9; without its repeated augmentation).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gkachat.machine import check_installed, how_to_install
from gkachat.vision_config import ImageConfig, VisionConfig, ViTConfig

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
RAND_AUGMENT = (2, 9)  # number of operations, magnitude
ERASING, MIXUP, CUTMIX = 0.25, 0.8, 1.0  # probability; alphas
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue, 0 to 1


class Split(Dataset):
    """Maps (index, seed) to an image (colours, size, size) in float32 and its class."""

    def __init__(self, rows: Sequence[Any], prepare: Callable[[Any], tuple[Tensor, int]]):
        self.rows, self.prepare = rows, prepare

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key
        torch.manual_seed(seed)  # augmentation draws from torch's generator
        return self.prepare(self.rows[index])


@dataclass(frozen=True)
class Images:
    """Train and val split of a dataset."""

    train: Split
    val: Split
    mix: Mix | None = None
    """Blends a training batch and its classes (rows,), which become shares (rows, K)."""


def load_images(config: VisionConfig) -> Images:
    """Load the dataset. Raises ValueError where it cannot be loaded, or does not fit the model."""
    load = _load_digits if config.data.source == "digits" else _load_huggingface
    return load(config.data, config.model)


def _check(model: ViTConfig, **expected: int) -> None:
    for name, value in expected.items():
        if getattr(model, name) != value:
            raise ValueError(f"model.{name}: given {getattr(model, name)}, expected {value}, as in the dataset")


def _load_digits(data: ImageConfig, model: ViTConfig) -> Images:
    """Load 1,437 digits for training and 360 for validation, split in the same way whatever the seed.

    Pixel values 0 to 16 become -1 to 1.
    """
    check_installed("sklearn", "vision", "data.source digits: ")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    _check(model, classes=10, image_size=8, colours=1)
    pixels = torch.from_numpy(digits.images).float().div(8).sub(1)[:, None]
    rows = list(zip(pixels, digits.target.tolist(), strict=True))
    train, val = train_test_split(rows, test_size=0.2, random_state=0, stratify=digits.target)
    reach = data.shift

    def shift(row: tuple[Tensor, int]) -> tuple[Tensor, int]:
        down, right = torch.randint(2 * reach + 1, (2,)).tolist()
        return F.pad(row[0], (reach,) * 4, value=-1.0)[:, down : down + 8, right : right + 8], row[1]

    return Images(Split(train, shift if reach else lambda row: row), Split(val, lambda row: row))


def _load_huggingface(data: ImageConfig, model: ViTConfig) -> Images:
    import datasets

    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise ValueError(
            f"data.source: huggingface needs torchvision, which cannot be imported ({error}); "
            f"{how_to_install('vision')}, from the index that torch came from"
        ) from None
    rows = {}
    for split in (data.train_split, data.val_split):
        try:
            rows[split] = datasets.load_dataset(os.path.expanduser(data.dataset), split=split)
        except Exception as error:  # each reader of `datasets` raises its own
            raise ValueError(f"data.dataset: cannot load {split!r} of {data.dataset!r}: {error}") from None
    features = rows[data.train_split].features
    image, label = (
        next((name for name, feature in features.items() if isinstance(feature, kind)), None)
        for kind in (datasets.Image, datasets.ClassLabel)
    )
    if image is None or label is None:
        raise ValueError(f"data.dataset: given {data.dataset!r}, expected images and class labels, it has {features}")
    _check(model, classes=features[label].num_classes)
    size, mode = model.image_size, "RGB" if model.colours == 3 else "L"
    cubic = v2.InterpolationMode.BICUBIC
    normalize = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN[: model.colours], STD[: model.colours])]
    augment = [
        v2.RandomResizedCrop(size, interpolation=cubic, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandAugment(*RAND_AUGMENT),
        *normalize,
        v2.RandomErasing(ERASING, value="random"),
    ]
    resize = v2.Resize(round(size * 256 / 224), interpolation=cubic, antialias=True)
    blends = [kind(alpha=a, num_classes=model.classes) for kind, a in ((v2.MixUp, MIXUP), (v2.CutMix, CUTMIX))]

    def prepare(transforms: list[Any]) -> Callable[[dict], tuple[Tensor, int]]:
        transform = v2.Compose([v2.PILToTensor(), *transforms])
        return lambda row: (transform(row[image].convert(mode)), row[label])

    return Images(
        Split(rows[data.train_split], prepare(augment)),
        Split(rows[data.val_split], prepare([resize, v2.CenterCrop(size), *normalize])),
        v2.RandomChoice(blends),
    )


class Batches:
    """One rank's batches of any step, `rows` images each. Within an epoch, each image comes at most once."""

    def __init__(self, images: Images, config: VisionConfig, rows: int, rank: int = 0, world_size: int = 1):
        self.images, self.config, self.rows = images, config, rows
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = len(images.train) // (rows * world_size)
        self.next_step, self.loader = -1, iter(())

    def _rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng((self.config.run.seed, step, self.rank))

    def _plan(self, step: int) -> Iterator[list[tuple[int, int]]]:
        """Yield (index, seed) of the images of a step, then of every later step."""
        epoch, order = -1, np.empty(0)
        while True:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = np.random.default_rng((self.config.run.seed, epoch)).permutation(len(self.images.train))
            first = (step % self.steps_per_epoch * self.world_size + self.rank) * self.rows
            seeds = self._rng(step).integers(2**63, size=self.rows)
            yield list(zip(order[first : first + self.rows].tolist(), seeds.tolist(), strict=True))
            step += 1

    def _loader(self, split: Split, plan: Any) -> DataLoader:
        return DataLoader(
            split, batch_sampler=plan, num_workers=self.config.data.workers, pin_memory=torch.cuda.is_available()
        )

    def get(self, step: int) -> tuple[tuple[Tensor, Tensor], int]:
        """Return images and targets of a step, and the number of target elements over all ranks."""
        if self.next_step != step:
            self.loader = iter(self._loader(self.images.train, self._plan(step)))
        images, targets = next(self.loader)
        self.next_step = step + 1
        # Seeds the blends, and which blocks stochastic depth leaves out.
        torch.manual_seed(int(self._rng(step).integers(2**62)))
        if self.images.mix is not None:
            images, targets = self.images.mix(images, targets)
        return (images, targets), targets.numel() * self.world_size

    def val(self, rows: int) -> DataLoader:
        """Return this rank's share of val in order, `rows` images at a time."""
        mine = [(index, 0) for index in range(self.rank, len(self.images.val), self.world_size)]
        return self._loader(self.images.val, [mine[at : at + rows] for at in range(0, len(mine), rows)])
