"""How a TOML file and `--section.field value` become a `Config`, and a `Config` TOML again.

    config = load_config("configs/laptop.toml", ["--model.attention", "gka"])

All problems of a file and its overrides are found in one pass and raised as one `ConfigError`, each naming its field.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from gkachat.config import Config, ConfigError
from gkachat.vision_config import VisionConfig

C = TypeVar("C", Config, VisionConfig)


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    cls: type[C] = Config,
    change: Callable[[dict[str, Any]], None] = lambda tree: None,
) -> C:
    """Read a TOML file (None: all defaults), `change` it, and lay `--section.field value` overrides over it.

    Raises FileNotFoundError for a missing file, ConfigError with every problem otherwise.
    """
    tree = {} if path is None else read_toml(path)
    problems: list[str] = []
    change(tree)
    _lay_over(tree, overrides, cls, problems)
    _default_vocab(tree)
    config = _build(cls, tree, "", problems)
    if problems:
        raise ConfigError(problems)
    if isinstance(config, Config) and config.model.vocab_size < config.tokenizer.vocab_size:
        raise ConfigError(
            [f"model.vocab_size: given {config.model.vocab_size}, expected at least "
             f"tokenizer.vocab_size {config.tokenizer.vocab_size}"]
        )  # fmt: skip
    return config


def read_toml(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"no config file {path}; configs/ has the shipped ones") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or a number of thousands of digits
        raise ConfigError([f"{path}: not valid TOML: {error}"]) from None


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


def _lay_over(tree: dict[str, Any], overrides: Sequence[str], cls: type, problems: list[str]) -> None:
    """Write `--a.b value` (or `--a.b=value`) into the tree as text of the field's type."""
    words = list(overrides)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        values = [value] if equals else []
        while words and not words[0].startswith("--"):
            values.append(words.pop(0))
        keys = flag.removeprefix("--").replace("-", "_").split(".")
        kind: Any = cls
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
