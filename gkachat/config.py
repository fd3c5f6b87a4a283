"""Every option there is, one dataclass per concern; config_file.py makes them of TOML and command lines.

A field whose default is None is derived: the model's from `depth` right here, the recipe's (horizon, batch, learning
rates, weight decay) from the counted model in `train/schedule.py`. Setting it by hand switches the derivation off.
All problems of a section are found in one pass and raised as one `ConfigError`, each naming its field.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

HEAD_DIM = 128
Protocol = Literal["equal-tokens", "equal-ratio", "paper", "equal-flops"]
ATTENTIONS = {
    "softmax": "gkachat.attention.softmax:SoftmaxAttention",
    "gka": "gkachat.attention.gka:GaussianKernelAttention",
    "gka_plus": "gkachat.attention.gka_plus:GKAPlus",
}
"""Name of each attention -> "module:Class" of its layer. `gkachat.attention.register` adds to it."""


class ConfigError(ValueError):
    """Options that cannot be. `problems` holds one line for each, starting with the field's name."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


def require(config: Any, **fields: tuple[bool, str]) -> None:
    """Raise one ConfigError for all fields, given as (whether it is right, what is expected), that are not right."""
    wrong = [f.name for f in dataclasses.fields(config) if f.name in fields and not fields[f.name][0]]
    if wrong:
        raise ConfigError([f"{name}: given {getattr(config, name)!r}, expected {fields[name][1]}" for name in wrong])


def at_least(least: int, config: Any, *names: str) -> dict[str, tuple[bool, str]]:
    """For `require`: these fields, where they are set."""
    values = {name: getattr(config, name) for name in names}
    return {name: (value is None or value >= least, f"{least} or more") for name, value in values.items()}


def is_plain(name: str) -> bool:
    """Whether it names a directory and not a path."""
    return name not in (".", "..") and not set(name) & set("/\\")


@dataclass(frozen=True)
class RunConfig:
    name: str = ""
    """Directory under runs/; by default d<depth>_<attention>."""
    seed: int = 42
    """Seeds weights and data order."""
    device: str = "auto"
    """A torch device, or auto: cuda where there is one, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What activations are computed in; auto: bfloat16 where the device multiplies it in hardware."""
    fp8: bool = False
    """Multiply the blocks' matrices in fp8 (needs torchao, and a GPU that can); FLOPs are counted all the same."""
    compile: bool | None = None
    """torch.compile the model; by default on cuda only."""
    log_every: int = 10
    """Steps between printed lines."""
    checkpoint_every: int = 0
    """Steps between checkpoints, besides those before each evaluation and at the end; 0: none."""
    keep_last: int = 2
    """How many of the latest checkpoints are kept ..."""
    keep_every: int = 0
    """... besides those of every so many steps; 0: none."""
    timeout: float = 600.0
    """Seconds without progress after which a run ends itself, naming the step: a process is gone, or hangs."""
    wandb: str = ""
    """Weights & Biases project; empty: none. WANDB_MODE=offline works."""

    def __post_init__(self) -> None:
        require(
            self,
            name=(is_plain(self.name), "a directory name, not a path"),
            timeout=(self.timeout > 0, "above 0"),
            **at_least(0, self, "seed", "checkpoint_every", "keep_every"),
            **at_least(1, self, "log_every", "keep_last"),
        )


@dataclass(frozen=True)
class DataConfig:
    source: Literal["python-source", "files", "huggingface"] = "python-source"
    """python-source: the running interpreter's standard library. files: local files. huggingface: a dataset by name."""
    name: str = ""
    """What tokens/ and tokenizer/ call it; by default made from the source."""
    site_packages: bool = False
    """python-source: add the installed packages."""
    files: tuple[str, ...] = ()
    """files: paths or globs of .txt, .jsonl or .parquet."""
    dataset: str = "karpathy/climbmix-400b-shuffle"
    """huggingface: the dataset's name."""
    subset: str = ""
    """huggingface: the dataset's configuration; empty: its default."""
    split: str = "train"
    """huggingface: the split that is read."""
    revision: str = "main"
    """huggingface: a branch, tag or commit."""
    text_column: str = "text"
    """jsonl, parquet and huggingface: where the text is."""
    val_fraction: float = 0.01
    """Share of the documents, chosen by their hash, kept for validation."""
    min_chars: int = 32
    """Documents with fewer characters, white space at the ends aside, are dropped."""
    max_chars: int | None = None
    """Stop after so many characters of kept documents; by default read everything."""
    shard_chars: int = 1 << 26
    """Characters a shard is made of."""

    def __post_init__(self) -> None:
        require(
            self,
            files=(self.source != "files" or bool(self.files), "paths when source is files"),
            name=(is_plain(self.name), "a directory name, not a path"),
            val_fraction=(0 < self.val_fraction < 1, "above 0 and below 1"),
            **at_least(1, self, "min_chars", "max_chars"),
            **at_least(1024, self, "shard_chars"),
        )
        if not self.name:
            named = {"huggingface": f"{self.dataset} {self.subset}".strip(), "files": "files"}.get(
                self.source, self.source
            )
            if self.source == "python-source" and self.site_packages:
                named += "-site"
            object.__setattr__(self, "name", "".join(c if c.isalnum() or c in "-_." else "-" for c in named))


@dataclass(frozen=True)
class TokenizerConfig:
    vocab_size: int = 32_768
    """Tokens, the 256 bytes and the special tokens included."""
    train_chars: int = 2_000_000_000
    """Characters of training text that the merges are learned from."""
    doc_chars: int = 10_000
    """Characters taken of each document, so that a few long ones do not rule."""

    def __post_init__(self) -> None:
        require(
            self,
            vocab_size=(512 <= self.vocab_size <= 65_536, "512 to 65536 (uint16)"),
            **at_least(1, self, "train_chars", "doc_chars"),
        )


@dataclass(frozen=True)
class GKAConfig:
    """Gaussian Kernel Attention; the defaults are the operator as published (arXiv 2605.02144)."""

    rope: bool = False
    """Rotate the features by position before distances are taken."""
    include_self: bool = True
    """Let a token be among its own keys."""
    normalize: bool = False
    """RMS-normalise each head's channels right before the operator."""
    backend: Literal["auto", "sdpa", "triton", "reference"] = "auto"
    """What computes the operator; auto: the fastest that can."""


@dataclass(frozen=True)
class GPTConfig:
    """A model's shape. Raises ConfigError for a shape that cannot be built."""

    depth: int = 20
    """Layers; the dial that everything else follows."""
    attention: str = "softmax"
    """What mixes tokens: softmax, gka, gka_plus, or another that was registered."""
    vocab_size: int = 32_768
    """Rows of the embedding and of the head; from tokenizer.vocab_size when it is not given."""
    sequence_len: int = 2048
    """Tokens a row is trained on."""
    window_pattern: str = "SSSL"
    """A letter a layer, repeated: S sees a quarter of the sequence (rounded up to 128), L all; the last is always L."""
    n_embd: int | None = None
    """Channels; by default 64 * depth."""
    head_dim: int | None = None
    """Channels a head; by default 128, or n_embd where that does not divide by 128."""
    value_embeddings: bool | None = None
    """Add a learned vector per token to the values of every other layer and of the last. None: the attention's
    default, true for softmax."""
    short_conv: bool = False
    """softmax: let each channel of queries, keys and values mix the last 4 tokens, as gka_plus does."""
    gka: GKAConfig = field(default_factory=GKAConfig)

    def __post_init__(self) -> None:
        if self.n_embd is None:
            object.__setattr__(self, "n_embd", 64 * self.depth)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", HEAD_DIM if self.n_embd % HEAD_DIM == 0 else 64)
        # Other fields' problems are told where they are, not here too.
        divides = self.head_dim > 0 and self.n_embd % self.head_dim == 0
        no_values = self.attention == "gka" and self.value_embeddings
        require(
            self,
            value_embeddings=(
                not no_values,
                "false with attention 'gka', whose values are its inputs (or use gka_plus)",
            ),
            attention=(self.attention in ATTENTIONS, " or ".join(map(repr, ATTENTIONS))),
            window_pattern=(bool(self.window_pattern) and set(self.window_pattern) <= set("SL"), "letters S and L"),
            head_dim=(self.head_dim >= 2 and self.head_dim % 2 == 0, "an even number, 2 or more"),
            n_embd=(
                self.depth < 1 or (self.n_embd >= 16 and divides),
                f"16 or more and a multiple of head_dim {self.head_dim}",
            ),
            sequence_len=(2 <= self.sequence_len <= 2**20, f"2 to {2**20}"),
            **at_least(1, self, "depth"),
            **at_least(2, self, "vocab_size"),
        )

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_dim

    @property
    def uses_value_embeddings(self) -> bool:
        """`value_embeddings`, or the attention's default where it is None."""
        return self.attention == "softmax" if self.value_embeddings is None else self.value_embeddings

    @property
    def causal(self) -> bool:
        """Whether a token sees the past alone."""
        return True

    def window(self, layer: int) -> int | None:
        """Visible positions of a layer, the token itself included; None: all of the past."""
        letter = self.window_pattern[layer % len(self.window_pattern)]
        short = math.ceil(self.sequence_len / 4 / 128) * 128
        return None if letter == "L" or layer == self.depth - 1 or short >= self.sequence_len else short


@dataclass(frozen=True)
class LoopConfig:
    """What training takes, whatever is trained."""

    total_tokens: int | None = None
    """Horizon of this very model by hand, in tokens; takes the place of what it is derived from."""
    total_batch_size: int | None = None
    """Tokens a step, over all devices and accumulation; by default derived too."""
    device_batch_size: int | str = 32
    """Rows that go through a device at a time; auto: as many as fit its memory (on a CPU, 32)."""
    recompute_blocks: bool = False
    """Compute blocks again in the backward instead of keeping what is inside them: memory for time."""
    clip_norm: float | None = None
    """Longest gradient; by default none is shortened."""
    max_skipped: int = 10
    """Steps in a row whose loss or gradient is not finite, each of which is skipped, after which training stops."""
    warmup_steps: int = 40
    """Steps over which the learning rate rises."""
    warmdown_fraction: float = 0.65
    """Last share of the steps, over which it falls ..."""
    warmdown_shape: Literal["linear", "cosine"] = "linear"
    """... in a straight line, or along half a cosine ..."""
    final_lr_fraction: float = 0.05
    """... to this share of its height."""
    eval_every: int = 250
    """Steps between validations; 0: only at the end."""

    def __post_init__(self, **more: tuple[bool, str]) -> None:
        batch = self.device_batch_size
        require(
            self,
            device_batch_size=(batch == "auto" if isinstance(batch, str) else batch >= 1, "1 or more rows, or auto"),
            clip_norm=(self.clip_norm is None or self.clip_norm > 0, "above 0"),
            warmdown_fraction=(0 <= self.warmdown_fraction <= 1, "0 to 1"),
            final_lr_fraction=(0 <= self.final_lr_fraction <= 1, "0 to 1"),
            **at_least(0, self, "warmup_steps", "eval_every"),
            **at_least(1, self, "total_tokens", "total_batch_size", "max_skipped"),
            **more,
        )


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    protocol: Protocol = "equal-tokens"
    """How long a gka model trains beside the softmax model of the same shape: the same tokens, the same tokens per
    parameter, the paper's 0.49 of its total FLOPs, or the same total FLOPs."""
    tokens_per_param: float = 12.0
    """Horizon of the softmax model, in tokens per parameter of its matrices and head."""
    baseline_tokens: int | None = None
    """Horizon of the softmax model by hand, in tokens."""
    eval_tokens: int = 10_485_760
    """Tokens of train and of val that these are measured on; scripts.base_eval measures all of val."""

    def __post_init__(self) -> None:
        super().__post_init__(
            tokens_per_param=(self.tokens_per_param > 0, "above 0"),
            **at_least(1, self, "baseline_tokens", "eval_tokens"),
        )


@dataclass(frozen=True)
class OptimConfig:
    """Learning rates at the reference batch of 2^19 tokens and, for AdamW, at 768 channels."""

    matrix_lr: float = 0.02
    """Muon: attention and MLP matrices."""
    embedding_lr: float = 0.3
    """AdamW from here on: token embedding."""
    value_embedding_lr: float = 0.15
    """Value embeddings of the softmax model."""
    lm_head_lr: float = 0.008
    """Output head."""
    x0_lr: float = 0.5
    """How much of the embedding each layer mixes in."""
    residual_lr: float = 0.005
    """Scale of each layer's residual stream."""
    sigma_lr: float = 0.01
    """Log bandwidths of gka and gka_plus."""
    conv_lr: float = 0.02
    """Taps of short convolutions."""
    position_lr: float = 0.01
    """Positions and class token of image models."""
    lr_scale: float | None = None
    """Times all of them; by default sqrt(batch / 2^19)."""
    adam_scale: float | None = None
    """Times the AdamW ones; by default (n_embd / 768)^-0.5."""
    weight_decay: float | None = None
    """Of the matrices; by default 0.28 sqrt(batch / 2^19) (horizon at depth 12) / horizon."""
    decay_schedule: bool = True
    """Let weight decay fall to nothing over the run."""
    momentum: float | None = None
    """Of Muon; by default 0.85 rising to 0.97 over 400 steps, and falling to 0.90 over the warm-down."""
    muon_nesterov: bool = True
    """Step along the gradient moved towards its momentum, instead of the momentum itself."""
    muon_variance_norm: bool = True
    """Bring the rows of a step to a common variance."""
    muon_cautious: bool = True
    """Let weight decay act only where it pulls the same way as the step."""

    def __post_init__(self) -> None:
        names = [f.name for f in dataclasses.fields(self) if f.name != "momentum"]
        in_range = self.momentum is None or 0 <= self.momentum < 1
        require(self, momentum=(in_range, "0 or more and below 1"), **at_least(0, self, *names))


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: GPTConfig = field(default_factory=GPTConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def run_name(self) -> str:
        return self.run.name or f"d{self.model.depth}_{self.model.attention}"

    @property
    def data_name(self) -> str:
        """What a corpus tokenized with this vocabulary is called under tokens/ and tokenizer/."""
        return f"{self.data.name}-v{self.tokenizer.vocab_size}"


@dataclass(frozen=True)
class ChatConfig:
    """Conversations that a trained model is tuned on."""

    base: str = ""
    """Run whose last checkpoint is tuned."""
    source: Literal["generated", "files", "huggingface"] = "generated"
    """generated: small tasks made up from run.seed. files: chat.files. huggingface: SmolTalk, MMLU and GSM8K."""
    files: tuple[str, ...] = ()
    """files: .jsonl with a {"messages": [...]} a line."""
    conversations: int | None = None
    """At most so many; by default all there are, of generated ones 40,000."""
    epochs: float = 1.0
    """How often each is trained on."""
    val_fraction: float = 0.05
    """Share of the conversations, chosen by a hash of what they ask, kept for validation."""

    def __post_init__(self) -> None:
        require(
            self,
            files=(self.source != "files" or bool(self.files), "paths when source is files"),
            epochs=(self.epochs > 0, "above 0"),
            val_fraction=(0 < self.val_fraction < 1, "above 0 and below 1"),
            **at_least(1, self, "conversations"),
        )


@dataclass(frozen=True)
class TuningConfig(Config):
    chat: ChatConfig = field(default_factory=ChatConfig)


def home() -> Path:
    """Where everything that is written goes: $GKACHAT_HOME, or ~/.cache/gkachat."""
    return Path(os.environ.get("GKACHAT_HOME") or Path.home() / ".cache" / "gkachat")
