"""Training an image model: the trainer's loop, checkpoints and log, with images for data and accuracies for figures.

    VisionTrainer(config, load_images(config)).run()

A token is a patch or an image's class token: tokens a step, tokens a second and FLOPs a token mean what they always do.
"""

import dataclasses
from collections.abc import Iterable
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gkachat.config import ConfigError
from gkachat.data.images import Batches, Images
from gkachat.model.stats import ModelStats
from gkachat.model.vit import ViT, model_stats
from gkachat.train.trainer import Trainer
from gkachat.vision_config import VisionConfig

WEIGHT_DECAY = 0.05  # DeiT's


def resolve(config: VisionConfig, n_images: int, world_size: int = 1) -> VisionConfig:
    """Fill in what was not set by hand; an epoch is the whole steps that `n_images` fill. Learning rates are as given.

    Raises ConfigError for a batch that `world_size` processes cannot share, or that is larger than an epoch.
    """
    train, optim, T = config.train, config.optim, config.model.sequence_len
    if train.batch_images % world_size or train.batch_images > n_images:
        raise ConfigError(
            [f"train.batch_images: given {train.batch_images}, expected a multiple of {world_size} processes, no more "
             f"than the {n_images:,} images there are"]
        )  # fmt: skip
    steps = max(1, round(train.epochs * (n_images // train.batch_images)))
    batch = train.batch_images * T
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, name=config.run_name),
        train=dataclasses.replace(train, total_batch_size=batch, total_tokens=train.total_tokens or steps * batch),
        optim=dataclasses.replace(
            optim,
            lr_scale=1.0 if optim.lr_scale is None else optim.lr_scale,
            adam_scale=1.0 if optim.adam_scale is None else optim.adam_scale,
            weight_decay=WEIGHT_DECAY if optim.weight_decay is None else optim.weight_decay,
        ),
    )


class VisionTrainer(Trainer):
    Model = ViT

    def __init__(self, config: VisionConfig, images: Images, **options: Any):
        """`options` and errors are Trainer's; ConfigError for a batch that does not fit."""
        self.images = images
        super().__init__(config, **options)
        self.model.label_smoothing = config.train.label_smoothing

    def _resolve(self, config: VisionConfig) -> VisionConfig:
        return resolve(config, len(self.images.train), self.world.size)

    @cached_property
    def counted(self) -> ModelStats:
        return model_stats(self.config.model)

    def _open_data(self) -> None:
        self.tokenizer, self.batches = None, Batches(self.images, self.config, self.rows, self.world)

    def _horizon(self) -> str:
        return f"{self.config.train.batch_images:,} images"

    def _data_line(self) -> str:
        train, val = len(self.images.train), len(self.images.val)
        return f"data: {train:,} images of train, {val:,} of val; an epoch has {self.batches.steps_per_epoch:,} steps"

    @cached_property
    def averaged(self) -> ViT:
        """The model whose weights are an average over steps; where there is none, the model itself."""
        return deepcopy(self.model) if self.config.train.ema_decay else self.model

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        weights, remembered = super()._state()
        if self.averaged is not self.model and self.world.is_main:
            remembered |= {f"{name}/trained": tensor for name, tensor in weights.items()}
        return self.averaged.state_dict(), remembered

    def _load(self, weights: dict[str, Tensor], remembered: Iterable[tuple[str, Tensor]]) -> None:
        if self.averaged is not self.model:
            self.averaged.load_state_dict(weights)
            found = dict(remembered)
            weights, remembered = {name: found.pop(f"{name}/trained") for name in weights}, found.items()
        super()._load(weights, remembered)

    def _train_step(self) -> None:
        averaged = self.averaged  # of the first step on
        super()._train_step()
        if averaged is not self.model:
            with torch.no_grad():
                move = get_ema_multi_avg_fn(self.config.train.ema_decay)
                move(list(averaged.parameters()), list(self.model.parameters()), None)

    @torch.no_grad()
    def _measure(self) -> list[float]:
        """Nats, right ones, right ones among the five likeliest, images."""
        model = self.averaged.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for images, classes in self.batches.val(self.learner.device_batch_size):
            if self.asked_to_stop:
                break
            logits, classes = model(images.to(self.device)), classes.to(self.device)
            hits = logits.topk(min(5, logits.size(1))).indices == classes[:, None]
            nats = F.cross_entropy(logits, classes, reduction="sum")
            sums += torch.stack((nats, hits[:, 0].sum(), hits.sum(), nats.new_tensor(len(classes))))
        self.averaged.train()
        return sums.tolist()

    def _figures(self, sums: list[float]) -> dict[str, float]:
        nats, top1, top5, n = sums
        return {"val_loss": nats / n, "val_top1": top1 / n, "val_top5": top5 / n}
