"""Options of language models and their training, one frozen dataclass per section; vision_config.py has the image ones.

    config = load_config("configs/laptop.toml", ["--model.attention", "gka"])  # gkachat/config_file.py

A field whose default is None is derived. Fields of the model are derived from `depth` in this file. The schedule's
fields (token budget, batch, learning rates, weight decay) are derived from the counted model in `train/schedule.py`.
A field that is set by hand is not derived.

Each section checks itself when it is built, and raises one `ConfigError` that lists all of its problems.
"""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gkachat.checks import DIRECTORY_NAME, Checks, at_least, is_directory_name, require
from gkachat.text import expand

HEAD_DIM = 128
MAX_DEPTH, MAX_WIDTH = 1000, 2**16  # beyond what anyone trains; counting a model takes time in proportion to its depth
Protocol = Literal["equal-tokens", "equal-ratio", "paper", "equal-flops"]
ATTENTIONS: dict[str, str | type] = {
    "softmax": "gkachat.attention.softmax:SoftmaxAttention",
    "gka": "gkachat.attention.gka:GaussianKernelAttention",
    "gka_conv": "gkachat.attention.gka_conv:GKAConv",
}
"""Maps each attention to "module:Class" of its layer, or to the class if `gkachat.attention.register` added it."""


@dataclass(frozen=True)
class RunConfig:
    """Run directory, device, logging and checkpoints."""

    name: str = ""
    """Directory under runs/. Empty: d<depth>_<attention>."""
    seed: int = 42
    """Seed of the weights and of the data order."""
    device: str = "auto"
    """Torch device. auto: cuda for a GPU of NVIDIA or AMD, else mps for one of Apple, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of activations. auto: bfloat16 if the device multiplies it in hardware, otherwise float32."""
    fp8: bool = False
    """Multiply the blocks' matrices in fp8. Needs torchao and a GPU with fp8. FLOPs are counted the same."""
    compile: bool | None = None
    """Compile the model with torch.compile. None: on cuda only."""
    log_every: int = 10
    """Steps between printed lines."""
    checkpoint_every: int = 0
    """Steps between checkpoints. A checkpoint is also saved before each evaluation and at the end. 0: only those."""
    keep_last: int = 2
    """Number of latest checkpoints that are kept."""
    keep_every: int = 0
    """Also keep the checkpoints of steps that this number divides. 0: no others are kept."""
    timeout: float = 600.0
    """Seconds without progress after which the run ends with an error (a process has died or hangs). The first step
    and the first evaluation, which compile, have at least 1,800."""
    wandb: str = ""
    """Weights & Biases project. Empty: no upload. WANDB_MODE=offline works."""

    def __post_init__(self) -> None:
        require(
            self,
            name=(is_directory_name(self.name), DIRECTORY_NAME),
            timeout=(self.timeout > 0, "above 0"),
            **at_least(0, self, "seed", "checkpoint_every", "keep_every"),
            **at_least(1, self, "log_every", "keep_last"),
        )


@dataclass(frozen=True)
class DataConfig:
    """Text that models are trained and evaluated on."""

    source: Literal["python-source", "files", "huggingface"] = "python-source"
    """python-source: the interpreter's standard library. files: local files. huggingface: a dataset by name."""
    name: str = ""
    """Directory name under tokens/ and tokenizer/. Empty: made from the source."""
    site_packages: bool = False
    """python-source: also read the installed packages."""
    files: tuple[str, ...] = ()
    """files: .txt, .jsonl or .parquet files, also compressed, directories, or globs."""
    dataset: str = "karpathy/climbmix-400b-shuffle"
    """huggingface: name of the dataset."""
    subset: str = ""
    """huggingface: configuration of the dataset. Empty: its default."""
    split: str = "train"
    """huggingface: split that is read."""
    revision: str = "main"
    """huggingface: branch, tag or commit."""
    text_column: str = "text"
    """Field or column that holds the text, in .jsonl, .parquet and Hugging Face data."""
    val_fraction: float = 0.01
    """Fraction of documents held out for validation. A hash of the document decides. Where that leaves a split
    empty, as with a single document, the last document is cut at a line end, and its end is held out."""
    min_chars: int = 32
    """Documents with fewer characters are dropped. White space at the ends does not count."""
    max_chars: int | None = None
    """Stop after this many characters of kept documents. None: read everything."""
    shard_chars: int = 1 << 26
    """Characters of text per shard."""
    loader: Literal["cut", "crop"] = "cut"
    """How documents fill rows. cut: every token is used; what does not fit a row begins another. crop: nanochat's rows,
    which throw it away; for comparing bits per byte with nanochat."""

    def __post_init__(self) -> None:
        require(
            self,
            files=(self.source != "files" or bool(self.files), "paths when source is files"),
            name=(is_directory_name(self.name), DIRECTORY_NAME),
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
    """Byte-level BPE tokenizer."""

    vocab_size: int = 32_768
    """Number of tokens, including the 256 bytes and the special tokens."""
    train_chars: int = 2_000_000_000
    """Characters of training text that the merges are learned from."""
    doc_chars: int = 10_000
    """Characters used of each document, so that long documents do not dominate. Where these are fewer than a million,
    documents are used whole."""

    def __post_init__(self) -> None:
        require(
            self,
            vocab_size=(512 <= self.vocab_size <= 65_536, "512 to 65536 (uint16)"),
            **at_least(1, self, "train_chars", "doc_chars"),
        )


@dataclass(frozen=True)
class GKAConfig:
    """Options of attention gka, which the others ignore. The defaults are the published ones (arXiv 2605.02144)."""

    rope: bool = False
    """Rotate the features by position (RoPE) before distances are computed."""
    include_self: bool = True
    """Let a token attend to itself."""
    normalize: bool = False
    """RMS-normalise each head's channels before distances are computed."""
    backend: Literal["auto", "sdpa", "triton", "reference"] = "auto"
    """Kernel that computes the operator. auto: the fastest one that supports the case."""


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a language model. Raises ConfigError for a shape that cannot be built."""

    depth: int = 20
    """Number of layers. Width, token budget and learning rates follow from it."""
    attention: str = "softmax"
    """Attention layer: softmax, gka, gka_conv, or another that is registered."""
    vocab_size: int | None = None
    """Rows of the embedding and of lm_head. None: tokenizer.vocab_size (32,768 without a tokenizer)."""
    sequence_len: int = 2048
    """Tokens per training row."""
    window_pattern: str = "SSSL"
    """One letter per layer, repeated. S: self and a quarter of the sequence before, rounded up to 128. L: all. The last
    layer is L."""
    n_embd: int | None = None
    """Width in channels. None: 64 * depth, rounded up to whole heads of 128 (of head_dim, if that is set)."""
    head_dim: int | None = None
    """Channels per head. None: 128, or 64 if n_embd is not a multiple of 128."""
    value_embeddings: bool | None = None
    """Add a learned vector per token to the values, in every other layer and the last. None: true for softmax only."""
    attention_x0: bool | None = None
    """Let attention after the first layer read a learned sum of the normalised residual stream and the embedding, in
    place of the stream alone. None: true for gka_conv only, and not for attentions registered besides."""
    smear: bool = True
    """Add a gated share of the previous token's embedding to each token's. The share starts at 0."""
    backout: bool = True
    """Subtract a learned share of the residual stream after the middle layer at the end. The share starts at 0.2. A
    model of fewer than 3 layers has none: its middle layer is its last, and the share would change nothing."""
    short_conv: bool = False
    """softmax: queries, keys and values mix the last 4 tokens, and heads have output gates, as in gka_conv."""
    gka: GKAConfig = field(default_factory=GKAConfig)

    def __post_init__(self) -> None:
        if self.vocab_size is None:
            object.__setattr__(self, "vocab_size", 32_768)
        if self.n_embd is None:
            head_dim = max(1, self.head_dim or HEAD_DIM)
            object.__setattr__(self, "n_embd", -(-64 * self.depth // head_dim) * head_dim)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", HEAD_DIM if self.n_embd % HEAD_DIM == 0 else 64)
        # An invalid head_dim or depth has a problem of its own, and is not reported once more as one of n_embd.
        divides = self.head_dim > 0 and self.n_embd % self.head_dim == 0
        no_values = self.attention in ("gka", "gka_conv") and self.value_embeddings
        least = 4 if self.attention == "gka_conv" else 2  # three channels of its keys hold a bias
        require(
            self,
            value_embeddings=(
                not no_values,
                f"false with attention {self.attention!r}, whose values are made of the cached input alone",
            ),
            attention=(self.attention in ATTENTIONS, " or ".join(map(repr, ATTENTIONS))),
            window_pattern=(bool(self.window_pattern) and set(self.window_pattern) <= set("SL"), "letters S and L"),
            head_dim=(self.head_dim >= least and self.head_dim % 2 == 0, f"an even number, {least} or more"),
            n_embd=(
                not 1 <= self.depth <= MAX_DEPTH or (16 <= self.n_embd <= MAX_WIDTH and divides),
                f"16 to {MAX_WIDTH} and a multiple of head_dim {self.head_dim}",
            ),
            depth=(1 <= self.depth <= MAX_DEPTH, f"1 to {MAX_DEPTH}"),
            sequence_len=(2 <= self.sequence_len <= 2**20, f"2 to {2**20}"),
            vocab_size=(2 <= self.vocab_size <= 2**20, f"2 to {2**20}"),
        )

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_dim

    @property
    def backout_layer(self) -> int | None:
        """Return the layer of which the backout subtracts a share, or None."""
        return self.depth // 2 if self.backout and self.depth > 2 else None

    @property
    def uses_value_embeddings(self) -> bool:
        """Whether layers have value embeddings: `value_embeddings`, or the attention's default if that is None."""
        return self.attention == "softmax" if self.value_embeddings is None else self.value_embeddings

    @property
    def uses_attention_x0(self) -> bool:
        """Whether attention reads the embedding too: `attention_x0`, or the attention's default if that is None."""
        return self.attention == "gka_conv" if self.attention_x0 is None else self.attention_x0

    def with_attention(self, attention: str) -> "GPTConfig":
        """Return the same shape with another attention, and its value_embeddings and attention_x0 by default."""
        return dataclasses.replace(self, attention=attention, value_embeddings=None, attention_x0=None)

    @property
    def causal(self) -> bool:
        """Whether a token attends only to the past and itself."""
        return True

    def window(self, layer: int) -> int | None:
        """Return the number of positions that a token of this layer sees, itself included. None: all of the past."""
        letter = self.window_pattern[layer % len(self.window_pattern)]
        short = math.ceil(self.sequence_len / 4 / 128) * 128 + 1  # nanochat's kernels count positions before the token
        return None if letter == "L" or layer == self.depth - 1 or short >= self.sequence_len else short


@dataclass(frozen=True)
class LoopConfig:
    """Options of the training loop that language and image models share."""

    total_tokens: int | None = None
    """Token budget of this run. None: derived, from protocol or epochs."""
    total_batch_size: int | None = None
    """Tokens per step over all devices and accumulation. None: derived."""
    device_batch_size: int | Literal["auto"] = 32
    """Rows per device and pass. auto: as many as fit in its memory (32 on a CPU)."""
    recompute_blocks: bool = False
    """Recompute each block in the backward pass (activation checkpointing): less memory, more time."""
    clip_norm: float | None = None
    """Maximum norm of the gradient. None: no clipping."""
    max_skipped: int = 10
    """Training stops after this many consecutive steps with a non-finite loss or gradient. Such steps are skipped."""
    warmup_steps: int = 40
    """Steps over which the learning rate rises."""
    warmdown_fraction: float = 0.65
    """Fraction of the steps, at the end, over which the learning rate falls."""
    warmdown_shape: Literal["linear", "cosine"] = "linear"
    """Shape of that fall."""
    final_lr_fraction: float = 0.05
    """Learning rate at the end, as a fraction of its peak."""
    eval_every: int = 250
    """Steps between evaluations. 0: only at the start and the end."""

    def __post_init__(self) -> None:
        require(self, **self.checks())

    def checks(self) -> Checks:
        """Return the checks of every field."""
        batch = self.device_batch_size
        return {
            "device_batch_size": (batch == "auto" if isinstance(batch, str) else batch >= 1, "1 or more rows, or auto"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "above 0"),
            "warmdown_fraction": (0 <= self.warmdown_fraction <= 1, "0 to 1"),
            "final_lr_fraction": (0 <= self.final_lr_fraction <= 1, "0 to 1"),
            **at_least(0, self, "warmup_steps", "eval_every"),
            **at_least(1, self, "total_tokens", "total_batch_size", "max_skipped"),
        }


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """Training of a language model."""

    protocol: Protocol = "equal-tokens"
    """Token budget relative to the softmax model of the same shape: equal tokens, equal tokens per parameter,
    the paper's 0.49 of its total FLOPs, or equal total FLOPs."""
    tokens_per_param: float = 12.0
    """Token budget of the softmax model, per parameter of its matrices and lm_head."""
    baseline_tokens: int | None = None
    """Token budget of the softmax model. None: tokens_per_param decides."""
    eval_tokens: int = 10_485_760
    """Tokens of train and of val that an evaluation during training reads. scripts.base_eval reads all of val."""

    def checks(self) -> Checks:
        return {
            **super().checks(),
            "tokens_per_param": (1e-6 <= self.tokens_per_param <= 1e6, "above 0, from 1e-6 to 1e6"),
            **at_least(1, self, "baseline_tokens", "eval_tokens"),
        }


@dataclass(frozen=True)
class OptimConfig:
    """Learning rates and weight decay, at a batch of 2^19 tokens; those of embeddings and head also at 768 channels."""

    matrix_lr: float = 0.02
    """Muon learning rate of the attention and MLP matrices, and of gates. All other rates are AdamW's."""
    embedding_lr: float = 0.3
    """Token embedding."""
    value_embedding_lr: float = 0.15
    """Value embeddings."""
    lm_head_lr: float = 0.008
    """lm_head."""
    x0_lr: float = 0.5
    """Per-layer weights of the embedding that is mixed into the residual stream."""
    residual_lr: float = 0.005
    """Per-layer scales of the residual stream."""
    smear_lr: float = 0.2
    """Gate and scale of the smear, and scale of the backout. `lr_scale` leaves it alone."""
    sigma_lr: float = 0.01
    """Log bandwidths (log sigma) of gka and gka_conv, biases of forget gates, and the two shares of attention_x0."""
    conv_lr: float = 0.02
    """Taps of short convolutions."""
    position_lr: float = 0.01
    """Position embeddings and class token of image models."""
    lr_scale: float | None = None
    """Factor on the learning rates. None: sqrt(batch / 2^19)."""
    width_scale: float | None = None
    """Factor on the rates of embeddings, value embeddings and lm_head. None: (n_embd / 768)^-0.5."""
    weight_decay: float | None = None
    """Weight decay of the matrices. None: 0.28 sqrt(batch / 2^19) (token budget at depth 12) / token budget."""
    decay_schedule: bool = True
    """Let weight decay fall to zero over the run, along half a cosine wave."""
    momentum: float | None = None
    """Muon's momentum. None: it rises from 0.85 to 0.97 over 400 steps and falls to 0.90 over the warm-down."""
    muon_nesterov: bool = True
    """Muon: Nesterov momentum."""
    muon_variance_norm: bool = True
    """Muon: scale the rows of an update, or the columns of a wide one, to a common variance."""
    muon_cautious: bool = True
    """Muon: apply weight decay only where it has the sign of the update."""

    def __post_init__(self) -> None:
        names = [f.name for f in dataclasses.fields(self) if f.name != "momentum"]
        valid = self.momentum is None or 0 <= self.momentum < 1
        require(self, momentum=(valid, "0 or more and below 1"), **at_least(0, self, *names))


@dataclass(frozen=True)
class Config:
    """All options of training a language model."""

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
        """Directory of the tokenizer and of the corpus it encodes, under tokenizer/ and tokens/."""
        return f"{self.data.name}-v{self.tokenizer.vocab_size}"


@dataclass(frozen=True)
class ChatConfig:
    """Conversations that a trained model is fine-tuned on."""

    base: str = ""
    """Run whose last checkpoint is fine-tuned."""
    source: Literal["generated", "files", "huggingface"] = "generated"
    """generated: small tasks made from run.seed. files: chat.files. huggingface: SmolTalk, MMLU and GSM8K."""
    files: tuple[str, ...] = ()
    """files: .jsonl or .parquet files, directories or globs; each line or row has `messages`."""
    conversations: int | None = None
    """Maximum number of conversations. None: all there are, or 40,000 generated ones."""
    epochs: float = 1.0
    """Passes over the conversations."""
    val_fraction: float = 0.05
    """Fraction of conversations held out for validation. A hash of the user's messages decides."""

    def __post_init__(self) -> None:
        require(
            self,
            files=(
                (self.source == "files") == bool(self.files),
                "paths when source is files" if self.source == "files" else "none unless source is files",
            ),
            epochs=(0 < self.epochs <= 1e6, "above 0, at most 1e6"),
            val_fraction=(0 < self.val_fraction < 1, "above 0 and below 1"),
            **at_least(1, self, "conversations"),
        )


@dataclass(frozen=True)
class TuningConfig(Config):
    """All options of supervised fine-tuning."""

    chat: ChatConfig = field(default_factory=ChatConfig)


def home() -> Path:
    """Return the directory that everything is written under: $GKACHAT_HOME, or ~/.cache/gkachat."""
    return expand(os.environ.get("GKACHAT_HOME") or "~/.cache/gkachat")
