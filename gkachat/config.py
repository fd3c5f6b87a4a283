"""Every option there is, one dataclass per concern, and how a TOML file and `--section.field value` become a `Config`.

    config = load_config("configs/laptop.toml", ["--model.attention", "gka"])

A field whose default is None is derived: the model's from `depth` right here, the recipe's (horizon, batch, learning
rates, weight decay) from the counted model in `train/recipe.py`. Setting it by hand switches the derivation off.
All problems of a file and its overrides are found in one pass and raised as one `ConfigError`, each naming its field.
"""

import dataclasses
import difflib
import math
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

HEAD_DIM = 128


class ConfigError(ValueError):
    """Options that cannot be. `problems` holds one line for each, starting with the field's name."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


def require(checks: Iterable[tuple[bool, str]]) -> None:
    """Raise one ConfigError for all the checks that do not hold."""
    if problems := [message for holds, message in checks if not holds]:
        raise ConfigError(problems)


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
    compile: bool | None = None
    """torch.compile the model; by default on cuda only."""
    log_every: int = 10
    """Steps between printed lines."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 writes the last one only."""
    timeout: float = 600.0
    """Seconds without progress after which a run ends itself, naming the step: a process is gone, or hangs."""
    wandb: str = ""
    """Weights & Biases project; empty: none. WANDB_MODE=offline works."""

    def __post_init__(self) -> None:
        require(
            [
                (not set(self.name) & set("/\\"), f"name: given {self.name!r}, expected a directory name, not a path"),
                (self.name not in (".", ".."), f"name: given {self.name!r}, expected a directory name, not a path"),
                (self.seed >= 0, f"seed: given {self.seed}, expected 0 or more"),
                (self.log_every >= 1, f"log_every: given {self.log_every}, expected 1 or more"),
                (self.checkpoint_every >= 0, f"checkpoint_every: given {self.checkpoint_every}, expected 0 or more"),
                (self.timeout > 0, f"timeout: given {self.timeout}, expected above 0"),
            ]
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
            [
                (self.source != "files" or bool(self.files), "files: given none, expected paths when source is files"),
                (0 < self.val_fraction < 1, f"val_fraction: given {self.val_fraction}, expected above 0 and below 1"),
                (self.min_chars >= 1, f"min_chars: given {self.min_chars}, expected 1 or more"),
                (
                    self.max_chars is None or self.max_chars >= 1,
                    f"max_chars: given {self.max_chars}, expected 1 or more",
                ),
                (self.shard_chars >= 1024, f"shard_chars: given {self.shard_chars}, expected 1024 or more"),
                (not set(self.name) & set("/\\"), f"name: given {self.name!r}, expected a directory name, not a path"),
            ]
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
        low, high = 512, 65_536
        require(
            [
                (
                    low <= self.vocab_size <= high,
                    f"vocab_size: given {self.vocab_size}, expected {low} to {high} (uint16)",
                ),
                (self.train_chars >= 1, f"train_chars: given {self.train_chars}, expected 1 or more"),
                (self.doc_chars >= 1, f"doc_chars: given {self.doc_chars}, expected 1 or more"),
            ]
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
    attention: Literal["softmax", "gka"] = "softmax"
    """What mixes tokens."""
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
    gka: GKAConfig = field(default_factory=GKAConfig)

    def __post_init__(self) -> None:
        if self.n_embd is None:
            object.__setattr__(self, "n_embd", 64 * self.depth)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", HEAD_DIM if self.n_embd % HEAD_DIM == 0 else 64)
        require(
            [
                (self.depth >= 1, f"depth: given {self.depth}, expected 1 or more"),
                (
                    self.attention in ("softmax", "gka"),
                    f"attention: given {self.attention!r}, expected 'softmax' or 'gka'",
                ),
                (self.vocab_size >= 2, f"vocab_size: given {self.vocab_size}, expected 2 or more"),
                (self.sequence_len >= 2, f"sequence_len: given {self.sequence_len}, expected 2 or more"),
                (
                    bool(self.window_pattern) and not set(self.window_pattern) - set("SL"),
                    f"window_pattern: given {self.window_pattern!r}, expected letters S and L",
                ),
                (
                    self.head_dim >= 2 and self.head_dim % 2 == 0,
                    f"head_dim: given {self.head_dim}, expected an even number, 2 or more",
                ),
                (
                    self.depth < 1 or (self.n_embd >= 16 and self.head_dim > 0 and self.n_embd % self.head_dim == 0),
                    f"n_embd: given {self.n_embd}, expected 16 or more and a multiple of head_dim {self.head_dim}",
                ),
            ]
        )

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_dim

    def window(self, layer: int) -> int | None:
        """Visible positions of a layer, the token itself included; None: all of the past."""
        letter = self.window_pattern[layer % len(self.window_pattern)]
        short = math.ceil(self.sequence_len / 4 / 128) * 128
        return None if letter == "L" or layer == self.depth - 1 or short >= self.sequence_len else short


Protocol = Literal["equal-tokens", "equal-ratio", "paper", "equal-flops"]


@dataclass(frozen=True)
class TrainConfig:
    protocol: Protocol = "equal-tokens"
    """How long a gka model trains beside the softmax model of the same shape: the same tokens, the same tokens per
    parameter, the paper's 0.49 of its total FLOPs, or the same total FLOPs."""
    tokens_per_param: float = 12.0
    """Horizon of the softmax model, in tokens per parameter of its matrices and head."""
    baseline_tokens: int | None = None
    """Horizon of the softmax model by hand, in tokens."""
    total_tokens: int | None = None
    """Horizon of this very model by hand, in tokens; takes the place of the protocol."""
    total_batch_size: int | None = None
    """Tokens a step, over all devices and accumulation; by default from the horizon."""
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
    final_lr_fraction: float = 0.05
    """... to this share of its height."""
    eval_every: int = 250
    """Steps between validations; 0: only at the end."""
    eval_tokens: int = 10_485_760
    """Tokens of train and of val that these are measured on; scripts.base_eval measures all of val."""

    def __post_init__(self) -> None:
        optional = ("baseline_tokens", "total_tokens", "total_batch_size")
        positive = [*(name for name in optional if getattr(self, name) is not None), "eval_tokens", "max_skipped"]
        if isinstance(self.device_batch_size, int):
            positive.append("device_batch_size")
        require(
            [(getattr(self, n) >= 1, f"{n}: given {getattr(self, n)}, expected 1 or more") for n in positive]
            + [
                (
                    isinstance(self.device_batch_size, int) or self.device_batch_size == "auto",
                    f"device_batch_size: given {self.device_batch_size!r}, expected a number of rows, or auto",
                ),
                (
                    self.clip_norm is None or self.clip_norm > 0,
                    f"clip_norm: given {self.clip_norm}, expected above 0",
                ),
                (self.tokens_per_param > 0, f"tokens_per_param: given {self.tokens_per_param}, expected above 0"),
                (self.warmup_steps >= 0, f"warmup_steps: given {self.warmup_steps}, expected 0 or more"),
                (self.eval_every >= 0, f"eval_every: given {self.eval_every}, expected 0 or more"),
                (
                    0 <= self.warmdown_fraction <= 1,
                    f"warmdown_fraction: given {self.warmdown_fraction}, expected 0 to 1",
                ),
                (
                    0 <= self.final_lr_fraction <= 1,
                    f"final_lr_fraction: given {self.final_lr_fraction}, expected 0 to 1",
                ),
            ]
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
    """Log bandwidths of gka."""
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
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        require(
            [(v is None or v >= 0, f"{n}: given {v}, expected 0 or more") for n, v in values.items()]
            + [(self.momentum is None or self.momentum < 1, f"momentum: given {self.momentum}, expected below 1")]
        )


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


def home() -> Path:
    """Where everything that is written goes: $GKACHAT_HOME, or ~/.cache/gkachat."""
    return Path(os.environ.get("GKACHAT_HOME") or Path.home() / ".cache" / "gkachat")


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file (None: all defaults) and lay `--section.field value` overrides over it.

    Raises FileNotFoundError for a missing file, ConfigError with every problem otherwise.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(Path(path).read_text())
        except FileNotFoundError:
            raise FileNotFoundError(f"no config file {path}; configs/ has the shipped ones") from None
        except ValueError as error:  # not UTF-8, not TOML, or a number of thousands of digits
            raise ConfigError([f"{path}: not valid TOML: {error}"]) from None
    problems: list[str] = []
    _lay_over(tree, overrides, problems)
    _default_vocab(tree)
    config = _build(Config, tree, "", problems)
    if problems:
        raise ConfigError(problems)
    if config.model.vocab_size < config.tokenizer.vocab_size:
        raise ConfigError(
            [f"model.vocab_size: given {config.model.vocab_size}, expected at least "
             f"tokenizer.vocab_size {config.tokenizer.vocab_size}"]
        )  # fmt: skip
    return config


def build(cls: type, tree: dict[str, Any]) -> Any:
    """A dataclass from a nested dict, as from JSON; ConfigError with every problem."""
    problems: list[str] = []
    built = _build(cls, tree, "", problems)
    if problems:
        raise ConfigError(problems)
    return built


def to_toml(config: Any) -> str:
    """The config as TOML that `load_config` reads back; fields that are None are left out."""
    lines: list[str] = []

    def table(prefix: str, node: Any) -> None:
        subtables = []
        if prefix:
            lines.append(f"[{prefix}]")
        for f in dataclasses.fields(node):
            value = getattr(node, f.name)
            if dataclasses.is_dataclass(value):
                subtables.append((f"{prefix}.{f.name}" if prefix else f.name, value))
            elif value is not None:
                lines.append(f"{f.name} = {_toml_value(value)}")
        for name, value in subtables:
            lines.append("")
            table(name, value)

    table("", config)
    return "\n".join(lines).strip() + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return repr(value)


def _default_vocab(tree: dict[str, Any]) -> None:
    """The model's vocabulary is the tokenizer's, unless the model says otherwise."""
    tokenizer, model = tree.get("tokenizer", {}), tree.setdefault("model", {})
    if isinstance(tokenizer, dict) and isinstance(model, dict) and type(tokenizer.get("vocab_size")) is int:
        model.setdefault("vocab_size", tokenizer["vocab_size"])


def _lay_over(tree: dict[str, Any], overrides: Sequence[str], problems: list[str]) -> None:
    """Write `--a.b value` (or `--a.b=value`) into the tree as text of the field's type."""
    words = list(overrides)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        values = [value] if equals else []
        while words and not words[0].startswith("--"):
            values.append(words.pop(0))
        keys = flag.removeprefix("--").replace("-", "_").split(".")
        kind: Any = Config
        for key in keys:
            kind = typing.get_type_hints(kind).get(key) if dataclasses.is_dataclass(kind) else None
        if not flag.startswith("--") or kind is None or dataclasses.is_dataclass(kind):
            problems.append(f"{flag}: unknown option, expected --section.field value{_suggest('.'.join(keys))}")
            continue
        if len(values) != 1 and get_origin(kind) is not tuple:
            problems.append(f"{'.'.join(keys)}: given {len(values)} values, expected one")
            continue
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):  # the file has a value where a section belongs: _build names it
                node = {}
        node[keys[-1]] = values if get_origin(kind) is tuple else _from_text(values[0], kind)


def _from_text(text: str, kind: Any) -> Any:
    """Command-line text as the TOML value it stands for; what does not parse stays text, for `_check` to name."""
    kinds = get_args(kind) if get_origin(kind) is types.UnionType else (kind,)
    if types.NoneType in kinds and text.lower() == "none":
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        if number in kinds:
            try:
                return number(text)
            except ValueError:
                pass
    return text


def _all_fields(cls: type = Config, prefix: str = "") -> list[str]:
    names = []
    for name, kind in typing.get_type_hints(cls).items():
        names += _all_fields(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
    return names


def _suggest(name: str) -> str:
    close = difflib.get_close_matches(name, _all_fields(), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _build(cls: type, tree: Any, prefix: str, problems: list[str]) -> Any:
    """Build `cls` from `tree`, adding to `problems`; None when that fails."""
    if not isinstance(tree, dict):
        problems.append(f"{prefix.rstrip('.')}: given {tree!r}, expected a table")
        return None
    hints, before = typing.get_type_hints(cls), len(problems)
    kwargs = {}
    for key, value in tree.items():
        name, so_far = prefix + key, len(problems)
        if key not in hints:
            problems.append(f"{name}: unknown field{_suggest(name)}")
            continue
        if dataclasses.is_dataclass(hints[key]):
            value = _build(hints[key], value, name + ".", problems)
        else:
            value = _check(value, hints[key], name, problems)
        if len(problems) == so_far:
            kwargs[key] = value
    try:  # also with some fields left out, for what is wrong with the others
        built = cls(**kwargs)
    except ConfigError as error:
        named = {problem.split(":")[0] for problem in problems[before:]}
        problems += [p for p in (prefix + problem for problem in error.problems) if p.split(":")[0] not in named]
    return built if len(problems) == before else None


def _check(value: Any, kind: Any, name: str, problems: list[str]) -> Any:
    """`value` as a field of type `kind` holds it, or a problem."""
    origin, kinds = get_origin(kind), (kind,)
    if origin is Literal:
        if value not in get_args(kind):
            problems.append(f"{name}: given {value!r}, expected {' or '.join(map(repr, get_args(kind)))}")
        return value
    if origin is tuple:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            problems.append(f"{name}: given {value!r}, expected a list of strings")
            return value
        return tuple(value)
    if origin is types.UnionType:
        kinds = get_args(kind)
    if float in kinds and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) not in kinds:
        wanted = " or ".join("nothing" if k is types.NoneType else k.__name__ for k in kinds)
        problems.append(f"{name}: given {value!r}, expected {wanted}")
    return value
