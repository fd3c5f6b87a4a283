"""The image task: batches of an image dataset, evaluated in loss and accuracy.

Tokens are patches and class tokens, so that tokens per step, tokens per second and FLOPs per token keep their meaning.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gkachat.checks import ConfigError
from gkachat.data.images import Batches, Images
from gkachat.machine import widest_float
from gkachat.model.vit import ViT, model_stats
from gkachat.train.distributed import World
from gkachat.train.schedule import whole_budget
from gkachat.vision_config import VisionConfig

WEIGHT_DECAY = 0.05  # DeiT's


def resolve(config: VisionConfig, n_images: int, world_size: int = 1) -> VisionConfig:
    """Fill in what was not set by hand. An epoch is as many whole steps as `n_images` fill; learning rates stay.

    Raises ConfigError for a batch that `world_size` processes cannot share, or that is larger than an epoch.
    """
    train, optim, T = config.train, config.optim, config.model.sequence_len
    if train.batch_images % world_size or train.batch_images > n_images:
        raise ConfigError(
            [f"train.batch_images: given {train.batch_images}, expected a multiple of {world_size} processes, no more "
             f"than the {n_images:,} images there are"]
        )  # fmt: skip
    batch = train.batch_images * T
    if train.total_batch_size not in (None, batch):
        raise ConfigError(
            [f"train.total_batch_size: given {train.total_batch_size}, expected none: train.batch_images sets it"]
        )
    tokens = whole_budget(train.epochs * (n_images // train.batch_images) * batch, "train.epochs", train.epochs)
    total_tokens = train.total_tokens or max(1, round(tokens / batch)) * batch
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, name=config.run_name),
        train=dataclasses.replace(train, total_batch_size=batch, total_tokens=total_tokens),
        optim=dataclasses.replace(
            optim,
            lr_scale=1.0 if optim.lr_scale is None else optim.lr_scale,
            width_scale=1.0 if optim.width_scale is None else optim.width_scale,
            weight_decay=WEIGHT_DECAY if optim.weight_decay is None else optim.weight_decay,
        ),
    )


class ImageTask:
    """Trains on the train split of a dataset, and measures loss, top-1 and top-5 accuracy on val."""

    metrics = ("val_loss", "val_top1", "val_top5")
    tokenizer = None

    def __init__(self, config: VisionConfig, images: Images, world: World):
        """`config` must be resolved."""
        self.images, self.stats = images, model_stats(config.model)
        self.batches = Batches(images, config, config.train.batch_images // world.size, world.rank, world.size)

    def batch(self, step: int) -> tuple[tuple[Tensor, Tensor], int]:
        """Return this rank's images and targets of a step, and the number of target numbers over all ranks."""
        return self.batches.get(step)

    @torch.no_grad()
    def evaluate(self, step: int, model: ViT, rows: int, proceed: Callable[[], bool]) -> dict[str, tuple[float, float]]:
        """Return nats, top-1 hits and top-5 hits of this rank's share of val, each with the number of images."""
        model.eval()
        device = model.positions.device
        sums, n = torch.zeros(3, dtype=widest_float(device), device=device), 0
        for images, classes in self.batches.val(rows):
            if not proceed():
                break
            logits, classes = model(images.to(device)), classes.to(device)
            hits = logits.topk(min(5, logits.size(1))).indices == classes[:, None]
            sums += torch.stack((F.cross_entropy(logits, classes, reduction="sum"), hits[:, 0].sum(), hits.sum()))
            n += len(classes)
        model.train()
        return {name: (value, n) for name, value in zip(self.metrics, sums.tolist(), strict=True)}

    def describe(self) -> str:
        """Return the number of images and of steps in an epoch."""
        return (
            f"data: {len(self.images.train):,} images of train, {len(self.images.val):,} of val; "
            f"an epoch has {self.batches.steps_per_epoch:,} steps"
        )
