"""Options for training image models: VisionConfig and its sections.

config = load_config("configs/vision_digits.toml", cls=VisionConfig)
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gkachat.config import ConfigError, GKAConfig, LoopConfig, OptimConfig, RunConfig, at_least, require


@dataclass(frozen=True)
class ViTConfig:
    """An image model's shape; by default DeiT-Tiny's. Raises ConfigError for a shape that cannot be built."""

    depth: int = 12
    """Layers."""
    attention: Literal["softmax", "gka"] = "softmax"
    """What mixes patches; it sees all of the image."""
    n_embd: int = 192
    """Channels."""
    head_dim: int = 64
    """Channels a head."""
    image_size: int = 224
    """Pixels a side."""
    patch_size: int = 16
    """Pixels a side of a patch; each is a token, and the class token stands before them."""
    colours: int = 3
    """Numbers a pixel."""
    classes: int = 1000
    """What the head tells apart."""
    drop_path: float = 0.0
    """How often the last block is left out of an image's training step; earlier ones less often, the first never."""
    gka: GKAConfig = field(default_factory=GKAConfig)

    def __post_init__(self) -> None:
        divides = self.head_dim > 0 and self.n_embd % self.head_dim == 0
        fits = self.patch_size > 0 and self.image_size % self.patch_size == 0
        require(
            self,
            n_embd=(self.n_embd >= 1 and divides, f"a multiple of head_dim {self.head_dim}"),
            head_dim=(self.head_dim >= 2 and self.head_dim % 2 == 0, "an even number, 2 or more"),
            image_size=(self.image_size >= 1 and fits, f"a multiple of patch_size {self.patch_size}"),
            colours=(self.colours in (1, 3), "1 (grey) or 3"),
            drop_path=(0 <= self.drop_path < 1, "0 or more and below 1"),
            **at_least(1, self, "depth", "patch_size"),
            **at_least(2, self, "classes"),
        )
        if self.gka.rope:
            raise ConfigError(["gka.rope: given True, expected false: positions in an image are learned"])

    # What else attention layers ask: positions are the tokens' own, nothing is looked up by token, all is seen.
    causal = uses_value_embeddings = short_conv = property(lambda self: False)
    n_head = property(lambda self: self.n_embd // self.head_dim)
    sequence_len = property(lambda self: (self.image_size // self.patch_size) ** 2 + 1)

    def window(self, layer: int) -> None:
        return None


@dataclass(frozen=True)
class ImageConfig:
    source: Literal["digits", "huggingface"] = "digits"
    """digits: 1,797 images of 8 x 8 pixels that scikit-learn brings along. huggingface: a dataset by name."""
    dataset: str = "ILSVRC/imagenet-1k"
    """huggingface: the dataset's name, or a folder with a folder of images for each class of each split."""
    train_split: str = "train"
    """huggingface: what is trained on ..."""
    val_split: str = "validation"
    """... and what is evaluated."""
    shift: int = 0
    """digits: move training images by up to so many pixels."""
    workers: int = 0
    """Processes that read images."""

    def __post_init__(self) -> None:
        require(self, **at_least(0, self, "shift", "workers"))

    @property
    def name(self) -> str:
        return "digits" if self.source == "digits" else Path(self.dataset).name


@dataclass(frozen=True)
class VisionTrainConfig(LoopConfig):
    epochs: float = 300.0
    """How often each image is trained on."""
    batch_images: int = 1024
    """Images a step, over all devices and accumulation."""
    label_smoothing: float = 0.1
    """Share of each target that is spread over all classes."""
    ema_decay: float = 0.0
    """Evaluate and save an average of the weights that moves by 1 - ema_decay a step; 0: the weights themselves."""

    def __post_init__(self) -> None:
        super().__post_init__(
            epochs=(self.epochs > 0, "above 0"),
            label_smoothing=(0 <= self.label_smoothing < 1, "0 or more and below 1"),
            ema_decay=(0 <= self.ema_decay < 1, "0 or more and below 1"),
            **at_least(1, self, "batch_images"),
        )


@dataclass(frozen=True)
class VisionConfig:
    run: RunConfig = field(default_factory=RunConfig)
    data: ImageConfig = field(default_factory=ImageConfig)
    model: ViTConfig = field(default_factory=ViTConfig)
    train: VisionTrainConfig = field(default_factory=VisionTrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def run_name(self) -> str:
        return self.run.name or f"{self.data.name}_{self.model.attention}"
