"""Options for training image models: VisionConfig and its sections.

config = load_config("configs/vision_digits.toml", cls=VisionConfig)
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gkachat.checks import Checks, ConfigError, at_least, require
from gkachat.config import MAX_DEPTH, MAX_WIDTH, GKAConfig, LoopConfig, OptimConfig, RunConfig


@dataclass(frozen=True)
class ViTConfig:
    """Shape of an image model, DeiT-Tiny's by default. Raises ConfigError for a shape that cannot be built."""

    depth: int = 12
    """Number of layers."""
    attention: Literal["softmax", "gka"] = "softmax"
    """Attention layer. Every token sees the whole image."""
    n_embd: int = 192
    """Width in channels."""
    head_dim: int = 64
    """Channels per head."""
    image_size: int = 224
    """Height and width of an image in pixels."""
    patch_size: int = 16
    """Height and width of a patch in pixels. Each patch is a token; a class token stands before them."""
    colours: int = 3
    """Numbers per pixel: 1 (grey) or 3."""
    classes: int = 1000
    """Number of classes."""
    drop_path: float = 0.0
    """Probability that training skips the last block for an image. It falls linearly to 0 at the first block."""
    gka: GKAConfig = field(default_factory=GKAConfig)

    def __post_init__(self) -> None:
        divides = self.head_dim > 0 and self.n_embd % self.head_dim == 0
        fits = self.patch_size > 0 and self.image_size % self.patch_size == 0
        require(
            self,
            depth=(1 <= self.depth <= MAX_DEPTH, f"1 to {MAX_DEPTH}"),
            n_embd=(
                1 <= self.n_embd <= MAX_WIDTH and divides,
                f"a multiple of head_dim {self.head_dim}",
            ),
            head_dim=(self.head_dim >= 2 and self.head_dim % 2 == 0, "an even number, 2 or more"),
            image_size=(
                1 <= self.image_size <= 2**14 and fits,
                f"a multiple of patch_size {self.patch_size}",
            ),
            colours=(self.colours in (1, 3), "1 (grey) or 3"),
            drop_path=(0 <= self.drop_path < 1, "0 or more and below 1"),
            classes=(2 <= self.classes <= 2**20, f"2 to {2**20}"),
            **at_least(1, self, "patch_size"),
        )
        if self.gka.rope:
            raise ConfigError(["gka.rope: given True, expected false: positions in an image are learned"])

    # Attention layers also ask a config for these.
    causal = uses_value_embeddings = uses_attention_x0 = short_conv = property(lambda self: False)
    n_head = property(lambda self: self.n_embd // self.head_dim)
    sequence_len = property(lambda self: (self.image_size // self.patch_size) ** 2 + 1)

    def window(self, layer: int) -> None:
        """Return None: every layer sees all positions."""
        return None


@dataclass(frozen=True)
class ImageConfig:
    """Images that models are trained and evaluated on."""

    source: Literal["digits", "huggingface"] = "digits"
    """digits: 1,797 images of 8 x 8 pixels from scikit-learn. huggingface: a dataset by name."""
    dataset: str = "ILSVRC/imagenet-1k"
    """huggingface: name of the dataset, or a folder with one folder per split and, in it, one per class."""
    train_split: str = "train"
    """huggingface: split that is trained on."""
    val_split: str = "validation"
    """huggingface: split that is evaluated."""
    shift: int = 0
    """digits: move training images by up to this many pixels."""
    workers: int = 0
    """Processes that read images."""

    def __post_init__(self) -> None:
        still = self.shift == 0 or (self.shift > 0 and self.source == "digits")
        require(self, shift=(still, "0, or more when source is digits"), **at_least(0, self, "workers"))

    @property
    def name(self) -> str:
        return "digits" if self.source == "digits" else Path(self.dataset).name


@dataclass(frozen=True)
class VisionTrainConfig(LoopConfig):
    """Training of an image model."""

    epochs: float = 300.0
    """Passes over the images."""
    batch_images: int = 1024
    """Images per step over all devices and accumulation."""
    label_smoothing: float = 0.1
    """Fraction of each target that is spread evenly over all classes."""
    ema_decay: float = 0.0
    """Decay per step of a moving average of the weights, which is evaluated and saved. 0: no average."""

    def checks(self) -> Checks:
        return {
            **super().checks(),
            "epochs": (0 < self.epochs <= 1e6, "above 0, at most 1e6"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "0 or more and below 1"),
            "ema_decay": (0 <= self.ema_decay < 1, "0 or more and below 1"),
            **at_least(1, self, "batch_images"),
        }


@dataclass(frozen=True)
class VisionConfig:
    """All options of training an image model."""

    run: RunConfig = field(default_factory=RunConfig)
    data: ImageConfig = field(default_factory=ImageConfig)
    model: ViTConfig = field(default_factory=ViTConfig)
    train: VisionTrainConfig = field(default_factory=VisionTrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def run_name(self) -> str:
        return self.run.name or f"{self.data.name}_{self.model.attention}"
