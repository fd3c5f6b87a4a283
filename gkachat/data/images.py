"""Images: scikit-learn's digits, or any image classification dataset that `datasets` reads, and the batches of a step.

    images = load_images(config)
    (batch, targets), n = Batches(images, config, rows=64).get(step)

A batch is a function of the seed and the step alone, augmentation included: a resumed run sees what it would have seen.
Real photographs are augmented as in DeiT (arXiv 2012.12877, table 9; without its repeated augmentation) by torchvision.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gkachat.train.distributed import World
from gkachat.vision_config import ImageConfig, VisionConfig, ViTConfig

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
RAND_AUGMENT, ERASING, MIXUP, CUTMIX = (2, 9), 0.25, 0.8, 1.0  # operations and their strength; share; alphas
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue, 0 to 1


@dataclass(frozen=True)
class Images:
    """What is trained on and what is evaluated: index -> (image (colours, size, size) float32, class)."""

    train: "Split"
    val: "Split"
    mix: Mix | None = None
    """Blends a training batch and its classes, which become shares (rows, K)."""


class Split(Dataset):
    def __init__(self, rows: Sequence[Any], prepare: Callable[[Any], tuple[Tensor, int]]):
        self.rows, self.prepare = rows, prepare

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: tuple[int, int]) -> tuple[Tensor, int]:
        """The image at an index, changed as a seed has it."""
        index, seed = at
        torch.manual_seed(seed)
        return self.prepare(self.rows[index])


def load_images(config: VisionConfig) -> Images:
    """Raises ValueError where the dataset cannot be had, or does not fit the model."""
    data, model = config.data, config.model
    return (_digits if data.source == "digits" else _huggingface)(data, model)


def _check(model: ViTConfig, classes: int, **shape: int) -> None:
    for name, value in {"classes": classes, **shape}.items():
        if getattr(model, name) != value:
            raise ValueError(f"model.{name}: given {getattr(model, name)}, expected {value}: so the dataset has it")


def _digits(data: ImageConfig, model: ViTConfig) -> Images:
    """1,437 for training and 360 for validation, the same whatever the seed; values 0 to 16 become -1 to 1."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ValueError("data.source: digits needs scikit-learn; pip install 'gkachat[vision]'") from None
    found = load_digits()
    _check(model, classes=10, image_size=8, colours=1)
    pixels = torch.from_numpy(found.images).float().div(8).sub(1)[:, None]
    rows = list(zip(pixels, found.target.tolist(), strict=True))
    train, val = train_test_split(rows, test_size=0.2, random_state=0, stratify=found.target)
    reach = data.shift

    def shifted(row: tuple[Tensor, int]) -> tuple[Tensor, int]:
        down, right = torch.randint(2 * reach + 1, (2,)).tolist()
        return F.pad(row[0], (reach,) * 4, value=-1.0)[:, down : down + 8, right : right + 8], row[1]

    return Images(Split(train, shifted if reach else lambda row: row), Split(val, lambda row: row))


def _huggingface(data: ImageConfig, model: ViTConfig) -> Images:
    import datasets

    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # the latter where it was built for another torch
        raise ValueError(
            f"data.source: huggingface needs torchvision, which cannot be imported ({error}); "
            "pip install 'gkachat[vision]', from the index that torch came from"
        ) from None
    rows = {}
    for split in (data.train_split, data.val_split):
        try:
            rows[split] = datasets.load_dataset(data.dataset, split=split)
        except Exception as error:  # every reader of `datasets` has its own
            raise ValueError(f"data.dataset: cannot load {split!r} of {data.dataset!r}: {error}") from None
    features = rows[data.train_split].features
    columns = [
        next((name for name, feature in features.items() if isinstance(feature, kind)), None)
        for kind in (datasets.Image, datasets.ClassLabel)
    ]
    if None in columns:
        raise ValueError(f"data.dataset: given {data.dataset!r}, expected images and class labels, it has {features}")
    image, label = columns
    _check(model, classes=features[label].num_classes)
    size, mode = model.image_size, "RGB" if model.colours == 3 else "L"
    cubic = v2.InterpolationMode.BICUBIC
    normal = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN[: model.colours], STD[: model.colours])]
    augmented = [v2.RandomResizedCrop(size, interpolation=cubic, antialias=True), v2.RandomHorizontalFlip()]
    augmented += [v2.RandAugment(*RAND_AUGMENT), *normal, v2.RandomErasing(ERASING, value="random")]
    plain = [v2.Resize(round(size * 256 / 224), interpolation=cubic, antialias=True), v2.CenterCrop(size), *normal]
    blends = (kind(alpha=a, num_classes=model.classes) for kind, a in ((v2.MixUp, MIXUP), (v2.CutMix, CUTMIX)))

    def prepare(transforms: list[Any]) -> Callable[[dict], tuple[Tensor, int]]:
        transform = v2.Compose([v2.PILToTensor(), *transforms])
        return lambda row: (transform(row[image].convert(mode)), row[label])

    return Images(
        Split(rows[data.train_split], prepare(augmented)),
        Split(rows[data.val_split], prepare(plain)),
        v2.RandomChoice(list(blends)),
    )


class Batches:
    """A process's batches of any step, `rows` images each; in an epoch, each image comes at most once."""

    def __init__(self, images: Images, config: VisionConfig, rows: int, world: World | None = None):
        self.images, self.config, self.rows, self.world = images, config, rows, world or World()
        self.steps_per_epoch = len(images.train) // (rows * self.world.size)
        self.at, self.loader = -1, iter(())

    def _rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng((self.config.run.seed, step, self.world.rank))

    def _planned(self, step: int) -> Iterator[list[tuple[int, int]]]:
        """(index, seed) of a step's images, and of every later one's."""
        epoch, order = -1, np.empty(0)
        while True:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = np.random.default_rng((self.config.run.seed, epoch)).permutation(len(self.images.train))
            first = (step % self.steps_per_epoch * self.world.size + self.world.rank) * self.rows
            seeds = self._rng(step).integers(2**63, size=self.rows)
            yield list(zip(order[first : first + self.rows].tolist(), seeds.tolist(), strict=True))
            step += 1

    def _loader(self, split: Split, plan: Any) -> DataLoader:
        return DataLoader(
            split, batch_sampler=plan, num_workers=self.config.data.workers, pin_memory=torch.cuda.is_available()
        )

    def get(self, step: int) -> tuple[tuple[Tensor, Tensor], int]:
        """Images and targets, and how many numbers the targets of all processes are."""
        if self.at != step:
            self.loader = iter(self._loader(self.images.train, self._planned(step)))
        images, targets = next(self.loader)
        self.at = step + 1
        # What is drawn from here on follows from seed and step too: blends, and which layers the model leaves out.
        torch.manual_seed(int(self._rng(step).integers(2**62)))
        if self.images.mix is not None:
            images, targets = self.images.mix(images, targets)
        return (images, targets), targets.numel() * self.world.size

    def val(self, rows: int) -> DataLoader:
        """This process's share of the evaluation, `rows` images at a time, in order."""
        mine = [(index, 0) for index in range(self.world.rank, len(self.images.val), self.world.size)]
        return self._loader(self.images.val, [mine[at : at + rows] for at in range(0, len(mine), rows)])
