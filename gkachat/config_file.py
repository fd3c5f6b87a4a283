"""Build a `Config` from a TOML file and command-line overrides, and write one as TOML.

config = load_config("configs/laptop.toml", ["--model.attention", "gka"])

The file lays the defaults, and `--section.field value` (or `--section.field=value`) overrides them. tyro parses the
overrides and prints the help. `from_dict` checks names and types, and the dataclasses check their values.
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gkachat.config import Config, ConfigError

C = TypeVar("C")
T = TypeVar("T")


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    cls: type[C] = Config,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> C:
    """Return the config of a TOML file (None: all defaults) with `overrides` laid over it.

    `change`, if given, edits the file's tables in place before the overrides are laid over them.
    Raises FileNotFoundError for a missing file, and ConfigError that names each invalid field.
    """
    tree = {} if path is None else read_toml(path)
    if change is not None:
        change(tree)
    defaults = unchecked(cls, tree)
    values = dataclasses.asdict(parse_overrides(defaults, overrides) if overrides else defaults)
    if "tokenizer" in values and values["model"]["vocab_size"] is None:
        values["model"]["vocab_size"] = values["tokenizer"]["vocab_size"]
    config = from_dict(cls, values)
    if "tokenizer" in values and config.model.vocab_size < config.tokenizer.vocab_size:
        expected = f"at least tokenizer.vocab_size {config.tokenizer.vocab_size}"
        raise ConfigError([f"model.vocab_size: given {config.model.vocab_size}, expected {expected}"])
    return config


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the tables of a TOML file. Raises FileNotFoundError, or ConfigError if it is not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no config file {path}; configs/ has the shipped ones") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or a number of thousands of digits
        raise ConfigError([f"{path}: not valid TOML: {error}"]) from None


def to_toml(config: Any) -> str:
    """Return the config as TOML that `load_config` reads back. Fields that are None are left out."""
    import tomli_w  # benchmarks import this file where only torch is installed

    def without_none(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        return {name: without_none(value) for name, value in node.items() if value is not None}

    return tomli_w.dumps(without_none(dataclasses.asdict(config)))


def from_dict(cls: type[C], tree: dict[str, Any]) -> C:
    """Return the dataclass `cls` built from nested dicts, as TOML and JSON have them.

    Raises ConfigError that lists every unknown or ill-typed field or, if there is none, every invalid value.
    """
    problems = list(_type_problems(cls, tree))
    config = None if problems else _construct(cls, tree, problems)
    if problems:
        raise ConfigError(problems)
    return config


def unchecked(cls: type[C], tree: dict[str, Any]) -> C:
    """Return `cls` built from nested dicts, with values neither checked nor derived: fields that are None stay None.

    It holds the defaults that overrides are laid over. Raises ConfigError for unknown or ill-typed fields.
    """
    if problems := list(_type_problems(cls, tree)):
        raise ConfigError(problems)
    return _construct(cls, tree, [], of=_without_post_init)


def parse_overrides(defaults: C, overrides: Sequence[str], **options: Any) -> C:
    """Return `defaults`, made by `unchecked`, with `--section.field value` overrides. `options` are those of tyro.cli.

    Raises ConfigError like `parse_args`.
    """
    import tyro  # takes a quarter of a second, and most configs come without overrides

    flags = (tyro.conf.FlagConversionOff,)  # --field true, not --field and --no-field
    return parse_args(type(defaults), overrides, default=defaults, config=flags, use_underscores=True, **options)


def parse_args(target: Callable[..., T], args: Sequence[str], **options: Any) -> T:
    """Return what `tyro.cli` makes of the arguments. `--help` prints the help and exits.

    Raises ConfigError, of one line, for the first option that is unknown or ill-typed.
    """
    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(target, args=args, registry=_toml_words(), **options)
    except SystemExit as exit:
        if not exit.code:  # --help
            raise
        raise ConfigError([_first_line(box.getvalue())]) from None


def _toml_words() -> Any:
    """Return the tyro rules that read and show true, false and none as TOML and the docs write them."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry, words = ConstructorRegistry(), {bool: {"true": True, "false": False}, NoneType: {"none": None}}

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        values = words.get(info.type)
        return values and PrimitiveConstructorSpec(
            nargs=1,
            metavar="{" + ",".join(values) + "}",
            instance_from_str=lambda texts: values[texts[0]],
            is_instance=lambda value: type(value) is info.type,
            str_from_instance=lambda value: [str(value).lower()],
            choices=tuple(values),
        )

    return registry


def _first_line(box: str) -> str:
    """Return the message of an error that tyro framed and wrapped, and the option it suggests, as one line."""
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()]
    _, message, *rest = re.split(r"^(?:[╭╰─].*|-{10,})$", "\n".join(lines), flags=re.MULTILINE)  # title, message, ...
    suggested = re.search(r"Perhaps you meant:\s+(--\S+)", "".join(rest))
    message = " ".join(message.strip().split("\n\n")[0].split())
    return message + (f" (did you mean {suggested[1]}?)" if suggested else "")


@functools.cache
def _without_post_init(cls: type) -> type:
    """Return a subclass of the dataclass `cls` whose instances hold their fields as given."""
    names = {"__post_init__": lambda self: None, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), names)


def _construct(
    cls: type, tree: dict[str, Any], problems: list[str], prefix: str = "", of: Callable[[type], type] = lambda cls: cls
) -> Any:
    """Return `of(cls)` built from well-typed nested dicts. None, and more `problems`, if a value is invalid."""
    values, before = {}, len(problems)
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            values[name] = _construct(kind, tree.get(name, {}), problems, f"{prefix}{name}.", of)
        elif name in tree:
            values[name] = _as_type(tree[name], kind)
    if len(problems) > before:
        return None
    try:
        return of(cls)(**values)
    except ConfigError as error:
        problems += [prefix + problem for problem in error.problems]
        return None


def _type_problems(cls: type, tree: Any, prefix: str = "") -> list[str]:
    """Return a line for each field of `tree` that `cls` does not have or whose type is not that of the field."""
    if not isinstance(tree, dict):
        return [f"{prefix.rstrip('.')}: given {tree!r}, expected a table"]
    kinds, problems = get_type_hints(cls), []
    for name, value in tree.items():
        kind = kinds.get(name)
        if kind is None:
            near = difflib.get_close_matches(name, kinds, n=1)
            problems.append(f"{prefix}{name}: unknown field" + (f" (did you mean {prefix}{near[0]}?)" if near else ""))
        elif dataclasses.is_dataclass(kind):
            problems += _type_problems(kind, value, f"{prefix}{name}.")
        elif not _has_type(_as_type(value, kind), kind):
            problems.append(f"{prefix}{name}: given {value!r}, expected {_type_name(kind)}")
    return problems


def _as_type(value: Any, kind: Any) -> Any:
    """Return an int as a float, and a list as a tuple, where the field's type asks for that."""
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_as_type(item, get_args(kind)[0]) for item in value)
    if float in (kind, *get_args(kind)) and type(value) is int and abs(value) < 2**53:
        return float(value)
    return value


def _has_type(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_has_type(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(type(item) is get_args(kind)[0] for item in value)
    return type(value) is kind


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_origin(kind) else str(kind).replace("typing.", "")
